"""The GPU path with the Triton kernels themselves, interpreted; `test_device_paths.py` starts it.

A process of its own, because TRITON_INTERPRET must be set before triton is imported. Prints one
line per plan: ``policy<TAB>ok`` or ``policy<TAB>reason``.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import tempfile
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from cachetune.core.model_spec import Stored
from cachetune.core.plan import ReusePlan
from cachetune.kernels.packing import Packed
from cachetune.runtime.cuda_device import CudaDevice
from cachetune.runtime.runner import Runner
from fake_cuda import FakeCuda, OnDevice, plain, there
from model_cases import TIERS, make_twins, plan_with, prompt_workload, tokens
from torch import Tensor

LOCK = threading.Lock()
"""The interpreter keeps its place in a global."""
PROMPTS = [[tokens(24), tokens(17), tokens(6)], [tokens(17), tokens(5, 1)]]
PLANS = [plan_with("cacheblend", 0.3), plan_with("cachetune", 0.3, prefill_batch=2)]


class Interpreted(FakeCuda):
    """Streams of the fake; launches, plans and checks of the real device."""

    _plan = CudaDevice._plan
    current = staticmethod(nullcontext)

    def restore(self, *args: Any) -> None:
        self._launch(CudaDevice.restore, *args)

    def pack(self, *args: Any) -> Packed:
        return self._launch(CudaDevice.pack, *args)

    def deviation(self, *args: Any) -> Tensor:
        return self._launch(CudaDevice.deviation, *args)

    def decode_attention(self, *args: Any) -> Tensor:
        return self._launch(CudaDevice.decode_attention, *args)

    def sparse_attention(self, rows: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Tensor:
        return self._launch(CudaDevice.sparse_attention, rows, q, k, v, *args)

    def capture(self, work: Any) -> Any:
        raise AssertionError("the interpreter's launches cannot be recorded")

    def _launch(self, launch: Any, *args: Any) -> Any:
        self.n_kernels[launch.__name__] += 1
        for x in args:
            assert not isinstance(x, Tensor) or isinstance(x, OnDevice), launch.__name__
        with LOCK, torch._C.DisableTorchFunctionSubclass():
            out = launch(self, *args)
        return there(plain(out))


def run(plans: Sequence[ReusePlan], stored: Stored, device: Interpreted) -> None:
    """The tokens of the CPU, and the same chunk files to the byte."""
    loaded = make_twins("llama")[0].stored_as(stored)
    workload = prompt_workload(PROMPTS, 2)
    with (
        tempfile.TemporaryDirectory() as folder,
        Runner(loaded, Path(folder) / "cpu", TIERS) as cpu,
        Runner(loaded, Path(folder) / "gpu", TIERS, device=device, kv_capacity_tokens=512) as gpu,
    ):
        assert gpu.stages.graphs is not None
        gpu.stages.graphs._enabled = False
        for plan in plans:
            made = []
            for runner in (cpu, gpu):
                runner.prepare(workload, plan, "dram")
                chunks = sorted((runner.store.root / "chunks").iterdir())
                tokens_made = runner.serve(workload, plan, runner.index(plan)).token_ids
                made.append((tokens_made, [(p.name, p.read_bytes()) for p in chunks]))
            wrong = [i for i in range(2) if made[0][i] != made[1][i]]
            what = f"tokens and files, of which differ {wrong}" if wrong else "ok"
            print(f"{plan.policy} {stored}\t{what}", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    device = Interpreted()
    run(PLANS, "native", device)
    run(PLANS[1:], "int4", device)
    wanted = {"restore", "pack", "sparse_attention", "decode_attention", "deviation"}
    print(f"kernels\t{'ok' if wanted == set(device.n_kernels) else device.n_kernels}")


if __name__ == "__main__":
    main()
