"""Rows of several requests through the layers at once: the values of one request after another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cachetune.core.plan import ReusePlan
from cachetune.runtime.chunk_store import ChunkStore
from cachetune.runtime.runner import Runner
from cachetune.runtime.session import Session
from cachetune.simulator.executor import SimExecutor
from fake_cuda import FakeCuda
from support import make_profile

from .model_cases import TIERS, make_twins, plan_with, prompt_workload, tokens
from .test_device_paths import PROMPTS, executed, name_of, served

PLANS = [
    plan_with("full_recompute"),
    plan_with("cachetune", 0.3),
    plan_with("cachetune", 0.5, 0.2, layer_group=1),
    plan_with("cachetune", 0.3, load_order="chunk"),
    plan_with("cachetune", 0.3, pipeline_stages=2),
    plan_with("epic", epic_tokens=8),
    plan_with("cacheblend", 0.3),
]


@pytest.fixture(scope="module", params=["llama", "mistral-window", "fake"])
def runner(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Runner]:
    fake = request.param == "fake"
    loaded, _ = make_twins("llama" if fake else request.param)
    device = FakeCuda() if fake else "cpu"
    folder = tmp_path_factory.mktemp("batch")
    with pytest.MonkeyPatch.context() as patch:
        if fake:
            patch.setattr(
                "cachetune.runtime.runner.stage_devices",
                lambda first, n: [first, *(FakeCuda(i) for i in range(1, n))],
            )
        with Runner(loaded, folder, TIERS, device=device, kv_capacity_tokens=2048) as runner:
            yield runner


@pytest.mark.parametrize("plan", PLANS, ids=name_of)
def test_a_batch_is_exact(runner: Runner, plan: ReusePlan) -> None:
    workload = prompt_workload(PROMPTS, 3)
    alone = executed(runner, workload, plan)
    together = executed(runner, workload, plan.replace(prefill_batch=3))
    prefills = [s.op for s in together.timeline.spans if s.op.kind == "prefill"]
    assert all(len(op.request_ids) == 3 for op in prefills)
    for request_id, logits in alone.suffix_logits.items():
        assert torch.allclose(together.suffix_logits[request_id], logits, atol=2e-4)
    assert together.token_ids == alone.token_ids
    rows = [
        sum(s.op.n_tokens * s.op.n_layers for s in result.timeline.spans if s.op.kind == "prefill")
        for result in (alone, together)
    ]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("plan", PLANS, ids=name_of)
@pytest.mark.parametrize("piece", [8192, 64])
def test_serving_in_batches(runner: Runner, plan: ReusePlan, piece: int) -> None:
    prompts = [*PROMPTS, [tokens(21, 5), tokens(8, 6)], PROMPTS[1]]
    workload = prompt_workload(prompts, 3)
    plan = plan.replace(prefill_chunk_tokens=piece)
    alone = served(runner, workload, plan)
    together = served(runner, workload, plan.replace(prefill_batch=4))
    assert together.token_ids == alone.token_ids
    sizes = [len(s.op.request_ids) for s in together.timeline.spans if s.op.kind == "prefill"]
    assert max(sizes) <= 4
    if piece == 8192:
        assert max(sizes) > 1
    joined = [s.op for s in together.timeline.spans if s.op.parts]
    assert all(op.n_tokens <= piece for op in joined)


def test_a_chunk_that_fails_leaves_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request that lost a chunk starts again; those of its batch go on."""
    loaded, _ = make_twins("llama")
    with Runner(loaded, tmp_path, TIERS) as runner:
        workload = prompt_workload([[tokens(40, i), tokens(12, i + 9)] for i in range(5)], 3)
        plan = plan_with("cachetune", 0.3, prefill_batch=3)
        want = served(runner, workload, plan_with("full_recompute")).token_ids
        plan = plan.replace(rules=plan_with("cachetune", 1.0).rules)
        runner.prepare(workload, plan, "file")
        plan = plan_with("cachetune", 0.0, 0.0, prefill_batch=3)
        index = runner.index(plan, "file")
        bad = runner.ingestor.kept(workload.requests[3].chunks[0], "low_pass")
        assert bad is not None
        read = ChunkStore.read

        def fails(self: ChunkStore, key: str, *args: object) -> object:
            if key == bad.key:
                from cachetune.runtime.chunk_store import ChunkCorrupt

                raise ChunkCorrupt(key, "flipped")
            return read(self, key, *args)  # type: ignore[arg-type]

        enter, entered = Session.enter, []

        def noted(self: Session, *args: object) -> object:
            entered.append(self.failed)
            return enter(self, *args)  # type: ignore[arg-type]

        monkeypatch.setattr(ChunkStore, "read", fails)
        monkeypatch.setattr(Session, "enter", noted)
        result = runner.serve(workload, plan, index)
        batches = [s.op.request_ids for s in result.timeline.spans if s.op.parts]
        assert any(3 in batch for batch in batches)  # the first requests begin by themselves
        assert entered and not any(entered)  # nothing is computed in vain
        assert result.n_fallbacks == 1
        assert result.token_ids == want


def test_the_simulator_takes_batches(runner: Runner) -> None:
    from cachetune.core.block_pool import BlockPool
    from cachetune.core.engine import Engine
    from cachetune.core.executor import serve
    from cachetune.core.invariants import check
    from support import make_index

    workload = prompt_workload(PROMPTS * 3, 2)
    spec = runner.spec
    for batch in (1, 3):
        plan = plan_with("cachetune", 0.3, prefill_batch=batch, n_io_workers=2)
        engine = Engine(workload, spec, plan, make_index(workload, model=spec), BlockPool(1000))
        timeline = serve(workload, engine, SimExecutor(make_profile(model=spec)))
        check(timeline, workload, idle_ns=0)
        assert engine.n_open == 0
        assert any(s.op.parts for s in timeline.spans) == (batch > 1)
