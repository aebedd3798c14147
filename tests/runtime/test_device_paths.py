"""What a GPU is asked to do, on a simulated one: the values of the CPU, and no wait of the host."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cachetune.core.invariants import check
from cachetune.core.plan import ReusePlan
from cachetune.core.trace import to_chrome
from cachetune.core.workload import Workload
from cachetune.runtime.attention import Rows
from cachetune.runtime.cuda_graphs import BUCKETS
from cachetune.runtime.device import Device, DeviceError, joined, open_device
from cachetune.runtime.kv_slab import SCRATCH_SLOTS, SlabPool
from cachetune.runtime.runner import Runner, RunResult
from cachetune.runtime.tiers import TierConfig
from cachetune.runtime.transformer import Transformer
from fake_cuda import FakeCuda, FakeStream, OnDevice, there
from support import needs_interpreter

from .model_cases import TIERS, make_twins, plan_with, prompt_workload, tokens

A, B, C = tokens(40), tokens(33), tokens(50)
SUFFIX = tokens(12)
PROMPTS = [[A, B, C, SUFFIX], [C, A, tokens(9, 1)], [B, tokens(17, 2)]]
N_OUTPUT = 4

PLANS = [
    plan_with("full_recompute"),
    plan_with("full_reuse"),
    plan_with("cachetune", 0.3),
    plan_with("cachetune", 0.5, 0.2, layer_group=1),
    plan_with("cachetune", 1.0, 0.3, 0.0, layer_group=1),
    plan_with("cachetune", 0.3, load_order="chunk", restore_stream="compute"),
    plan_with("cachetune", 0.3, prefill_chunk_tokens=16, n_io_workers=2),
    plan_with("cacheblend", 0.3, layer_group=1),
    plan_with("epic", epic_tokens=8),
]


def name_of(plan: Any) -> str:
    return f"{plan.policy}-{plan.layer_group}-{plan.load_order}-{plan.prefill_chunk_tokens}"


@pytest.fixture(scope="module", params=["llama", "qwen3", "mistral-window"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Runner, Runner]]:
    """The same model on the CPU and on the simulated GPU."""
    loaded, _ = make_twins(request.param)
    folder = tmp_path_factory.mktemp("pair")
    with (
        Runner(loaded, folder / "cpu", TIERS) as cpu,
        Runner(loaded, folder / "gpu", TIERS, device=FakeCuda(), kv_capacity_tokens=2048) as gpu,
    ):
        yield cpu, gpu


def served(runner: Runner, workload: Workload, plan: ReusePlan, tier: str = "file") -> RunResult:
    runner.prepare(workload, plan, tier)
    result = runner.serve(workload, plan, runner.index(plan, tier))
    check(result.timeline, workload)
    return result


def executed(runner: Runner, workload: Workload, plan: ReusePlan, tier: str = "dram") -> RunResult:
    runner.prepare(workload, plan, tier)
    index = runner.index(plan)
    decisions, schedule = runner.batch_schedule(workload, plan, index, n_decode=2)
    result = runner.execute_schedule(workload, plan, decisions, schedule, keep_suffix_logits=True)
    check(result.timeline, schedule=schedule)
    return result


@pytest.mark.parametrize("plan", PLANS, ids=name_of)
def test_a_gpu_makes_the_tokens_of_the_cpu(pair: tuple[Runner, Runner], plan: ReusePlan) -> None:
    workload = prompt_workload(PROMPTS, N_OUTPUT)
    cpu, gpu = (served(runner, workload, plan) for runner in pair)
    assert gpu.token_ids == cpu.token_ids
    assert all(len(made) == N_OUTPUT for made in gpu.token_ids.values())


@pytest.mark.parametrize("plan", PLANS, ids=name_of)
def test_a_fixed_dag_gives_the_logits_of_the_cpu(
    pair: tuple[Runner, Runner], plan: ReusePlan
) -> None:
    """With two decode steps that are launched before the tokens before them are known."""
    workload = prompt_workload(PROMPTS, 3)
    cpu, gpu = (executed(runner, workload, plan) for runner in pair)
    for request_id, logits in cpu.suffix_logits.items():
        assert torch.allclose(gpu.suffix_logits[request_id], logits, atol=2e-4)
    assert gpu.token_ids == cpu.token_ids


@pytest.fixture
def gpu(tmp_path: Path) -> Iterator[Runner]:
    loaded, _ = make_twins("llama")
    with Runner(loaded, tmp_path, TIERS, device=FakeCuda(), kv_capacity_tokens=2048) as runner:
        yield runner


def test_a_dependency_that_is_not_followed_is_seen(
    gpu: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What these tests can catch: without events between streams something must go wrong."""
    workload, plan = prompt_workload(PROMPTS, 3), plan_with("cachetune", 0.3, layer_group=1)
    monkeypatch.setitem(FakeStream.SLOW_S, "copy-in", 0.01)
    executed(gpu, workload, plan)
    monkeypatch.setattr(FakeStream, "follow", lambda self, mark: None)
    with pytest.raises(AssertionError, match="restore of host tensors"):
        executed(gpu, workload, plan)


def test_a_closed_runner_holds_no_memory_of_the_device(tmp_path: Path) -> None:
    """Not until garbage is collected: the next runner may have no room beside it."""
    tiers = (*TIERS, TierConfig("hbm", "device"))
    runner = Runner(
        make_twins("llama")[0], tmp_path, tiers, device=FakeCuda(), kv_capacity_tokens=2048
    )
    executed(runner, prompt_workload(PROMPTS, 3), plan_with("cachetune", 0.3), "hbm")
    gc.disable()
    try:
        slab, chunks = runner.stages.pool.slab, runner.store._catalog.on_device
        held = [weakref.ref(x) for x in (slab, slab.k, *chunks.values())]
        assert len(held) > 2
        del slab, chunks
        runner.device.graphs.clear()  # the simulated device keeps what it recorded
        runner.close()
        runner.close()
        assert not [x for x in held if x() is not None]
    finally:
        gc.enable()


def unannounced(result: RunResult) -> Counter[str]:
    """Host waits in the Chrome trace beyond the one that tells of each op's end, by name."""
    events = [e for e in to_chrome(result.timeline)["traceEvents"] if e.get("cat") == "sync"]
    ends = Counter(f"sync: end of {span.op.kind}" for span in result.timeline.spans)
    return Counter(event["name"] for event in events) - ends


@pytest.mark.parametrize("plan", [plan_with("cachetune", 0.3), plan_with("cacheblend", 0.3)])
def test_the_host_waits_for_nothing_on_the_path(gpu: Runner, plan: ReusePlan) -> None:
    """In the trace: one wait per op, by a thread that does nothing else; one per decode step."""
    workload = prompt_workload(PROMPTS, N_OUTPUT)
    device = gpu.device
    assert set(unannounced(served(gpu, workload, plan))) <= {"sync: rope table"}
    before = dict(device.host_waits)
    once = {"clock", "executor", "rope table", "ingest", "warm-up of a graph", "capture"}
    assert once == {why for why in before if not why.startswith("end of")}
    result = served(gpu, workload, plan)
    assert not unannounced(result)
    waits = result.timeline.waits
    assert Counter(w.stream for w in waits) == Counter(s.op.stream for s in result.timeline.spans)
    assert all(result.timeline.start_ns <= w.start_ns <= w.end_ns for w in waits)
    n_steps = len({s.op.op_id for s in result.timeline.spans if s.op.kind == "decode"})
    assert sum(w.why == "end of decode" for w in waits) == n_steps > 0
    after = dict(device.host_waits)
    changed = {k for k, v in after.items() if v != before[k]}
    assert {k for k in changed if not k.startswith("end of")} == {"clock", "executor"}
    assert device.on_wait is None


def test_a_value_that_is_read_on_the_path_shows_in_the_trace(
    gpu: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the count above can catch: one `.item()` in the head of every request."""
    workload, plan = prompt_workload(PROMPTS, N_OUTPUT), plan_with("cachetune", 0.3)
    served(gpu, workload, plan)
    right, device = Transformer.logits, gpu.device

    def reading(self: Transformer, hidden: torch.Tensor) -> torch.Tensor:
        hidden[0, 0, 0].item()
        return right(self, hidden)

    def read(name: str) -> None:
        with device.waiting(name):
            pass

    monkeypatch.setattr(Transformer, "logits", reading)
    monkeypatch.setattr(OnDevice, "on_read", read)
    result = served(gpu, workload, plan)
    assert unannounced(result) == {"sync: item": len(PROMPTS)}


def test_what_the_simulated_gpu_refuses() -> None:
    """Reads of the host, masks as indexes, and host indexes among tensors of the device."""
    x, at = there(torch.arange(4.0)), torch.tensor([1, 2])
    for wrong in (
        lambda: x[0].item(),
        lambda: int(x[1]),
        lambda: bool((x > 1).any()),
        lambda: x.cpu(),
        lambda: x[x > 1],
        lambda: x[at],
        lambda: torch.equal(x, x),
    ):
        with pytest.raises(AssertionError):
            wrong()
    assert type(x[there(at)]) is type(x)


def test_pinned_pages_serve_the_reads(gpu: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    pages = FakeCuda.host_pages
    monkeypatch.setattr(FakeCuda, "host_pages", lambda d, n: made.append(n) or pages(d, n))
    gpu.store._reader._pool._pages = gpu.device.host_pages
    executed(gpu, prompt_workload(PROMPTS, 3), plan_with("full_reuse"))
    assert made and all(n % 4096 == 0 for n in made)


def test_chunks_in_ram_are_copied_from_where_they_lie(gpu: Runner) -> None:
    """No staging, and no byte more than the rows that are loaded."""
    workload, plan = prompt_workload(PROMPTS, 2), plan_with("cachetune", 0.3)
    result = served(gpu, workload, plan, "dram")
    pool = gpu.store._reader._pool
    assert not pool._free and not pool._lent
    loads = sum(s.op.n_bytes for s in result.timeline.spans if s.op.kind == "load")
    assert gpu.device.uploaded_bytes == loads > 0  # type: ignore[attr-defined]
    served(gpu, workload, plan, "file")
    assert pool._free


def test_bits_that_flip_in_ram_are_found_before_they_are_copied(gpu: Runner) -> None:
    workload, plan = prompt_workload([PROMPTS[0]], 4), plan_with("cachetune", 0.3)
    want = served(gpu, workload, plan, "dram").token_ids
    index = gpu.index(plan, "dram")
    key = next(iter(gpu.store._catalog.ram))
    gpu.store._catalog.ram[key][3000] ^= 8
    result = gpu.serve(workload, plan, index)
    assert result.n_read_failures >= 1 and result.n_fallbacks == 1
    assert len(result.token_ids[0]) == len(want[0])


def test_a_chunk_evicted_during_its_copy_still_arrives(
    gpu: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload, plan = prompt_workload([PROMPTS[0]], 4), plan_with("cachetune", 0.3)
    want = served(gpu, workload, plan, "dram").token_ids
    index, usual = gpu.index(plan, "dram"), gpu.store.read

    def read(key: str, start: int, stop: int, *args: Any) -> Any:
        rows = usual(key, start, stop, *args)
        if stop == gpu.spec.n_layers:
            gpu.store.discard(key)
        return rows

    monkeypatch.setattr(gpu.store, "read", read)
    monkeypatch.setitem(FakeStream.SLOW_S, "copy-in", 0.01)
    result = gpu.serve(workload, plan, index)
    assert result.token_ids == want and not result.n_read_failures
    assert not gpu.store._catalog.ram


def test_ranges_that_touch_are_one_copy() -> None:
    assert joined([(0, 4), (4, 4), (12, 2), (14, 0), (14, 1)]) == [(0, 8), (12, 3)]


class TestGraphs:
    """Decode steps under graphs."""

    def test_steps_are_replayed(self, gpu: Runner) -> None:
        workload = prompt_workload(PROMPTS, 6)
        result = served(gpu, workload, plan_with("cachetune", 0.3))
        graphs = gpu.stages.graphs
        assert graphs is not None and not graphs.fallbacks
        steps = sum(s.op.kind == "decode" for s in result.timeline.spans)
        assert sum(graphs.replays.values()) == steps > 0
        assert set(graphs.replays) <= {1, 2, 4}

    def test_steps_of_a_fixed_dag_are_replayed_too(self, gpu: Runner) -> None:
        """Or calibration would time another decode than the one that serves."""
        executed(gpu, prompt_workload(PROMPTS, 3), plan_with("cachetune", 0.3))
        graphs = gpu.stages.graphs
        assert graphs is not None and sum(graphs.replays.values()) == 2 and not graphs.fallbacks

    def test_a_graph_is_captured_once_and_serves_other_prompts(self, gpu: Runner) -> None:
        plan = plan_with("full_recompute")
        served(gpu, prompt_workload(PROMPTS, 5), plan)
        n = len(gpu.device.graphs)  # type: ignore[attr-defined]
        others = [[tokens(30, 7), tokens(11, 8)], [tokens(61, 9), tokens(5, 10)]]
        workload = prompt_workload(others, 5)
        on_gpu = served(gpu, workload, plan)
        assert len(gpu.device.graphs) == n  # type: ignore[attr-defined]
        with Runner(gpu.loaded, gpu.store.root.parent / "cpu", TIERS) as cpu:
            assert served(cpu, workload, plan).token_ids == on_gpu.token_ids

    def test_rows_are_counted_without_the_filling(self, gpu: Runner) -> None:
        workload = prompt_workload(PROMPTS, 4)
        served(gpu, workload, plan_with("full_recompute"))
        gpu.transformer.reset_counts()
        served(gpu, workload, plan_with("full_recompute"))
        prompts = sum(len(part) for prompt in PROMPTS for part in prompt)
        assert gpu.transformer.rows_by_layer == [prompts + 3 * len(PROMPTS)] * gpu.spec.n_layers

    def test_kv_outside_the_pool_falls_back_with_a_reason(self, gpu: Runner) -> None:
        workload = prompt_workload(PROMPTS, 4)
        plan = plan_with("cachetune", 0.3)
        want = served(gpu, workload, plan).token_ids
        gpu._pool._free = [(0, 192)]  # type: ignore[union-attr]
        assert served(gpu, workload, plan).token_ids == want
        assert gpu.stages.graphs is not None
        assert gpu.stages.graphs.fallbacks["KV outside the pooled buffer"] > 0

    def test_what_is_not_captured_runs_as_it_is(self, gpu: Runner) -> None:
        workload, plan = prompt_workload(PROMPTS, 4), plan_with("full_recompute")
        want = served(gpu, workload, plan).token_ids
        graphs = gpu.stages.graphs
        assert graphs is not None
        graphs._graphs.clear()
        graphs._enabled = False
        assert served(gpu, workload, plan).token_ids == want
        assert graphs.fallbacks["off"] > 0

    def test_every_batch_has_a_bucket(self) -> None:
        assert list(BUCKETS) == sorted(BUCKETS) and BUCKETS[0] == 1


def test_slots_are_lent_and_joined_again(gpu: Runner) -> None:
    pool = SlabPool(gpu.spec, 640, [(gpu.spec.n_layers, FakeCuda())])
    first, second, third = (pool.take(n) for n in (100, 64, 200))
    assert [b.base for b in (first, second, third)] == [0, 128, 192]
    assert pool.take(400).base is None and pool.n_outside == 1
    pool.give_back(second)
    pool.give_back(first)
    assert pool._free[0] == (0, 192)
    assert pool.take(192).base == 0
    pool.give_back(third)
    assert pool.n_free_slots == 640 - 192
    assert pool.slab.k[0].shape[1] == 640 + SCRATCH_SLOTS


def test_rows_may_move_within_a_batch() -> None:
    rows = Rows.of(None, 0, torch.tensor([1, 2, 5]))  # type: ignore[arg-type]
    moved = rows.moved(7)
    assert (moved.start, moved.stop, moved.n) == (7, 10, 3)
    assert moved.plans is rows.plans


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:", "cuda:99", "cpu:1"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(DeviceError, match="--device must be cpu, cuda or cuda:<i>"):
        open_device(name)


def test_the_cpu_is_a_device() -> None:
    assert open_device("cpu").kind == "cpu" and isinstance(open_device("cpu"), Device)


def test_with_the_triton_kernels_themselves() -> None:
    """Interpreted, in a process of their own: what the launchers are given is what they take."""
    needs_interpreter()
    script = Path(__file__).with_name("run_interpreted.py")
    paths = os.pathsep.join([str(script.parent), *(p for p in sys.path if p)])
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    run = subprocess.run(
        [sys.executable, "-P", str(script)], capture_output=True, text=True, env=env, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = dict(line.split("\t", 1) for line in run.stdout.splitlines() if "\t" in line)
    assert set(found.values()) == {"ok"}
    assert set(found) == {"cacheblend native", "cachetune native", "cachetune int4", "kernels"}
