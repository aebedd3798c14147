"""Kernels whose seconds are an end of their 90 % interval."""

from __future__ import annotations

from typing import Literal

from ..simulator.gpu_sheet import GpuSheet
from ..simulator.kernel_cost import KernelCost, Prediction

KernelEnd = Literal["low_s", "high_s"]


class BoundedKernels(KernelCost):
    """All kernels at one end: that they err together, and in one direction, is the worst case."""

    def __init__(self, sheet: GpuSheet, end: KernelEnd) -> None:
        super().__init__(sheet)
        self.end = end

    def predict(self, kind: str, **sizes: float) -> Prediction:
        """`KernelCost.predict`, moved to the end."""
        found = super().predict(kind, **sizes)
        return found._replace(seconds=getattr(found, self.end))
