"""Cost and capacity of a candidate with every kernel at one end of its 90 % interval.

That all kernels err together, and in one direction, is the worst case: the band holds more than
90 % wherever their errors are not one error.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Literal

from ..core.catalogue import GpuRow
from ..core.model_spec import ModelSpec
from ..simulator.gpu_sheet import GpuSheet
from ..simulator.kernel_cost import KernelCost, Prediction
from ..simulator.model_cost import ModelCost
from ..simulator.step_tables import StepTables
from .attainment import Estimate
from .candidate import Candidate, sheet_of
from .capacity import RATE_MIN_RPS, Capacity, first_capacity
from .question import Question, runner

End = Literal["low_s", "high_s"]

SAMPLE: tuple[list[tuple[int, int]], int, int] = ([(2048, 4096)], 16, 32_000)
"""A step whose change tells where to look first."""


class BoundedKernels(KernelCost):
    """Kernels whose seconds are an end of the interval."""

    def __init__(self, sheet: GpuSheet, end: End) -> None:
        super().__init__(sheet)
        self.end = end

    def predict(self, kind: str, **sizes: float) -> Prediction:
        """`KernelCost.predict`, moved to the end."""
        found = super().predict(kind, **sizes)
        return found._replace(seconds=getattr(found, self.end))


def bounded_cost(candidate: Candidate, model: ModelSpec, end: str) -> StepTables:
    """`Candidate.cost` at the end `low_s` or `high_s` of all intervals."""
    machine, weights = candidate.machine, candidate.engine.weights
    return _bounded(machine.gpu, machine.n_gpus, model, weights, candidate.overhead_s, end)


@lru_cache(maxsize=32)
def _bounded(
    gpu: GpuRow, n_gpus: int, model: ModelSpec, weights: str, overhead_s: float, end: End
) -> StepTables:
    kernels = BoundedKernels(sheet_of(gpu), end)
    dtype = None if weights == "bfloat16" else weights
    return StepTables(ModelCost(model, kernels, n_gpus, dtype), overhead_s)


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
    for end in ("high_s", "low_s"):
        cost = bounded_cost(candidate, question.model, end)
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
