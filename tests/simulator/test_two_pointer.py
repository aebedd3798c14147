"""Two pointers: the closed form equals the simulated executor, and the rule at its edges."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import numpy as np
import pytest
from cachetune.core.errors import WorkloadError
from cachetune.core.ops import COMPUTE, Op, io_stream
from cachetune.simulator.cost import CostModel
from cachetune.simulator.executor import SimExecutor
from cachetune.simulator.two_pointer import Meeting, cut, meeting, run_two_pointers
from support import NS, make_profile

N = 96


def _ops(
    load_bytes: list[int], load_tokens: list[int]
) -> tuple[Callable[[int, int], Op], list[Op]]:
    ids = count()
    loads = [
        Op(next(ids), "load", io_stream("dram", 0), (0,), 0, 4, n_tokens=t, n_bytes=b, tier="dram")
        for b, t in zip(load_bytes, load_tokens, strict=True)
    ]

    def step(offset: int, n: int) -> Op:
        pairs = n * offset + n * (n + 1) // 2
        return Op(
            next(ids), "prefill", COMPUTE, (0,), 0, 4, n_tokens=n, n_pairs=pairs, n_scored=pairs
        )

    return step, loads


@pytest.mark.parametrize("seed", range(40))
def test_closed_form_equals_the_executor(seed: int) -> None:
    draw = np.random.default_rng(seed)
    profile = make_profile(
        coefficients_s={
            "prefill.op": int(draw.integers(0, 60)) * NS,
            "prefill.small_flop": float(draw.choice([0, 0.01, 0.1])) * NS,
            "prefill.attention_flop": 0.01 * NS,
            "prefill.causal_flop": 0.01 * NS,
        }
    )
    load_tokens = cut(N, int(draw.integers(1, 20)))[::-1]
    load_bytes = [int(b) for b in draw.integers(0, 4000, len(load_tokens))]
    step_tokens = int(draw.integers(1, 40))
    step_op, loads = _ops(load_bytes, load_tokens)
    cost = CostModel(profile)

    closed = meeting(
        N,
        step_tokens,
        lambda offset, n: cost.duration_ns(_ops([], [])[0](offset, n)),
        load_tokens,
        [cost.alone_ns(op) for op in loads],
    )
    timeline = run_two_pointers(SimExecutor(profile), N, step_tokens, step_op, loads)

    steps = [s for s in timeline.spans if s.op.kind == "prefill"]
    assert closed == Meeting(
        max(s.end_ns for s in steps), len(steps), sum(s.op.n_tokens for s in steps)
    )
    resident = sum(
        s.op.n_tokens for s in timeline.spans if s.op.kind == "load" and s.end_ns <= closed.end_ns
    )
    assert resident + closed.n_computed >= N


def test_a_slow_link_leaves_all_to_compute_and_a_slow_gpu_one_step() -> None:
    loads = cut(N, 8)
    assert meeting(N, 32, lambda offset, n: 10, loads, [10**9] * 12) == Meeting(30, 3, N)
    assert meeting(N, 32, lambda offset, n: 10**9, loads, [1] * 12) == Meeting(10**9, 1, 32)


def test_the_last_step_takes_only_what_was_not_loaded() -> None:
    seen: list[tuple[int, int]] = []

    def step_ns(offset: int, n: int) -> int:
        seen.append((offset, n))
        return n

    # After 40 ns one load of 30 is there: 26 of 96 tokens are left for the second step.
    assert meeting(N, 40, step_ns, [30, 66], [40, 1000]) == Meeting(66, 2, 66)
    assert seen == [(0, 40), (40, 26)]


@pytest.mark.parametrize("scale", [2, 7])
def test_scaling_every_duration_scales_the_meeting(scale: int) -> None:
    loads, times = cut(N, 8), list(range(5, 17))
    one = meeting(N, 16, lambda o, n: o + 3 * n, loads, times)
    many = meeting(N, 16, lambda o, n: scale * (o + 3 * n), loads, [scale * t for t in times])
    assert many == one._replace(end_ns=scale * one.end_ns)


@pytest.mark.parametrize("slower", range(1, 12))
def test_a_faster_link_never_ends_later(slower: int) -> None:
    loads = cut(N, 8)
    ends = [
        meeting(N, 16, lambda o, n: 20 + n, loads, [t] * len(loads)).end_ns
        for t in (slower, slower + 1)
    ]
    assert ends[0] <= ends[1]


def test_loads_must_cover_the_prompt() -> None:
    with pytest.raises(WorkloadError, match="must cover the prompt, got 90 of 96"):
        meeting(N, 16, lambda o, n: 1, [90], [1])
    with pytest.raises(WorkloadError, match="at least one token"):
        meeting(N, 0, lambda o, n: 1, [N], [1])
