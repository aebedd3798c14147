"""Laws of the serving simulator on random workloads, policies and machines."""

from __future__ import annotations

import random
from dataclasses import fields, replace

import numpy as np
import pytest
from cachetune.core.errors import CapacityError, WorkloadError
from cachetune.core.request_table import RequestTable
from cachetune.core.trace import to_chrome
from cachetune.core.workload import Slo
from cachetune.simulator.serving import serve_trace
from cachetune.simulator.serving_fleet import Fleet, ServingLimits
from cachetune.simulator.serving_result import ServingResult
from serving_support import LinearCost, make_fleet, make_table, make_tier, random_table

COST = LinearCost(step=1e-3, token=2e-5, pair=1e-9, decode=1e-5, context=2e-8)
POLICIES = ("full_recompute", "prefix_cache", "full_reuse", "cacheblend", "epic", "cachetune")
ROUTERS = ("round_robin", "least_load", "prefix_affinity", "chunk_affinity")
NEEDS_NO_FUTURE = ("lru", "lfu", "cost")


def random_fleet(draw: random.Random, table: RequestTable) -> Fleet:
    """Any policy and router over up to three tiers, memory short or not."""
    longest = int((table.prompt_tokens + table.output_tokens).max())
    limits = ServingLimits(
        max_num_seqs=draw.choice([4, 32]),
        max_num_batched_tokens=draw.choice([32, 512]),
        n_blocks=draw.choice([None, -(-longest // 16) + draw.randint(0, 20)]),
        prefix_caching=draw.random() < 0.5,
        async_scheduling=draw.random() < 0.5,
    )
    tiers = [
        make_tier(
            name,
            draw.choice([1e5, 1e6, 1e7]),
            capacity_bytes=None if shared else draw.choice([20_000, 100_000, None]),
            eviction=draw.choice([*NEEDS_NO_FUTURE, "belady"]),
            latency_s=draw.choice([0.0, 1e-3]),
            iops=draw.choice([None, 1e4]),
            write_buffer_bytes=draw.choice([None, 50_000]),
            shared=shared,
        )
        for name, shared in (("dram", False), ("disk", False), ("remote", True))
        if draw.random() < 0.7
    ]
    return make_fleet(
        policy=draw.choice(POLICIES),
        tiers=tiers,
        limits=limits,
        host_link=draw.choice([None, 2e6]),
        n_replicas=draw.choice([1, 3]),
        router=draw.choice(ROUTERS),
        reuse={"restore_s_per_token": draw.choice([0.0, 1e-6])},
    )


def random_run(seed: int) -> tuple[RequestTable, Fleet]:
    draw = random.Random(seed)
    table = random_table(draw, chained=draw.random() < 0.5)
    n = len(table)
    tenant = np.array([draw.randrange(2) for _ in range(n)], np.int16)
    after = np.full(n, -1, np.int32)
    for row in range(1, n):
        if draw.random() < 0.2:
            after[row] = draw.randrange(row)
    table = replace(table, tenant=tenant, tenants=("a", "b"), after=after)
    return table, random_fleet(draw, table)


def columns(result: ServingResult) -> list[bytes]:
    found = [getattr(result, f.name) for f in fields(result)]
    return [x.tobytes() for x in found if isinstance(x, np.ndarray)]


def check(table: RequestTable, result: ServingResult) -> None:
    """Conservation of requests, tokens and bytes, and Little's law."""
    assert (result.arrival_ns >= 0).all()
    for before, after in (("arrival_ns", "admitted_ns"), ("admitted_ns", "first_token_ns")):
        assert (getattr(result, before) <= getattr(result, after)).all()
    assert (result.first_token_ns <= result.end_ns).all()
    fates = result.gpu_tokens + result.recomputed_tokens + result.computed_tokens
    assert (fates + result.loaded_tokens.sum(axis=1) == table.prompt_tokens).all()
    moved = result.loaded_tokens * result.fleet.policy.kv_bytes_per_token
    assert (result.loaded_bytes >= moved).all()
    calm = result.n_preemptions == 0
    assert (result.loaded_bytes == moved)[calm].all()
    assert (result.repeated_tokens[calm] == 0).all()
    assert (result.busy_ns <= result.end_ns.max()).all()
    left, right = result.littles_law()
    assert left == pytest.approx(right, rel=1e-9)
    followers = np.flatnonzero(table.after >= 0)
    came = result.end_ns[table.after[followers]] + table.arrival_ns[followers]
    assert (result.arrival_ns[followers] == came).all()


def fuzz(seed: int) -> None:
    table, fleet = random_run(seed)
    result = serve_trace(table, fleet, COST)
    check(table, result)
    assert columns(result) == columns(serve_trace(table, fleet, COST))


def test_fuzz_keeps_the_laws() -> None:
    for seed in range(60):
        try:
            fuzz(seed)
        except Exception as e:
            e.add_note(f"replay: test_serving_laws.fuzz({seed})")
            raise


@pytest.mark.slow
def test_fuzz_keeps_the_laws_on_many_machines() -> None:
    for seed in range(1000, 3000):
        fuzz(seed)


@pytest.mark.parametrize("seed", range(4))
def test_scaling_all_costs_and_gaps_scales_all_times(seed: int) -> None:
    draw = random.Random(seed)
    table = random_table(draw, chained=True)
    tiers = [make_tier("dram", 1e6, capacity_bytes=100_000), make_tier("disk", 1e5)]
    fleet = make_fleet(policy="cachetune", tiers=tiers, host_link=2e6)
    slow_tiers = [make_tier("dram", 2.5e5, capacity_bytes=100_000), make_tier("disk", 2.5e4)]
    slow_fleet = make_fleet(policy="cachetune", tiers=slow_tiers, host_link=5e5)
    slow = LinearCost(*(4 * term for term in COST.terms))
    later = replace(table, arrival_ns=4 * table.arrival_ns)
    one, four = serve_trace(table, fleet, COST), serve_trace(later, slow_fleet, slow)
    np.testing.assert_allclose(four.ttft_ms, 4 * one.ttft_ms, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(four.e2e_ms, 4 * one.e2e_ms, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_unused_tier_changes_nothing(seed: int) -> None:
    table = random_table(random.Random(seed), chained=True)
    plain = serve_trace(table, make_fleet(policy="cachetune", tiers=[make_tier()]), COST)
    more = [make_tier(), make_tier("disk", 10.0)]
    other = serve_trace(table, make_fleet(policy="cachetune", tiers=more), COST)
    assert (plain.end_ns == other.end_ns).all()
    full = serve_trace(table, make_fleet(tiers=[make_tier()]), COST)
    none = serve_trace(table, make_fleet(), COST)
    assert (full.end_ns == none.end_ns).all()


def test_one_request_gains_from_bandwidth_or_loses_nothing() -> None:
    table = make_table([70, 70], [5, 5], [0.0, 100.0], [[0, 1, 2, 3], [3, 1, 0, 2]])
    times = []
    for rate in (1e3, 1e4, 1e5, 1e6, 1e9):
        fleet = make_fleet(policy="cachetune", tiers=[make_tier(rate=rate)])
        times.append(serve_trace(table, fleet, COST).ttft_ms[1])
    assert times == sorted(times, reverse=True)
    assert times[0] > times[-1]


@pytest.mark.parametrize("seed", range(3))
def test_ratio_one_is_full_recompute(seed: int) -> None:
    """Of chunks that stand first, which are exact, nothing is loaded either."""
    table = random_table(random.Random(seed), chained=False)
    reuse = {"recompute_ratio": {"*": 1.0}, "load_exact": False}
    fleet = make_fleet(policy="cachetune", tiers=[make_tier()], reuse=reuse)
    assert (
        serve_trace(table, fleet, COST).end_ns == serve_trace(table, make_fleet(), COST).end_ns
    ).all()


def test_tenants_never_share() -> None:
    table = make_table([70] * 4, [2] * 4, [0, 10, 20, 30], [[0, 1, 2, 3]] * 4, chained=True)
    limits = ServingLimits()
    fleet = make_fleet(policy="cachetune", tiers=[make_tier()], limits=limits)
    apart = replace(table, tenant=np.array([0, 1, 2, 3], np.int16), tenants=tuple("abcd"))
    assert serve_trace(table, fleet, COST).computed_tokens.tolist() == [70, 6, 6, 6]
    assert serve_trace(apart, fleet, COST).computed_tokens.tolist() == [70] * 4


def test_priority_classes_go_first() -> None:
    table = make_table([64] * 6, [20] * 6, [0.0] * 6)
    table = replace(
        table, slo_class=np.array([0, 0, 0, 1, 1, 1], np.int16), classes=("batch", "chat")
    )
    limits = ServingLimits(max_num_seqs=1, max_num_batched_tokens=64, prefix_caching=False)
    slo = {"chat": Slo(ttft_ms=100, tpot_ms=100), "batch": Slo(ttft_ms=1, tpot_ms=100)}
    fleet = make_fleet(limits=limits, priority=("chat",), slo=slo)
    result = serve_trace(table, fleet, COST)
    assert result.first_token_ns[3:].max() < result.first_token_ns[:3].min()
    summary = result.summary()
    assert summary["good_share"] == {"chat": 1.0, "batch": 0.0}
    assert summary["n_ended"] == 6


def test_life_of_a_request_as_a_trace() -> None:
    table = make_table([70, 70], [5, 5], [0.0, 1.0], [[0, 1, 2, 3]] * 2)
    fleet = make_fleet(policy="cachetune", tiers=[make_tier()])
    result = serve_trace(table, fleet, COST, watch={1})
    timeline = result.request_trace(1)
    assert [s.op.kind for s in timeline.spans] == ["load", "prefill", "decode"]
    assert timeline.spans[1].end_ns == timeline.spans[2].start_ns == result.first_token_ns[1]
    assert timeline.end_ns == result.end_ns[1]
    assert to_chrome(timeline)["traceEvents"]
    with pytest.raises(WorkloadError, match=r"watch=\{0\}"):
        result.request_trace(0)


def test_request_that_never_fits_is_refused() -> None:
    table = make_table([64, 640], [20, 20], [0.0, 1.0])
    fleet = make_fleet(limits=ServingLimits(n_blocks=20))
    with pytest.raises(CapacityError, match=r"row 1 of 660 tokens needs 42 blocks"):
        serve_trace(table, fleet, COST)
