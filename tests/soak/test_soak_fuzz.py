"""Random workloads under random plans: on random simulated machines, and for real on the CPU."""

from __future__ import annotations

import random
import shutil
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cachetune.core.hardware import Tier
from cachetune.core.invariants import check
from cachetune.core.ops import Outcome
from cachetune.core.plan import RatioRule, ReusePlan
from cachetune.core.workload import Workload
from cachetune.runtime.loaded_model import LoadedModel
from cachetune.runtime.runner import Runner
from support import COEFFICIENTS_S, make_tier

from ..runtime import model_cases as cases
from ..simulator import test_metamorphic as metamorphic
from .kill_cases import FORMATS
from .soak_log import Counts, Soak

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]

IDLE_NS = 500_000_000
"""INV-8 for real: how long a busy machine may keep the loop from running."""

TIE = 1e-3
"""Logits of a random model spread over tens; the order of closer ones is rounding."""

SELECTORS = ("low_pass", "high_pass", "spread_high_pass", "chunk_start", "random")
EXACT: tuple[dict[str, Any], ...] = (
    {"policy": "full_recompute"},
    {"policy": "prefix_cache"},
    {"policy": "epic", "epic_tokens": 1000},
    {"policy": "cachetune", "ratio": 1.0},
    {"policy": "cacheblend", "ratio": 1.0},
)
"""Plans that must give the tokens of a full prefill (INV-10)."""


def random_machine(draw: random.Random) -> tuple[dict[str, Tier], dict[str, float]]:
    """Tiers from fast to slow, and costs from free to a thousand times the usual ones."""
    tiers = {
        name: make_tier(
            draw.choice([0.05e9, 0.3e9, 1e9, 7e9]),
            draw.choice([None, 0.1e9, 2e9]),
            draw.choice([0.0, 1e-7, 1e-5]),
        )
        for name in ("dram", "disk")
    }
    costs = {
        name: usual * draw.choice([0.0, 1.0, 1.0, 10.0, 1000.0])
        for name, usual in COEFFICIENTS_S.items()
        if usual
    }
    flop_s = draw.choice([0.0, 1e-12, 1e-10])
    costs |= {"prefill.flop": flop_s, "prefill.small_flop": flop_s * draw.choice([1, 3])}
    costs |= {"prefill.attention_flop": flop_s, "decode.attention_flop": flop_s}
    return tiers, costs


def simulated_round(seed: int) -> Counts:
    """Once as it is, once with a load that fails."""
    tiers, costs = random_machine(random.Random(f"machine {seed}"))
    timeline = metamorphic.fuzz(seed, {}, tiers, costs)
    loads = [s.op for s in timeline.spans if s.op.kind == "load"]
    n_spans = len(timeline.spans)
    if loads:
        load = random.Random(seed).choice(loads)
        failed = {load.op_id: Outcome(failed_chunks=load.chunks[:1])}
        n_spans += len(metamorphic.fuzz(seed, failed, tiers, costs).spans)
    n_requests = len(timeline.requests) * (2 if loads else 1)
    return {"requests": n_requests, "spans": n_spans, "failed_loads": min(1, len(loads))}


def random_plan(draw: random.Random) -> tuple[ReusePlan, bool]:
    """A plan, and whether it is exact; every second one is."""
    plan = metamorphic.random_plan(draw).replace(selector=draw.choice(SELECTORS))
    if draw.random() < 0.5:
        return plan, plan.policy in ("full_recompute", "prefix_cache")
    changes = dict(draw.choice(EXACT))
    if changes.pop("ratio", None):
        changes["rules"] = (RatioRule(ratios=(1.0,) * draw.randint(1, 3)),)
    return plan.replace(**changes), True


def random_workload(draw: random.Random) -> Workload:
    """Few short requests with token ids; some come while others are served."""
    workload = metamorphic.random_workload(draw, draw.randint(2, 6), cases.VOCAB)
    stretch = draw.choice([1, 1, 50])
    requests = tuple(
        r.replace(arrival_ns=r.arrival_ns * stretch, request_id=number)
        for number, r in enumerate(workload.requests)
    )
    return workload.replace(requests=requests)


def parts_of(workload: Workload, number: int) -> list[tuple[int, ...]]:
    """Token ids of a prompt: its chunks, then its suffix."""
    request = workload.requests[number]
    ids = [workload.contents[c].token_ids for c in request.chunks]
    return [i for i in (*ids, request.suffix_ids) if i is not None]


@torch.inference_mode()
def is_tie(twin: Any, prompt: list[int], made: list[int], expected: list[int]) -> bool:
    """Whether the first tokens that differ have logits so close that rounding decides."""
    at = next(i for i, (a, b) in enumerate(zip(made, expected, strict=True)) if a != b)
    logits = twin(torch.tensor([[*prompt, *expected[:at]]])).logits[0, -1]
    return float((logits[made[at]] - logits[expected[at]]).abs()) < TIE


def compare_alone(
    runner: Runner, twin: Any, workload: Workload, plan: ReusePlan, exact: bool, made: Any
) -> Counts:
    """Tokens of each request against a run alone: of a full prefill if the plan is exact."""
    alone_plan = ReusePlan(policy="full_recompute") if exact else plan
    index = runner.index(plan)
    counts: Counts = {"compared_exact": 0, "compared_reused": 0, "near_ties": 0}
    for number, request in enumerate(workload.requests):
        lone = request.replace(arrival_ns=0)
        result = runner.serve(workload.replace(requests=(lone,)), alone_plan, index)
        expected = result.token_ids[request.request_id]
        counts["compared_exact" if exact else "compared_reused"] += len(expected)
        if made[request.request_id] != expected:
            prompt = [t for part in parts_of(workload, number) for t in part]
            found = made[request.request_id]
            assert exact and is_tie(twin, prompt, found, expected), (plan, number, found, expected)
            counts["near_ties"] += 1
    return counts


def real_round(folder: Path, loaded: LoadedModel, twin: Any, seed: int) -> Counts:
    """Serve a workload, check every law, compare with runs alone."""
    draw = random.Random(f"real {seed}")
    workload, (plan, exact) = random_workload(draw), random_plan(draw)
    before = set(threading.enumerate())
    tokens = 16 * draw.randint(32, 120)
    store, stored = folder / str(seed), FORMATS[seed % len(FORMATS)]
    if stored != "native":  # what was stored is not exact: compare with what else reads it
        exact = plan.policy == "full_recompute"
    with Runner(
        loaded.stored_as(stored), store, cases.TIERS, kv_capacity_tokens=tokens, seed=seed
    ) as runner:
        runner.prepare(workload, plan, draw.choice(["dram", "file"]))
        chunks = parts_of(workload, 0)[:-1]
        if chunks and draw.random() < 0.3:
            order = plan.selector if plan.policy != "epic" else "chunk_start"
            runner.ingestor.ingest_prefix(chunks, selector=order, tier="file")
        index = runner.index(plan)
        result = runner.serve(workload, plan, index)
        check(result.timeline, workload, idle_ns=IDLE_NS)
        index.check_integrity()
        assert (result.n_fallbacks, result.n_read_failures) == (0, 0)
        for request in workload.requests:
            assert len(result.token_ids[request.request_id]) == request.output_tokens
        assert len({id(b) for b in runner._pool._free}) == len(runner._pool._free)
        counts: Counts = {
            "requests": len(workload.requests),
            "spans": len(result.timeline.spans),
            "tokens_reused": sum(result.n_reused_tokens.values()),
            "lossy_rounds": int(stored != "native"),
            "batch_max": max(len(s.op.request_ids) for s in result.timeline.spans),
        }
        if exact or plan.policy != "cacheblend":  # which selects by values that rounding may move
            counts |= compare_alone(runner, twin, workload, plan, exact, result.token_ids)
    assert set(threading.enumerate()) == before
    shutil.rmtree(store)
    return counts


def test_fuzz_simulated(soak: Soak) -> None:
    soak.run("fuzz_simulated", "tests/soak/test_soak_fuzz.py -k simulated", simulated_round)


def test_fuzz_real(soak: Soak, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    loaded, twin = cases.make_twins("llama")
    one_round = partial(real_round, tmp_path, loaded, twin)
    soak.run("fuzz_real", "tests/soak/test_soak_fuzz.py -k real", one_round)
