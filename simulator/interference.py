"""How ops of different streams slow each other: they share cores, memory and the interpreter.

`interference.<slowed>.<source>` is the share of its speed that an op loses while the source is
active: loads (by medium), restores on their own stream, compute. Slowed are `compute`, `restore`
and `io`: what a load loses is its own work, before its bytes move (`simulator.cost.LoadParts`);
bytes share the link. A tier behind a rate limiter mostly sleeps: while its bytes move it counts by
the share of the medium's rate that it uses; its own work, before that, is any load's. Calibration
fits the shares from the measured overlap of spans.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..core.hardware import HardwareProfile, Tier
from ..core.ops import COMPUTE, RESTORE, Op

IO = "io"
MEDIA = ("device", "dram", "file", "remote")

LOSES_TO: dict[str, tuple[str, ...]] = {
    COMPUTE: (*MEDIA, "restore"),
    RESTORE: (*MEDIA, "compute"),
    IO: (*MEDIA, "restore", "compute"),
}
"""Sources by what is slowed (`slowed_of`)."""

SLOWEST = 0.2
"""No op falls below this share of its speed, whatever is active beside it."""


def slowed_of(op: Op) -> str:
    """Whose shares hold for an op: loads have theirs, and restores, on whichever stream they are.

    A restore is bound by memory and a prefill by arithmetic, so the same load slows them unlike.
    """
    if op.kind == "load":
        return IO
    return RESTORE if op.kind == "restore" else COMPUTE


def coefficient_of(slowed: str, source: str) -> str:
    """Name of the coefficient: who is slowed, by what."""
    return f"interference.{slowed}.{source}"


def source_of(op: Op, tiers: Mapping[str, Tier]) -> str:
    """What an active op is to others."""
    if op.kind == "load":
        return tiers[op.tier].medium
    return "compute" if op.stream == COMPUTE else "restore"


def moving_share(tier: Tier) -> float:
    """How strongly a load counts while its bytes move: the share of its medium's rate."""
    return min(1.0, tier.link_bytes_per_s / tier.worker_bytes_per_s)


class Interference:
    """What is active, and how fast an op goes beside it; at full speed without shares."""

    def __init__(self, profile: HardwareProfile) -> None:
        self._tiers = profile.tiers
        self._share = {
            (slowed, source): found.value
            for slowed, sources in LOSES_TO.items()
            for source in sources
            if (found := profile.coefficients.get(coefficient_of(slowed, source))) is not None
        }
        self._active: dict[tuple[int, str], float] = {}
        self._strength: dict[int, float] = {}
        """By op id, how strongly it counts now."""

    @property
    def is_modelled(self) -> bool:
        """Whether any share is above zero."""
        return any(self._share.values())

    def begin(self, op: Op) -> None:
        """`op` is active from now on."""
        self._count(op, 1.0)

    def moves(self, op: Op) -> None:
        """The own work of a load is done; its bytes move."""
        self._count(op, moving_share(self._tiers[op.tier]))

    def end(self, op: Op) -> None:
        """`op` is active no more."""
        self._count(op, 0.0)
        del self._strength[op.op_id]

    def _count(self, op: Op, strength: float) -> None:
        key = (op.device, source_of(op, self._tiers))
        more = strength - self._strength.get(op.op_id, 0.0)
        self._strength[op.op_id] = strength
        self._active[key] = self._active.get(key, 0.0) + more

    def rate(self, op: Op) -> float:
        """Share of its own speed at which `op` goes now."""
        slowed = slowed_of(op)
        own = source_of(op, self._tiers)
        lost = 0.0
        for source in LOSES_TO.get(slowed, ()):
            active = self._active.get((op.device, source), 0.0)
            if source == own:
                active -= self._strength.get(op.op_id, 0.0)
            if active > 1e-9:
                lost += self._share.get((slowed, source), 0.0) * min(1.0, active)
        return max(SLOWEST, 1.0 - lost)
