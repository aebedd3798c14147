"""Cost and capacity of a candidate with every kernel at one end of its 90 % interval.

That all kernels err together, and in one direction, is the worst case: the band holds more than
90 % wherever their errors are not one error.
"""

from __future__ import annotations

import math
from typing import Any

from .bounded_kernels import KernelEnd
from .candidate import Candidate
from .capacity import Capacity, first_capacity
from .question import Question, runner
from .rate_search import RATE_MIN_RPS
from .trial import Estimate

ENDS: tuple[KernelEnd, KernelEnd] = ("high_s", "low_s")

SAMPLE: tuple[list[tuple[int, int]], int, int] = ([(2048, 4096)], 16, 32_000)
"""A step whose change tells where to look first."""


def band_row(question: Question, candidate: Candidate, found: Capacity) -> dict[str, Any]:
    """Capacity with all kernels at either end of their 90 % interval, and both intervals together.

    The ends are taken of the first seed, over its own capacity. That of the traffic and that of the
    kernels have nothing to do with each other: their logarithms add in squares.
    """
    assert found.rate is not None
    kernels = Estimate(found.rate.value, found.rate.value, found.rate.value)
    if question.kernel_band:
        kernels = _kernel_band(question, candidate, found, found.rate.value)
    low, high = _both(found.rate, kernels)
    return {
        "kernels_low_rps": kernels.low,
        "kernels_high_rps": kernels.high,
        "low_rps": low,
        "high_rps": high,
    }


def _kernel_band(
    question: Question, candidate: Candidate, found: Capacity, value: float
) -> Estimate:
    level, most = question.attainment, question.most_rps
    first = found.first_rps or value
    middle_s = candidate.cost(question.model).step_s(*SAMPLE)
    ends = []
    for end in ENDS:
        cost = candidate.cost(question.model, end)
        guess = max(RATE_MIN_RPS, first * middle_s / cost.step_s(*SAMPLE))
        run = runner(question, candidate, cost=cost)
        rate = first_capacity(run, level, question.seeds[0], guess, 1.1, most)
        ends.append(0.0 if rate is None else value * rate / first)
    return Estimate(value, min(value, ends[0]), max(value, ends[1]))


def _both(traffic: Estimate, kernels: Estimate) -> tuple[float, float]:
    def together(one: float, other: float) -> float:
        if min(one, other) <= 0:
            return 0.0
        logs = (math.log(x / traffic.value) for x in (one, other))
        return math.hypot(*logs)

    below = together(traffic.low, kernels.low)
    above = together(traffic.high, kernels.high)
    low = traffic.value * math.exp(-below) if min(traffic.low, kernels.low) > 0 else 0.0
    return low, traffic.value * math.exp(above)
