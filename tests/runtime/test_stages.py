"""Pipeline stages: the same logits on two devices, each with streams and KV of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cachetune.core.engine import schedule_of
from cachetune.core.errors import CapacityError, PlanError
from cachetune.core.executor import execute, serve
from cachetune.core.invariants import check
from cachetune.core.ops import Schedule
from cachetune.core.plan import ReusePlan
from cachetune.runtime.device import Device, DeviceError
from cachetune.runtime.loaded_model import LoadedModel
from cachetune.runtime.runner import Runner
from cachetune.runtime.stages import Stages
from cachetune.simulator.executor import SimExecutor
from fake_cuda import FakeCuda
from support import make_profile

from ..runtime.test_device_paths import PROMPTS, executed, name_of, served
from .model_cases import TIERS, make_twins, plan_with, prompt_workload

PLANS = [
    plan_with("full_recompute", layer_group=1),
    plan_with("cachetune", 0.3),
    plan_with("cachetune", 0.5, 0.2, layer_group=1, n_io_workers=2),
    plan_with("cachetune", 0.3, load_order="chunk"),
    plan_with("cachetune", 0.3, restore_stream="compute", prefill_chunk_tokens=16),
    plan_with("cacheblend", 0.3, layer_group=1),
    plan_with("full_reuse"),
]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return make_twins("llama")[0]


@pytest.fixture(scope="module")
def one(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    with Runner(loaded, tmp_path_factory.mktemp("one"), TIERS) as runner:
        yield runner


@pytest.fixture(scope="module", params=["cpu", "fake"])
def several(
    request: pytest.FixtureRequest,
    loaded: LoadedModel,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Runner]:
    folder = tmp_path_factory.mktemp("several")
    with pytest.MonkeyPatch.context() as patch:
        device = "cpu"
        if request.param == "fake":
            device = FakeCuda()  # type: ignore[assignment]
            patch.setattr(
                "cachetune.runtime.runner.stage_devices",
                lambda first, n: [first, *(FakeCuda(i) for i in range(1, n))],
            )
        with Runner(loaded, folder, TIERS, device=device, kv_capacity_tokens=2048) as runner:
            yield runner


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("plan", PLANS, ids=name_of)
def test_stages_give_the_logits_of_one_device(
    one: Runner, several: Runner, plan: ReusePlan, n: int
) -> None:
    workload = prompt_workload(PROMPTS, 3)
    want = executed(one, workload, plan)
    staged = plan.replace(pipeline_stages=n)
    got = executed(several, workload, staged)
    for request_id, logits in want.suffix_logits.items():
        assert torch.allclose(got.suffix_logits[request_id], logits, atol=1e-5)
    assert got.token_ids == want.token_ids
    streams = got.timeline.by_stream()
    assert {name.split(":")[0] for name in streams} == {str(i) for i in range(n)}
    for stage in range(n):
        layers = {
            layer
            for spans in streams.values()
            for s in spans
            if s.op.device == stage and s.op.kind in ("load", "restore", "prefill", "decode")
            for layer in range(s.op.layer_start, s.op.layer_stop)
        }
        start, stop = several.stages.ranges[stage]
        assert layers == set(range(start, stop))


@pytest.mark.parametrize("plan", PLANS[:3], ids=name_of)
def test_serve_over_stages(one: Runner, several: Runner, plan: ReusePlan) -> None:
    workload = prompt_workload(PROMPTS, 4, gap_ns=100_000)
    want = served(one, workload, plan)
    got = served(several, workload, plan.replace(pipeline_stages=2))
    assert got.token_ids == want.token_ids
    steps = [s for s in got.timeline.spans if s.op.kind == "decode"]
    assert {(s.op.device, s.op.passes_on) for s in steps} == {(0, True), (1, False)}


def test_each_stage_has_the_kv_of_its_layers(several: Runner) -> None:
    several.use_stages(2)
    buffer = several._pool.take(100)
    assert isinstance(buffer.k, list) and len(buffer.k) == several.spec.n_layers
    homes = [layer.untyped_storage().data_ptr() for layer in buffer.k]
    assert [homes.index(h) for h in homes] == [0, 0, 2, 2]
    several._pool.give_back(buffer)


@pytest.mark.parametrize("load_order", ["layer", "chunk"])
def test_the_simulator_runs_the_same_ops(one: Runner, several: Runner, load_order: str) -> None:
    """One decider: the stages' ops on the simulated executor, streams and order alike."""
    workload = prompt_workload(PROMPTS, 3)
    plan = plan_with("cachetune", 0.3, layer_group=1, load_order=load_order, pipeline_stages=2)
    real = executed(several, workload, plan)
    ops = [s.op for s in sorted(real.timeline.spans, key=lambda s: s.seq)]
    simulated = execute(Schedule.of(ops), SimExecutor(make_profile(model=one.spec)))
    check(simulated, schedule=Schedule.of(ops))
    by_stream = [
        {name: [s.op.op_id for s in spans] for name, spans in t.by_stream().items()}
        for t in (real.timeline, simulated)
    ]
    assert by_stream[0] == by_stream[1]


def test_stages_work_at_the_same_time_in_the_simulator(one: Runner) -> None:
    """Two prompts take less over two stages than one after the other, and stages overlap."""
    from cachetune.core.block_pool import BlockPool
    from cachetune.core.engine import Engine
    from support import make_index

    workload = prompt_workload(PROMPTS * 2, 2)
    took = {}
    for n in (1, 2):
        plan = plan_with("full_recompute", layer_group=1, pipeline_stages=n)
        engine = Engine(workload, one.spec, plan, make_index(workload), BlockPool(1000))
        timeline = serve(workload, engine, SimExecutor(make_profile(model=one.spec)))
        check(timeline, workload, idle_ns=0)
        took[n] = timeline.makespan_ns
    assert took[2] < 0.8 * took[1]


def test_default_plans_lower_as_before(one: Runner) -> None:
    workload = prompt_workload(PROMPTS)
    plan = plan_with("cachetune", 0.3)
    one.prepare(workload, plan, "dram")
    index = one.index(plan)
    for request in workload.requests:
        ops = schedule_of(workload, request, one.spec, plan, index)[1]
        assert {op.device for op in ops} == {0} and not any(op.parts for op in ops)
        assert [op.op_id for op in ops] == list(range(len(ops)))


def no_room(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_refused_number_of_stages_leaves_the_runner_as_it_was(
    several: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload, plan = prompt_workload(PROMPTS, 3), plan_with("cachetune", 0.3, pipeline_stages=2)
    want = executed(several, workload, plan).token_ids
    stages = several.stages
    with pytest.raises(PlanError, match="5 stages, 4 layers"):
        executed(several, workload, plan.replace(pipeline_stages=5))
    assert several.stages is stages and stages.pool
    with monkeypatch.context() as patch:
        patch.setattr("cachetune.runtime.runner.stage_devices", no_devices)
        with pytest.raises(DeviceError):
            several.use_stages(3)
    assert several.stages is stages and stages.pool
    usual = Stages._pool
    with monkeypatch.context() as patch:
        patch.setattr(
            Stages, "_pool", lambda s, n: (usual if len(s.devices) == 2 else no_room)(s, n)
        )
        with pytest.raises(CapacityError, match="weights and KV must fit"):
            several.use_stages(3)
    assert len(several.stages.devices) == 2
    assert several.transformer is several.ingestor.transformer is several.stages.encoder
    assert executed(several, workload, plan).token_ids == want


def no_devices(first: Device, n: int) -> list[Device]:
    raise DeviceError("--device must be there", values=f"{n}")


def test_more_stages_than_layers_are_refused(loaded: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="pipeline_stages must not exceed"):
        Runner(loaded, tmp_path, TIERS, pipeline_stages=5)
