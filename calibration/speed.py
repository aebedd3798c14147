"""`Speed`: how fast the machine is now, by probes that run between what is measured.

A shared machine's speed moves by 5 to 20 % within half a minute, other kinds of work by other
amounts. Probes that calibration knows, run one by one between the measurements, tell by how much:
for each kind of op the median, over the last run of each, of what it took over what the profile
says.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..core.hardware import HardwareProfile
from ..core.ops import OpKind, Schedule
from .align import ALIGNED, medians, ms_by_kind, scaled, simulate_schedule
from .calibrate import PROBED_RHO
from .collect import Measured, run_once
from .probes import Library, Probe, ladder

if TYPE_CHECKING:
    from ..runtime.runner import Runner


def known_probes(profile: HardwareProfile, max_tokens: int) -> list[Probe]:
    """The probes that calibrated a profile with prompts of up to `max_tokens`."""
    fast = [n for n, t in profile.tiers.items() if t.rho is None or t.rho < PROBED_RHO]
    return ladder(Library(profile.model, profile.provenance.seed), fast, max_tokens)


class Speed:
    """Runs `probes` in turn; the profile at the speed of the last round of them.

    Args:
        profile: as it was calibrated.
        probes: those that calibrated it. Of others, or of some of them, what they take would differ
            from the profile by more than the machine's speed.
    """

    def __init__(
        self,
        profile: HardwareProfile,
        runner: Runner,
        probes: Sequence[Probe],
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self._profile = profile
        self._runner = runner
        self._probes = list(probes)
        self._simulated: list[dict[str, float]] = []
        self._ratios: dict[OpKind, deque[float]] = {}
        self._next = 0
        tell = progress or (lambda what, done, total: None)
        for i, probe in enumerate(self._probes):
            warm_up = Measured(probe, [run_once(runner, probe, prepare=True)])
            simulated = simulate_schedule(profile, Schedule.of(warm_up.ops()))
            self._simulated.append(ms_by_kind(simulated))
            tell("speed", i + 1, 2 * len(self._probes))
        for kind in ALIGNED:
            if n := sum(found.get(kind, 0.0) > 0.0 for found in self._simulated):
                self._ratios[kind] = deque(maxlen=n)
        for i in range(len(self._probes)):
            self.step()
            tell("speed", len(self._probes) + i + 1, 2 * len(self._probes))

    def round(self) -> None:
        """Run every probe once."""
        for _ in self._probes:
            self.step()

    def step(self) -> None:
        """Run the next probe."""
        at = self._next
        self._next = (at + 1) % len(self._probes)
        took = ms_by_kind(run_once(self._runner, self._probes[at]))
        for kind, ratios in self._ratios.items():
            if simulated_ms := self._simulated[at].get(kind):
                ratios.append(took[kind] / simulated_ms)

    def factors(self) -> dict[OpKind, float]:
        """By kind, the time ops take now over what the profile says."""
        return medians(self._ratios)

    def now(self) -> HardwareProfile:
        """The profile at the machine's present speed."""
        return scaled(self._profile, self.factors())
