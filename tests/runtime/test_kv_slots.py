"""Slots of the pooled KV buffer: none is lost, however a run ends; what opens before it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cachetune.runtime.cuda_executor import CudaExecutor
from cachetune.runtime.handlers import Handlers
from cachetune.runtime.runner import Runner
from fake_cuda import FakeCuda

from ..runtime.test_device_paths import PROMPTS, executed, served
from .model_cases import TIERS, make_twins, plan_with, prompt_workload


@pytest.fixture
def gpu(tmp_path: Path) -> Iterator[Runner]:
    loaded, _ = make_twins("llama")
    with Runner(loaded, tmp_path, TIERS, device=FakeCuda(), kv_capacity_tokens=2048) as runner:
        yield runner


def failing(name: str, monkeypatch: pytest.MonkeyPatch) -> type[BaseException]:
    """Has a run of PROMPTS fail in that way, after sessions have begun; what it raises."""
    if name == "interrupt":
        usual, n = CudaExecutor.wait, iter(range(100))

        def wait(self: CudaExecutor, until_ns: int | None) -> Any:
            if next(n) == 3:
                raise KeyboardInterrupt
            return usual(self, until_ns)

        monkeypatch.setattr(CudaExecutor, "wait", wait)
        return KeyboardInterrupt
    monkeypatch.setattr(Handlers, name, lambda *_: 1 / 0)
    return ZeroDivisionError


@pytest.mark.parametrize("name", ["head", "decode", "interrupt"])
@pytest.mark.parametrize("run", [served, executed])
def test_a_run_that_fails_keeps_no_slots(
    gpu: Runner, monkeypatch: pytest.MonkeyPatch, run: Any, name: str
) -> None:
    workload, plan = prompt_workload(PROMPTS, 3), plan_with("cachetune", 0.3)
    want = run(gpu, workload, plan).token_ids
    pool = gpu._pool
    n_slots = pool.n_free_slots  # type: ignore[union-attr]
    assert n_slots == pool.slab.n_slots  # type: ignore[union-attr]
    with monkeypatch.context() as patch:
        why = failing(name, patch)
        with pytest.raises(why):
            run(gpu, workload, plan)
    assert pool.n_free_slots == n_slots  # type: ignore[union-attr]
    assert run(gpu, workload, plan).token_ids == want
    assert pool.n_free_slots == n_slots and not pool.n_outside  # type: ignore[union-attr]


def test_a_request_that_begins_anew_gives_its_slots_back_once(gpu: Runner) -> None:
    workload, plan = prompt_workload([PROMPTS[0]], 4), plan_with("cachetune", 0.3)
    served(gpu, workload, plan, "dram")
    index = gpu.index(plan, "dram")
    gpu.store._catalog.ram[next(iter(gpu.store._catalog.ram))][3000] ^= 8
    assert gpu.serve(workload, plan, index).n_fallbacks == 1
    assert gpu._pool._free == [(0, 2048)]  # type: ignore[union-attr]


def test_the_link_is_measured_beside_no_kv(tmp_path: Path) -> None:
    """Measuring takes gigabytes of the device for a moment."""
    done: list[str] = []

    class Measuring(FakeCuda):
        @property
        def copy_from_bytes(self) -> int:
            done.append("measured")
            return 0

        def empty(self, shape: Any, dtype: torch.dtype) -> torch.Tensor:
            done.append("allocated")
            return super().empty(shape, dtype)

    loaded, _ = make_twins("llama")
    Runner(loaded, tmp_path, TIERS, device=Measuring(), kv_capacity_tokens=256).close()
    assert done[0] == "measured" and "allocated" in done
