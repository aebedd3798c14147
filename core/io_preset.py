"""Knobs of a plan that suit a kind of disk, until tuning finds better ones for this machine.

An SSD wants many requests in flight, each large enough to amortise its cost: at 64 KiB one worker
gets a quarter of what eight get at 256 KiB and more. A hard disk wants one worker, large requests
and one file after the other, as its head can be in one place only: about 8 ms of seek and
rotation are worth 1.6 MB of reading at 200 MB/s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .errors import PlanError
from .plan import ReusePlan
from .units import MIB


@dataclass(frozen=True)
class IoPreset:
    """Knobs of reading, and what a rate limiter needs to act as such a disk.

    `bytes_per_s` and `latency_s` are typical of data sheets (7200 rpm; PCIe 4 NVMe), not measured.
    """

    n_io_workers: int
    request_bytes: int
    load_order: Literal["layer", "chunk"]
    bytes_per_s: float
    latency_s: float

    @property
    def knobs(self) -> dict[str, int | str]:
        """Those of a plan."""
        names = ("n_io_workers", "request_bytes", "load_order")
        return {name: getattr(self, name) for name in names}

    def apply(self, plan: ReusePlan) -> ReusePlan:
        """`plan` with these knobs of reading."""
        return plan.replace(**self.knobs)


IO_PRESETS = {
    "ssd": IoPreset(8, 1 * MIB, "layer", 5e9, 80e-6),
    "hdd": IoPreset(1, 16 * MIB, "chunk", 200e6, 8e-3),
}


def io_preset(name: str) -> IoPreset:
    """The preset called `name`.

    Raises:
        PlanError: no such preset.
    """
    if name not in IO_PRESETS:
        raise PlanError(
            f"a disk preset must be one of {', '.join(IO_PRESETS)}",
            values=repr(name),
            remedy="name one of them, or set n_io_workers, request_bytes and load_order",
        )
    return IO_PRESETS[name]
