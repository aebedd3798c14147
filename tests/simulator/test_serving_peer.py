"""The merged queue against a loop over single steps: the same times, whatever the machine."""

from __future__ import annotations

import random

import numpy as np
import pytest
from cachetune.simulator.serving import serve_trace
from cachetune.simulator.serving_fleet import ServingLimits
from cachetune.simulator.step_loop import StepLoop
from cachetune.simulator.step_scheduler import Arrival, EngineLimits
from serving_support import LinearCost, alone, make_fleet, random_table

COST = LinearCost(step=1e-3, token=2e-5, pair=1e-9, decode=1e-5, context=2e-8)


def compare(seed: int) -> int:
    """Both, on a random workload and machine; requests that were preempted."""
    draw = random.Random(seed)
    table = random_table(draw, chained=True)
    longest = int((table.prompt_tokens + table.output_tokens).max())
    fits = -(-longest // 16)
    limits = dict(
        max_num_seqs=draw.choice([4, 16, 32]),
        max_num_batched_tokens=draw.choice([32, 64, 512]),
        n_blocks=draw.choice([None, fits + draw.randint(0, 30)]),
        block_size=16,
        prefix_caching=draw.random() < 0.5,
        async_scheduling=draw.random() < 0.5,
    )
    arrivals = [
        Arrival(
            table.arrival_ns[i] / 1e9,
            int(table.prompt_tokens[i]),
            int(table.output_tokens[i]),
            tuple(table.chunks_of(i).tolist()),
        )
        for i in range(len(table))
    ]
    loop = StepLoop(EngineLimits(**limits), alone(COST), arrivals)
    lives = loop.run()
    result = serve_trace(table, make_fleet(limits=ServingLimits(**limits)), COST)
    assert result.n_steps == loop.n_steps
    assert result.n_preemptions.tolist() == [life.n_preemptions for life in lives]
    first = np.array([life.first_token_s for life in lives])
    last = np.array([life.last_token_s for life in lives])
    np.testing.assert_allclose(result.first_token_ns / 1e9, first, rtol=0, atol=1e-6)
    np.testing.assert_allclose(result.end_ns / 1e9, last, rtol=0, atol=1e-6)
    return int(result.n_preemptions.sum())


def test_times_equal_those_of_single_steps() -> None:
    n_preemptions = 0
    for seed in range(60):
        try:
            n_preemptions += compare(seed)
        except Exception as e:
            e.add_note(f"replay: test_serving_peer.compare({seed})")
            raise
    assert n_preemptions > 10


@pytest.mark.slow
def test_times_equal_those_of_single_steps_on_many_machines() -> None:
    for seed in range(1000, 1600):
        compare(seed)
