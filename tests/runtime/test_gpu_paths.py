"""A real GPU: the values of the CPU, no synchronising call on the path, graphs; `make gpu`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cachetune.core.model_spec import Stored
from cachetune.core.plan import ReusePlan
from cachetune.runtime import runner as runner_module
from cachetune.runtime.cuda_device import is_pinned
from cachetune.runtime.device import open_device
from cachetune.runtime.rope_gate import check_rope
from cachetune.runtime.runner import Runner
from cachetune.runtime.tiers import TierConfig

from .model_cases import TIERS, make_twins, prompt_workload
from .test_device_paths import PLANS, PROMPTS, executed, name_of, served, unannounced
from .test_stored_formats import gap, logits_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Runner, Runner]]:
    folder = tmp_path_factory.mktemp("gpu")
    with (
        Runner(make_twins("llama")[0], folder / "cpu", TIERS) as cpu,
        Runner(
            make_twins("llama")[0], folder / "gpu", TIERS, device="cuda", kv_capacity_tokens=4096
        ) as gpu,
    ):
        yield cpu, gpu


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("plan", PLANS, ids=name_of)
def test_logits_of_the_cpu(pair: tuple[Runner, Runner], plan: ReusePlan, batch: int) -> None:
    workload = prompt_workload(PROMPTS, 3)
    plan = plan.replace(prefill_batch=batch)
    cpu, gpu = (executed(runner, workload, plan) for runner in pair)
    for request_id, logits in cpu.suffix_logits.items():
        torch.testing.assert_close(
            gpu.suffix_logits[request_id].float(), logits.float(), atol=2e-3, rtol=2e-3
        )


@pytest.mark.parametrize("plan", PLANS, ids=name_of)
def test_no_call_synchronises(
    pair: tuple[Runner, Runner], plan: ReusePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch raises in any thread that waits for the device between submission and the last span;
    the trace of the run has one wait per op, for its end."""
    workload, gpu = prompt_workload(PROMPTS, 3), pair[1]
    executed(gpu, workload, plan)
    execute = runner_module.execute

    def strict(*args: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return execute(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(runner_module, "execute", strict)
    assert not unannounced(executed(gpu, workload, plan))


def test_decode_steps_are_replayed(pair: tuple[Runner, Runner]) -> None:
    workload = prompt_workload(PROMPTS, 6)
    cpu, gpu = (served(runner, workload, PLANS[2]) for runner in pair)
    graphs = pair[1].stages.graphs
    assert graphs is not None and graphs.replays and not graphs.fallbacks
    assert gpu.token_ids == cpu.token_ids


def test_staging_is_pinned_and_the_gate_passes(pair: tuple[Runner, Runner]) -> None:
    pages = open_device("cuda").host_pages(1 << 20)
    assert is_pinned(pages) and pages.ctypes.data % 4096 == 0
    assert check_rope(pair[1].transformer) < 1e-5


def test_chunks_in_ram_lie_in_pinned_pages(pair: tuple[Runner, Runner]) -> None:
    workload, gpu = prompt_workload(PROMPTS, 3), pair[1]
    executed(gpu, workload, PLANS[2])
    chunks = list(gpu.store._catalog.ram.values())
    assert chunks and all(is_pinned(chunk) for chunk in chunks)
    assert not gpu.store._reader._pool._lent


@pytest.mark.parametrize("plan", PLANS[1:4], ids=name_of)
def test_chunks_on_the_device_are_read_where_they_lie(
    tmp_path: Path, plan: ReusePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The very logits of DRAM; a hit uploads no page and no call synchronises."""
    workload, execute, uploaded = prompt_workload(PROMPTS, 3), runner_module.execute, []
    tiers = (*TIERS, TierConfig("hbm", "device"))
    with Runner(
        make_twins("llama")[0], tmp_path, tiers, device="cuda", kv_capacity_tokens=4096
    ) as gpu:
        want = executed(gpu, workload, plan)
        executed(gpu, workload, plan, "hbm")
        usual = gpu.device.upload_pages

        def upload(pages: torch.Tensor, ranges: Any) -> torch.Tensor:
            uploaded.append(pages.numel())
            return usual(pages, ranges)

        def strict(*args: Any) -> Any:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return execute(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        monkeypatch.setattr(gpu.device, "upload_pages", upload)
        monkeypatch.setattr(runner_module, "execute", strict)
        got = executed(gpu, workload, plan, "hbm")
        chunks = list(gpu.store._catalog.on_device.values())
    assert not uploaded and not unannounced(got)
    assert chunks and all(p.blobs.is_cuda for chunk in chunks for p in chunk.parts)
    for request_id, logits in want.suffix_logits.items():
        assert torch.equal(got.suffix_logits[request_id], logits)


def test_memory_of_an_evicted_chunk_is_not_used_before_its_reader_is_done() -> None:
    """A long kernel queued before the read; the next chunks take memory of the same size."""
    device = open_device("cuda")
    size, copies = 64 << 20, []
    held = [device.hold(torch.full((size,), 7, dtype=torch.uint8))]

    def read() -> None:
        torch.cuda._sleep(50_000_000)
        chunk = held.pop()
        device.used_here(chunk)
        copies.append(chunk.clone())

    device.stream("restore").run(read)
    others = [device.hold(torch.full((size,), i, dtype=torch.uint8)) for i in range(3)]
    device.synchronise("test")
    assert bool((copies[0] == 7).all()) and [int(x[-1]) for x in others] == [0, 1, 2]


@pytest.mark.parametrize("size", [4096, 1 << 20])
def test_pieces_arrive_by_the_kernel_and_by_the_copy_engine(size: int) -> None:
    device = open_device("cuda")
    pages = torch.from_numpy(np.frombuffer(device.lasting_pages(64 * size), dtype=np.uint8))
    pages.random_(0, 255)
    ranges = [(2 * i * size, size) for i in range(32)]
    want = torch.cat([pages[start : start + n] for start, n in ranges])
    out = device.upload_pages(pages, ranges)
    by_kernel = torch.empty_like(out)
    device._gather(pages, ranges, by_kernel)  # type: ignore[attr-defined]
    device.synchronise("test")
    assert torch.equal(out.cpu(), want) and torch.equal(by_kernel.cpu(), want)
    assert 8192 <= device.copy_from_bytes <= 1 << 20


def test_threads_launch_the_gather_for_the_first_time_at_once() -> None:
    """A row size that nothing else has, so that none of them finds the kernel ready."""
    from cachetune.kernels.gather_host import gather_host

    width, n = 3 * 4096 + 8, 64
    source = torch.randint(0, 255, (n, width), dtype=torch.uint8).pin_memory()
    rows, barrier = torch.arange(n).flip(0), threading.Barrier(8)

    def gather(_: int) -> torch.Tensor:
        stream, out = torch.cuda.Stream(), torch.zeros(n, width, dtype=torch.uint8, device="cuda")
        stream.wait_stream(torch.cuda.current_stream())
        barrier.wait(20)
        with torch.cuda.stream(stream):
            gather_host(source, rows, out, "kernel")
        stream.synchronize()
        return out.cpu()

    with ThreadPoolExecutor(8) as pool:
        assert all(torch.equal(found, source.flip(0)) for found in pool.map(gather, range(8)))


@pytest.mark.parametrize("stored", ["int8", "int4", "int3", "int2"])
def test_packed_chunks_are_restored_as_on_the_cpu(tmp_path: Path, stored: Stored) -> None:
    """A key that is computed a bit otherwise there may get the next code."""
    cpu = logits_of(stored, tmp_path / "cpu")
    gpu = logits_of(stored, tmp_path / "gpu", "cuda")
    assert gap({r: x.cpu() for r, x in gpu.items()}, cpu) < 1e-2


def test_freed_memory_is_used_again_by_the_next_run(pair: tuple[Runner, Runner]) -> None:
    """Streams stay, so a run like the one before it takes next to nothing from the driver."""
    workload, gpu = prompt_workload(PROMPTS, 3), pair[1]
    for _ in range(3):
        executed(gpu, workload, PLANS[2])
    before = torch.cuda.memory_stats()["num_device_alloc"]
    for _ in range(3):
        executed(gpu, workload, PLANS[2])
    assert torch.cuda.memory_stats()["num_device_alloc"] <= before + 2
