"""Laws that hold whatever the numbers, and random workloads under random plans."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import pytest
from cachetune.core.block_pool import BlockPool
from cachetune.core.engine import Engine, schedule_of
from cachetune.core.executor import execute, serve
from cachetune.core.generators import rag_workload
from cachetune.core.hardware import HardwareProfile, Tier
from cachetune.core.invariants import check
from cachetune.core.metrics import littles_law, per_request, summary
from cachetune.core.ops import Outcome, Schedule
from cachetune.core.plan import RatioRule, ReusePlan
from cachetune.core.timeline import Timeline
from cachetune.core.workload import Workload
from cachetune.simulator.executor import SimExecutor
from support import (
    COEFFICIENTS_S,
    make_entry,
    make_index,
    make_model,
    make_profile,
    make_tier,
    timetable,
)

POLICIES = ("full_recompute", "prefix_cache", "full_reuse", "cacheblend", "epic", "cachetune")


def random_plan(draw: random.Random) -> ReusePlan:
    ratios = sorted((draw.random() for _ in range(draw.randint(1, 3))), reverse=True)
    knobs: dict[str, Any] = dict(
        policy=draw.choice(POLICIES),
        rules=(RatioRule(ratios=tuple(ratios), load_exact=draw.random() < 0.8),),
        epic_tokens=draw.randint(0, 20),
        layer_group=draw.randint(1, 5),
        look_ahead=draw.randint(1, 3),
        load_order=draw.choice(["layer", "chunk"]),
        restore_stream=draw.choice(["restore", "compute"]),
        n_io_workers=draw.randint(1, 4),
        request_bytes=4096 * draw.randint(1, 8),
        prefill_chunk_tokens=draw.randint(16, 300),
        max_num_seqs=draw.randint(1, 6),
    )
    return ReusePlan(**knobs)


def random_workload(
    draw: random.Random, n_requests: int = 12, vocab_size: int | None = None
) -> Workload:
    return rag_workload(
        "fuzz",
        draw.randrange(1000),
        n_requests=n_requests,
        n_contents=8,
        chunk_tokens=(1, 90),
        chunks_per_request=draw.randint(0, 5),
        suffix_tokens=(1, 20),
        output_tokens=(1, 9),
        rate_rps=draw.choice([None, 3e3, 1e5]),
        vocab_size=vocab_size,
    )


def lone(profile: HardwareProfile, workload: Workload, plan: ReusePlan) -> Timeline:
    """The first request alone, as a fixed schedule."""
    index = make_index(workload, tier="disk")
    _, ops = schedule_of(workload, workload.requests[0], profile.model, plan, index)
    return execute(Schedule.of(ops), SimExecutor(profile))


def served(profile: HardwareProfile, workload: Workload, plan: ReusePlan) -> Timeline:
    engine = Engine(workload, profile.model, plan, make_index(workload), BlockPool(40))
    return serve(workload, engine, SimExecutor(profile))


@pytest.mark.parametrize("seed", range(20))
def test_more_bandwidth_never_hurts_a_lone_request(seed: int):
    draw = random.Random(seed)
    workload, plan = random_workload(draw, 1), random_plan(draw)
    link, worker = draw.uniform(0.1e9, 2e9), draw.uniform(0.1e9, 2e9)
    more = draw.uniform(1.0, 3.0)
    ends = []
    for factor in (1.0, more):
        tiers = {"disk": make_tier(link * factor, worker * factor, 1e-7)}
        ends.append(lone(make_profile(tiers=tiers), workload, plan).end_ns)
    n_loads = 4 * len(workload.requests[0].chunks) + 4
    assert ends[1] <= ends[0] + n_loads, f"rounding allows {n_loads} ns, seed {seed}"


@pytest.mark.parametrize("seed", range(5))
def test_an_unused_tier_changes_nothing(seed: int):
    draw = random.Random(seed)
    workload, plan = random_workload(draw), random_plan(draw)
    tiers = {"dram": make_tier(0.7e9, 0.4e9)}
    one = served(make_profile(tiers=tiers), workload, plan)
    two = served(make_profile(tiers={"aaa": make_tier(1.0), **tiers}), workload, plan)
    assert one == two


@pytest.mark.parametrize("factor", [2, 8])
@pytest.mark.parametrize("seed", range(5))
def test_scaling_all_costs_and_gaps_scales_all_times(seed: int, factor: int):
    """A byte takes a whole number of nanoseconds in both runs, so that nothing is rounded."""
    draw = random.Random(seed)
    workload = random_workload(draw)
    plan = random_plan(draw).replace(n_io_workers=1)
    slower = tuple(r.replace(arrival_ns=factor * r.arrival_ns) for r in workload.requests)
    scaled_workload = workload.replace(requests=slower)
    one, scaled = (
        served(
            make_profile(
                coefficients_s={name: k * value for name, value in COEFFICIENTS_S.items()},
                tiers={"dram": make_tier(1e9 / k, latency_s=k * 1e-7)},
            ),
            requests,
            plan,
        )
        for k, requests in ((1, workload), (factor, scaled_workload))
    )
    assert timetable(scaled) == [(i, factor * a, factor * b) for i, a, b in timetable(one)]
    before, after = per_request(one, workload), per_request(scaled, scaled_workload)
    assert [m.ttft_ms for m in after] == pytest.approx([factor * m.ttft_ms for m in before])


def fuzz(
    seed: int,
    outcomes: dict[int, Outcome],
    tiers: Mapping[str, Tier] | None = None,
    coefficients_s: Mapping[str, float] | None = None,
) -> Timeline:
    """A random workload under a random plan, checked against every law there is.

    With `tiers` and `coefficients_s`, on that machine instead of the usual one.
    """
    draw = random.Random(seed)
    workload, plan = random_workload(draw), random_plan(draw)
    model = make_model(n_layers=draw.choice([1, 3, 4, 8]), sliding_window=draw.choice([None, 16]))
    costs = {"dispatch.gap": draw.choice([0.0, 5e-9]), **(coefficients_s or {})}
    profile = make_profile(model=model, tiers=tiers, coefficients_s=costs)
    index = make_index(workload, tier=draw.choice(["dram", "disk"]), model=model)
    for request in draw.sample(workload.requests, 3):
        if len(request.chunks) > 1:
            before, content = request.chunks[:1], request.chunks[1]
            n_tokens = workload.contents[content].n_tokens
            index.add(make_entry(content, n_tokens, chain=before, model=model))
    engine = Engine(workload, model, plan, index, BlockPool(draw.randint(40, 120)))
    sim = SimExecutor(profile, seed=seed, noise=draw.choice([0.0, 0.3]), outcomes=outcomes)
    timeline = serve(workload, engine, sim)
    check(timeline, workload, idle_ns=0)
    index.check_integrity()
    engine.blocks.check_integrity()
    assert engine.blocks.n_free == engine.blocks.n_blocks
    assert engine.n_fallbacks == len(outcomes)
    assert littles_law(timeline, workload).error < 1e-9
    assert 0 <= summary(timeline, workload)["reuse_ratio"] <= 1
    return timeline


@pytest.mark.parametrize("seed", range(20))
def test_fuzz_keeps_the_invariants(seed: int):
    """Once as it is, once with a load that fails."""
    try:
        loads = [s.op for s in fuzz(seed, {}).spans if s.op.kind == "load"]
        if loads:
            load = random.Random(seed).choice(loads)
            fuzz(seed, {load.op_id: Outcome(failed_chunks=load.chunks[:1])})
    except Exception as e:
        name = f"test_fuzz_keeps_the_invariants[{seed}]"
        e.add_note(f"replay: pytest 'tests/simulator/test_metamorphic.py::{name}'")
        raise
