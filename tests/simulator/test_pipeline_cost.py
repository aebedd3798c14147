"""A pipeline-parallel group against a walk of every part through every stage."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from cachetune.simulator.pipeline_cost import PipelineCost
from cachetune.simulator.serving import serve_trace
from serving_support import LinearCost, make_fleet, make_table, random_table

COST = LinearCost(step=1e-3, token=2e-5, pair=1e-9, decode=1e-5, context=2e-8)


def walk_s(n_stages: int, n_decode: int, kv_each: int, n_rounds: int) -> float:
    """Seconds per round in the long run: parts queue at each stage in turn, first come first
    served, and a part's next round begins when its last one has ended."""
    parts = [n_decode // n_stages + (i < n_decode % n_stages) for i in range(n_stages)]
    parts = [n for n in parts if n]
    free = [0.0] * n_stages
    ready = [0.0] * len(parts)
    for _ in range(n_rounds):
        for i, n in enumerate(parts):
            at = ready[i]
            for stage in range(n_stages):
                at = max(at, free[stage]) + COST.step_s((), n, n * kv_each) / n_stages
                free[stage] = at
            ready[i] = at
    return max(ready) / n_rounds


@pytest.mark.parametrize("n_stages", [2, 4])
@pytest.mark.parametrize("n_decode", [1, 3, 4, 64])
def test_a_step_is_a_round_of_the_pipeline(n_stages: int, n_decode: int) -> None:
    cost = PipelineCost(COST, n_stages)
    walked = walk_s(n_stages, n_decode, 1000, 2000)
    assert cost.step_s((), n_decode, n_decode * 1000) == pytest.approx(walked, rel=2e-3)


def test_a_run_is_the_sum_of_its_steps() -> None:
    draw = random.Random(0)
    for _ in range(50):
        n_stages = draw.randint(1, 8)
        n = n_stages * draw.randint(1, 30)  # equal parts: contexts grow alike in each
        kv, n_steps = n * draw.randint(1, 900), draw.randint(1, 200)
        cost = PipelineCost(COST, n_stages, 1e-5, 1e-8)
        steps = sum(cost.step_s((), n, kv + i * n) for i in range(n_steps))
        assert cost.decode_run_s(n, kv, n_steps) == pytest.approx(steps, rel=1e-9)


def test_one_stage_is_no_pipeline_and_more_are_faster_when_full() -> None:
    table = replace(random_table(random.Random(1), chained=False))
    alone = serve_trace(table, make_fleet(), COST)
    assert (serve_trace(table, make_fleet(), PipelineCost(COST, 1)).end_ns == alone.end_ns).all()
    cost = LinearCost(token=1e-5, decode=1e-4)  # nothing is shared by the batch
    busy = make_table([64] * 256, [50] * 256, [0.0] * 256)
    one, four = (
        serve_trace(busy, make_fleet(), c).duration_s for c in (cost, PipelineCost(cost, 4))
    )
    assert four == pytest.approx(one / 4, rel=0.02)


def test_a_lone_request_gains_nothing_and_pays_the_hops() -> None:
    table = make_table([1], [101], [0.0])
    one = serve_trace(table, make_fleet(), COST).e2e_ms[0]
    four = serve_trace(table, make_fleet(), PipelineCost(COST, 4, 1e-4)).e2e_ms[0]
    assert four - one == pytest.approx(101 * 3 * 1e-1, rel=1e-6)
