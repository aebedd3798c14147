"""Time the registry's full-size cases on this GPU, beside what the GPU can do at most.

    python -m cachetune.kernels.benchmark [--only TEXT] [--json FILE]

A case is first compared with the reference; a wrong one gets no speed and fails the run. The
limits (memory bandwidth, tensor-core rate, host link) are measured in the same run, never from
a data sheet, and a case's own limit is the longer of its bytes and its flops at those rates. Times
are medians with the L2 cache flushed between launches; the spread is the 20th to 80th percentile.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .registry import KernelCase, all_cases

MATMUL_SIZE = 8192
COPY_BYTES = 2**30
PERCENTILES = [0.5, 0.2, 0.8]


@dataclass(frozen=True)
class Ceilings:
    """Measured rates of this machine: bytes/s, flop/s (bf16), bytes/s host to device."""

    memory: float
    matmul: float
    host_link: float

    def seconds(self, case: KernelCase) -> float:
        """The least time ``case`` can take; a gather is bound by the link it reads through."""
        if case.kernel == "gather_host":
            return case.bytes / 2 / self.host_link
        return max(case.bytes / self.memory, case.flops / self.matmul)


@dataclass(frozen=True)
class Timing:
    """One case: median, 20th and 80th percentile in seconds, and limit over median."""

    name: str
    median: float
    low: float
    high: float
    fraction_of_limit: float
    bytes_per_second: float
    flops_per_second: float


def agrees(case: KernelCase, device: str) -> bool:
    """Whether the launch gives the reference's result on fresh random inputs."""
    want = case.reference(case.make_inputs(0, device))
    got = case.launch(case.make_inputs(0, device))
    absolute, relative = case.tolerance
    return len(got) == len(want) and all(
        torch.allclose(a.float(), b.float(), atol=absolute, rtol=relative)
        for a, b in zip(got, want, strict=True)
    )


def timing(case: KernelCase, seconds: list[float], ceilings: Ceilings) -> Timing:
    """Percentiles ``[median, low, high]`` in seconds to the figures that are printed."""
    median, low, high = seconds
    return Timing(
        case.name,
        median,
        low,
        high,
        ceilings.seconds(case) / median,
        case.bytes / median,
        case.flops / median,
    )


def _measure(action: Callable[[], object]) -> list[float]:
    from triton.testing import do_bench

    return [1e-3 * ms for ms in do_bench(action, warmup=50, rep=300, quantiles=PERCENTILES)]


def measure_ceilings() -> Ceilings:
    """Device-to-device copy, a large bf16 product of random matrices, pinned host to device."""
    source = torch.randint(0, 255, (COPY_BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = _measure(lambda: target.copy_(source))[0]
    host = source.cpu().pin_memory()
    link = _measure(lambda: target.copy_(host, non_blocking=True))[0]
    shape = (MATMUL_SIZE, MATMUL_SIZE)
    a, b = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = _measure(lambda: a @ b)[0]
    return Ceilings(2 * COPY_BYTES / copy, 2 * MATMUL_SIZE**3 / product, COPY_BYTES / link)


def run(cases: list[KernelCase], target: Path | None) -> int:
    """Check, time and print; the number of wrong cases."""
    ceilings, timings, wrong = measure_ceilings(), [], []
    print(
        f"{torch.cuda.get_device_name()}: memory {ceilings.memory / 1e12:.2f} TB/s, bf16 matmul "
        f"{ceilings.matmul / 1e12:.0f} Tflop/s, host link {ceilings.host_link / 1e9:.1f} GB/s"
    )
    print(f"{'case':44}{'us':>10}{'p20-p80':>18}{'GB/s':>9}{'Tflop/s':>9}{'of limit':>10}")
    for case in cases:
        if not agrees(case, "cuda"):
            wrong.append(case.name)
            print(f"{case.name:44}  WRONG RESULT, not timed", flush=True)
            continue
        inputs = case.make_inputs(0, "cuda")
        t = timing(case, _measure(lambda: case.launch(inputs)), ceilings)  # noqa: B023
        timings.append(t)
        print(
            f"{t.name:44}{t.median * 1e6:10.1f}{f'{t.low * 1e6:.1f}-{t.high * 1e6:.1f}':>18}"
            f"{t.bytes_per_second / 1e9:9.0f}{t.flops_per_second / 1e12:9.1f}"
            f"{t.fraction_of_limit:10.1%}",
            flush=True,
        )
    if target is not None:
        rows = [asdict(t) for t in timings]
        result = {"device": torch.cuda.get_device_name(), "ceilings": asdict(ceilings)}
        target.write_text(json.dumps(result | {"wrong": wrong, "timings": rows}, indent=1) + "\n")
    return len(wrong)


def main() -> int:
    """Command line; exit code 0 when every result was right, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m cachetune.kernels.benchmark")
    parser.add_argument("--only", default="", help="cases whose name contains this text")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: the kernels can be checked here with compile_check", file=sys.stderr)
        return 2
    cases = [c for c in all_cases() if not c.tiny and options.only in c.name]
    return 1 if run(cases, options.json) else 0


if __name__ == "__main__":
    sys.exit(main())
