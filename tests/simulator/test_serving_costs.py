"""Step costs of the serving simulator: a run of decode steps is the sum of its steps."""

from __future__ import annotations

import random

import numpy as np
import pytest
from cachetune.core.block_pool import BlockPool
from cachetune.core.engine import Engine
from cachetune.core.executor import serve
from cachetune.core.metrics import per_request
from cachetune.core.plan import ReusePlan
from cachetune.simulator.executor import SimExecutor
from cachetune.simulator.profile_step_cost import ProfileStepCost
from cachetune.simulator.serving import serve_trace
from cachetune.simulator.serving_fleet import ServingLimits
from cachetune.simulator.step_loop import StepLoop
from cachetune.simulator.step_profile import Curve, StepProfile
from cachetune.simulator.step_scheduler import Arrival, EngineLimits
from serving_support import alone, make_fleet, random_table
from support import make_index, make_profile, make_workload


def make_step_profile(seed: int, skewed: bool) -> StepProfile:
    """Random tables: nothing is linear but between grid points."""
    draw = np.random.Generator(np.random.PCG64(seed))
    grid = ((0, 16, 64, 512), (0, 64, 1024), (0, 1, 4, 64), (0, 16, 64, 100, 4096))
    us = draw.uniform(1, 5, tuple(len(axis) for axis in grid))
    for axis in range(4):
        us = np.cumsum(us, axis)
    tokens = (1, 8, 64, 512)
    curve = Curve(tokens, tuple(np.cumsum(draw.uniform(5, 50, 4)).tolist()))
    shares = Curve((1, 8, 64), (0.0, 4.0, 20.0))
    return StepProfile(
        4, curve, curve, curve, grid, us, (1, 2, 4, 8, 16, 32), overhead_s=1e-4,
        skew={0: shares, 16: shares, 64: shares} if skewed else {},
    )  # fmt: skip


@pytest.mark.parametrize("skewed", [False, True])
def test_step_profile_run_is_the_sum_of_its_steps(skewed: bool) -> None:
    draw = random.Random(1)
    for seed in range(20):
        profile = make_step_profile(seed, skewed)
        n = draw.randint(1, 40)
        kv, n_steps = draw.randint(0, 200) * n + draw.randrange(n), draw.randint(1, 300)
        top = kv // n + draw.randint(1, 90) if skewed else None
        steps = [
            profile.step_s((), n, kv + i * n, None if top is None else top + i)
            for i in range(n_steps)
        ]
        run = profile.decode_run_s(n, kv, n_steps, top)
        assert run == pytest.approx(sum(steps), rel=1e-9)


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_measured_tables_give_the_times_of_single_steps(seed: int, skewed: bool) -> None:
    """With a kernel that waits for its longest sequence, the longest is known at every step."""
    table = random_table(random.Random(seed), chained=True)
    limits = dict(
        max_num_seqs=8, max_num_batched_tokens=64, n_blocks=60, prefix_caching=seed % 2 == 0
    )
    cost = make_step_profile(seed, skewed)
    arrivals = [
        Arrival(at / 1e9, int(prompt), int(output), tuple(table.chunks_of(i).tolist()))
        for i, (at, prompt, output) in enumerate(
            zip(table.arrival_ns, table.prompt_tokens, table.output_tokens, strict=True)
        )
    ]
    lives = StepLoop(EngineLimits(async_scheduling=seed > 1, **limits), alone(cost), arrivals).run()
    fleet = make_fleet(limits=ServingLimits(async_scheduling=seed > 1, **limits))
    result = serve_trace(table, fleet, cost)
    last = [life.last_token_s for life in lives]
    np.testing.assert_allclose(result.end_ns / 1e9, last, rtol=0, atol=1e-6)


def test_profile_cost_is_that_of_its_ops() -> None:
    """One prompt and its decode steps, as the simulated executor carries them out."""
    coefficients = {"prefill.flop": 2e-9, "prefill.attention_flop": 4e-9, "dispatch.gap": 3e-9}
    coefficients |= {"prefill.causal_flop": 3e-9, "decode.attention_flop": 1e-9}
    profile = make_profile(coefficients_s=coefficients)
    workload = make_workload([("a", "b")], chunk_tokens=60, suffix_tokens=30, output_tokens=9)
    plan = ReusePlan(policy="full_recompute", prefill_chunk_tokens=100, layer_group=3)
    engine = Engine(workload, profile.model, plan, make_index(workload), BlockPool(40))
    (lone,) = per_request(serve(workload, engine, SimExecutor(profile)), workload)
    cost = ProfileStepCost(profile, plan)
    prefill_s = cost.step_s([(100, 0)], 0, 0) + cost.step_s([(50, 100)], 0, 0)
    one_head_s = profile.coefficients["head.op"].value + 3e-9
    assert lone.ttft_ms / 1e3 == pytest.approx(prefill_s - one_head_s, abs=1e-8)
    run_s = cost.decode_run_s(1, 150, 8)
    assert run_s == pytest.approx(sum(cost.step_s((), 1, 150 + i) for i in range(8)), rel=1e-12)
    assert (lone.e2e_ms - lone.ttft_ms) / 1e3 == pytest.approx(run_s, abs=1e-8)
