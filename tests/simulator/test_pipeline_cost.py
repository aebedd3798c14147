"""A pipeline-parallel group against a walk of every part through every stage."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import replace

import numpy as np
import pytest
from cachetune.simulator.pipeline_cost import PipelineCost
from cachetune.simulator.serving import serve_trace
from cachetune.simulator.serving_fleet import ServingLimits
from serving_support import LinearCost, make_fleet, make_table, random_table

COST = LinearCost(step=1e-3, token=2e-5, pair=1e-9, decode=1e-5, context=2e-8)
BATCH = 8192


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
    cost = PipelineCost(COST, n_stages, BATCH)
    walked = walk_s(n_stages, n_decode, 1000, 2000)
    assert cost.step_s((), n_decode, n_decode * 1000) == pytest.approx(walked, rel=2e-3)


def test_a_run_is_the_sum_of_its_steps() -> None:
    draw = random.Random(0)
    for _ in range(50):
        n_stages = draw.randint(1, 8)
        n = n_stages * draw.randint(1, 30)  # equal parts: contexts grow alike in each
        kv, n_steps = n * draw.randint(1, 900), draw.randint(1, 200)
        cost = PipelineCost(COST, n_stages, BATCH, 1e-5, 1e-8)
        steps = sum(cost.step_s((), n, kv + i * n) for i in range(n_steps))
        assert cost.decode_run_s(n, kv, n_steps) == pytest.approx(steps, rel=1e-9)


def test_one_stage_is_no_pipeline_and_more_are_faster_when_full() -> None:
    table = replace(random_table(random.Random(1), chained=False))
    alone = serve_trace(table, make_fleet(), COST)
    single = serve_trace(table, make_fleet(), PipelineCost(COST, 1, BATCH))
    assert (single.end_ns == alone.end_ns).all()
    cost = LinearCost(token=1e-5, decode=1e-4)  # nothing is shared by the batch
    busy = make_table([64] * 256, [50] * 256, [0.0] * 256)
    one, four = (
        serve_trace(busy, make_fleet(), c).duration_s for c in (cost, PipelineCost(cost, 4, BATCH))
    )
    assert four == pytest.approx(one / 4, rel=0.02)


def test_a_lone_request_gains_nothing_and_pays_the_hops() -> None:
    table = make_table([1], [101], [0.0])
    one = serve_trace(table, make_fleet(), COST).e2e_ms[0]
    four = serve_trace(table, make_fleet(), PipelineCost(COST, 4, BATCH, 1e-4)).e2e_ms[0]
    assert four - one == pytest.approx(101 * 3 * 1e-1, rel=1e-6)


def test_a_lone_prompt_passes_all_stages_too() -> None:
    """Its rows stay together, as in vLLM: stages that wait for it do not shorten its TTFT."""
    table = make_table([4000], [1], [0.0])
    one = serve_trace(table, make_fleet(), COST).ttft_ms[0]
    four = serve_trace(table, make_fleet(), PipelineCost(COST, 4, BATCH)).ttft_ms[0]
    assert four == pytest.approx(one, rel=1e-9)


def group_ms(
    prompts: list[int], outputs: list[int], arrivals_s: list[float], n_stages: int, budget: int
) -> tuple[float, float]:
    """Mean TTFT and TPOT of a group walked batch by batch: a batch begins when the first stage is
    free and takes what waits, a request with a token or piece under way waits for it only if its
    next token needs it; then the batch passes the stages, each in its turn."""
    n = len(prompts)
    left, made = list(prompts), [0] * n
    first, end = np.zeros(n), np.zeros(n)
    waiting: deque[int] = deque()
    ready: list[int] = []
    flying: deque[tuple[float, list[int]]] = deque()
    free, now, come = [0.0] * n_stages, 0.0, 0
    while come < n or flying or waiting or ready:
        while come < n and arrivals_s[come] <= now:
            waiting.append(come)
            come += 1
        while flying and flying[0][0] <= now:
            at, tokens = flying.popleft()
            for r in tokens:
                made[r] += 1
                first[r] = first[r] or at
                end[r] = at
            ready += [r for r in tokens if made[r] < outputs[r]]
        if free[0] <= now and len(flying) < n_stages and (ready or waiting):
            room, tokens, pieces = budget - len(ready), ready, []
            kv, n_decode, ready = sum(prompts[r] + made[r] for r in ready), len(ready), []
            while waiting and room:
                r = waiting[0]
                rows = min(left[r], room)
                pieces.append((rows, prompts[r] - left[r]))
                left[r] -= rows
                room -= rows
                if not left[r]:
                    tokens.append(waiting.popleft())
            at, each = now, COST.step_s(pieces, n_decode, kv) / n_stages
            for stage in range(n_stages):
                at = free[stage] = max(at, free[stage]) + each
            flying.append((at, tokens))
        later = [t for t in (free[0], *([arrivals_s[come]] if come < n else [])) if t > now]
        now = min([*later, *([flying[0][0]] if flying else [])], default=now)
    ttft, tpot = first - np.array(arrivals_s), (end - first) / (np.array(outputs) - 1)
    return float(ttft.mean()) * 1e3, float(tpot.mean()) * 1e3


@pytest.mark.parametrize("n_stages", [2, 4])
@pytest.mark.parametrize(("mean_gap_s", "budget"), [(2.0, 8192), (0.1, 2048), (0.06, 2048)])
def test_a_group_serves_as_one_walked_batch_by_batch(
    n_stages: int, mean_gap_s: float, budget: int
) -> None:
    draw = random.Random(2)
    prompts = [round(draw.lognormvariate(7.5, 0.7)) + 1 for _ in range(600)]
    outputs = [32] * len(prompts)
    arrivals, at = [], 0.0
    for _ in prompts:
        at += draw.expovariate(1 / mean_gap_s)
        arrivals.append(at)
    walked = group_ms(prompts, outputs, arrivals, n_stages, budget)
    limits = ServingLimits(
        max_num_seqs=1000, max_num_batched_tokens=budget * n_stages, prefix_caching=False
    )
    table = make_table(prompts, outputs, arrivals)
    found = serve_trace(table, make_fleet(limits=limits), PipelineCost(COST, n_stages, budget))
    means = float(found.ttft_ms.mean()), float(found.tpot_ms.mean())
    assert means == pytest.approx(walked, rel=0.2)
