"""Compile the registry for sm_80, sm_90 and sm_100 without a GPU and look at what came out.

    python -m cachetune.kernels.compile_check [--all] [--only TEXT]

The launchers run on tensors without data while the launches are recorded, so what is compiled is
what a GPU would be asked to run, argument types and alignment included. For each kernel: no
register spills, shared memory within the chip's limit (compiling does not enforce it), tensor-core
instructions, 128-bit loads and asynchronous copies where the case expects them.

Run it in its own process: Triton's interpreter mode, once on, cannot compile.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from .arch import assuming
from .registry import KernelCase, all_cases, representatives

ARCHS = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
WIDE_MMA = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
MMA = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")
POINTER = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.uint8: "*u8",
    torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1",
}  # fmt: skip
VECTOR_LOAD = re.compile(r"ld\.global[.\w:]*\.v4\.[bfu]32|ld\.global[.\w:]*\.v2\.[bfu]64")
VECTOR_COPY = re.compile(r"cp\.async\.cg[.\w:]*.*0x10|cp\.async\.bulk")


@dataclass(frozen=True)
class Launch:
    """One recorded kernel launch: the function and every argument by name."""

    kernel: JITFunction
    values: dict[str, Any]
    options: dict[str, int]


@dataclass(frozen=True)
class Report:
    """What one kernel compiled to on one architecture."""

    registers: int
    spills: int
    shared: int
    ptx: str
    seconds: float


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within the block kernels are not launched but noted."""
    launches: list[Launch] = []

    def note(self: JITFunction, *args: object, **kwargs: Any) -> None:
        values = dict(zip(self.arg_names, args, strict=False))
        values |= {name: kwargs[name] for name in self.arg_names if name in kwargs}
        chosen = ("num_warps", "num_stages")
        options: dict[str, int] = {name: kwargs[name] for name in chosen if name in kwargs}
        launches.append(Launch(self, values, options))

    original = JITFunction.run
    JITFunction.run = note
    try:
        yield launches
    finally:
        JITFunction.run = original


def compile_launch(launch: Launch, arch: int) -> Report:
    """Compile for ``sm_<arch>`` with the specialisation a real launch would get.

    Raises:
        RuntimeError: ptxas printed no resource line.
    """
    signature, constants, hints = {}, {}, {}
    for index, (name, param) in enumerate(
        zip(launch.kernel.arg_names, launch.kernel.params, strict=True)
    ):
        value = launch.values[name]
        free = param.do_not_specialize
        fixed = param.is_constexpr or (isinstance(value, int) and value == 1 and not free)
        if fixed:
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = POINTER[value.dtype]
        else:
            wide = isinstance(value, int) and abs(value) >= 2**31
            signature[name] = "fp32" if isinstance(value, float) else "i64" if wide else "i32"
        aligned = isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)
        if aligned and not fixed and not free:
            hints[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=hints)
    start = time.perf_counter()
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    ptx = compiled.asm["ptx"]
    registers, spills = _ptxas(ptx, arch)
    seconds = time.perf_counter() - start
    return Report(registers, spills, compiled.metadata.shared, ptx, seconds)


def _ptxas(ptx: str, arch: int) -> tuple[int, int]:
    """Registers per thread and bytes spilled, from the assembler itself."""
    target = re.search(r"\.target\s+(\w+)", ptx)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(ptx)
        source.flush()
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={target.group(1) if target else ''}"]
        command += [source.name, "-o", os.devnull]
        text = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    used = re.search(r"Used (\d+) registers", text)
    if used is None:
        raise RuntimeError(f"ptxas gave no resource line for sm_{arch}: {text[-500:]}")
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", text)
    return int(used.group(1)), sum(map(int, spilled))


def problems(case: KernelCase, report: Report, arch: int, main: bool) -> list[str]:
    """What is wrong with a compiled kernel; only the ``main`` one must meet ``case.expects``."""
    found = []
    if report.spills:
        found.append(f"spills {report.spills} B")
    if report.shared > SHARED_LIMIT[arch]:
        found.append(f"shared {report.shared} > {SHARED_LIMIT[arch]} B")
    if not main:
        return found
    if "mma" in case.expects and not any(name in report.ptx for name in MMA):
        found.append("no tensor-core instruction")
    if "wide_mma" in case.expects and WIDE_MMA[arch] not in report.ptx:
        found.append(f"no {WIDE_MMA[arch]}")
    vector = VECTOR_LOAD.search(report.ptx) or VECTOR_COPY.search(report.ptx)
    if "vector" in case.expects and not vector:
        found.append("no 128-bit load")
    if "pipelined" in case.expects and "cp.async" not in report.ptx:
        found.append("loads not pipelined")
    return found


def check(cases: list[KernelCase]) -> int:
    """Compile, print one row per kernel and architecture, return the number of failures."""
    failures = 0
    print(f"{'case':44}{'kernel':26}{'arch':>7}{'regs':>6}{'spill':>7}{'smem':>8}{'s':>6}  result")
    for case in cases:
        for arch in ARCHS:
            with recording() as launches, assuming(arch):
                case.launch(case.make_inputs(0, "meta"))
            for launch in launches:
                report = compile_launch(launch, arch)
                found = problems(case, report, arch, launch is launches[0])
                failures += bool(found)
                print(
                    f"{case.name:44}{launch.kernel.__name__:26}{f'sm_{arch}':>7}{report.registers:6}"
                    f"{report.spills:7}{report.shared:8}{report.seconds:6.1f}  "
                    f"{'; '.join(found) or 'ok'}",
                    flush=True,
                )
    print(f"{failures} failed" if failures else "all ok")
    return failures


def main() -> int:
    """Command line; exit code 0 when everything compiled as expected."""
    parser = argparse.ArgumentParser(prog="python -m cachetune.kernels.compile_check")
    parser.add_argument("--all", action="store_true", help="every case, not one per kernel")
    parser.add_argument("--only", default="", help="cases whose name contains this text")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET=1 replaces the compiler: unset it and run again", file=sys.stderr)
        return 2
    cases = [c for c in all_cases() if not c.tiny] if options.all else representatives()
    chosen = [c for c in cases if options.only in c.name]
    if not chosen:
        known = ", ".join(c.name for c in cases)
        print(f"--only must name a case: {options.only!r}; take one of {known}", file=sys.stderr)
        return 2
    return 1 if check(chosen) else 0


if __name__ == "__main__":
    sys.exit(main())
