"""How ops of different streams slow each other: they share cores, memory and the interpreter.

`interference.<slowed>.<source>` is the share of its speed that an op loses while the source is
active: loads (by medium), restores on their own stream, compute. Slowed are `compute`, `restore`
and `io`: what a load loses is its own work, before its bytes move (`simulator.cost.LoadParts`);
bytes share the link. A tier behind a rate limiter mostly sleeps: it counts by the share of the
medium's rate that it uses. Calibration fits the shares from the measured overlap of spans.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..core.hardware import HardwareProfile, Tier
from ..core.ops import COMPUTE, RESTORE, Op

IO = "io"
MEDIA = ("dram", "file", "remote")

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


def source_of(op: Op, tiers: Mapping[str, Tier]) -> tuple[str, float]:
    """(what an active op is to others, how strongly: 1, or the share of its medium's rate)."""
    if op.kind != "load":
        return ("compute" if op.stream == COMPUTE else "restore"), 1.0
    tier = tiers[op.tier]
    return tier.medium, min(1.0, tier.link_bytes_per_s / tier.worker_bytes_per_s)


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

    @property
    def is_modelled(self) -> bool:
        """Whether any share is above zero."""
        return any(self._share.values())

    def begin(self, op: Op) -> None:
        """`op` is active from now on."""
        source, strength = source_of(op, self._tiers)
        key = (op.device, source)
        self._active[key] = self._active.get(key, 0.0) + strength

    def end(self, op: Op) -> None:
        """`op` is active no more."""
        source, strength = source_of(op, self._tiers)
        self._active[op.device, source] -= strength

    def rate(self, op: Op) -> float:
        """Share of its own speed at which `op` goes now."""
        slowed = slowed_of(op)
        own, strength = source_of(op, self._tiers)
        lost = 0.0
        for source in LOSES_TO.get(slowed, ()):
            active = self._active.get((op.device, source), 0.0)
            if source == own:
                active -= strength
            if active > 1e-9:
                lost += self._share.get((slowed, source), 0.0) * min(1.0, active)
        return max(SLOWEST, 1.0 - lost)
