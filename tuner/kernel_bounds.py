"""The cost of a candidate with every kernel at one end of its 90 % interval.

That all kernels err together, and in one direction, is the worst case: the band holds more than
90 % wherever their errors are not one error.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

from ..core.catalogue import GpuRow
from ..core.model_spec import ModelSpec
from ..simulator.gpu_sheet import GpuSheet
from ..simulator.kernel_cost import KernelCost, Prediction
from ..simulator.model_cost import ModelCost
from ..simulator.step_tables import StepTables
from .candidate import Candidate, sheet_of

End = Literal["low_s", "high_s"]


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
