"""One run, judged; which rates of several runs count, and whether they keep a level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .overload import BEHIND_MAX

BATCHES = 10


@dataclass(frozen=True)
class Trial:
    """One simulated run."""

    rate_rps: float
    seed: int
    good_share: float
    """Of the requests that are judged, those that keep TTFT and TPOT."""
    behind: float
    """Seconds that first tokens fell behind per second of traffic: how fast the queue grew."""
    good: tuple[int, ...]
    """Good requests of each of `BATCHES` batches, in their order."""
    judged: tuple[int, ...]
    """All requests of each batch."""
    n_whole: int | None = None
    """Requests of the trace that the runs are windows of; None where seeds draw new ones."""
    metrics: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Trial:
        """Of its JSON."""
        return cls(**{**row, "good": tuple(row["good"]), "judged": tuple(row["judged"])})

    @property
    def stable(self) -> bool:
        """Whether its queue did not grow; if it did, a longer run would have no good request."""
        return self.behind <= BEHIND_MAX

    @property
    def bad(self) -> tuple[int, ...]:
        """Requests of each batch that are not good."""
        return tuple(n - good for n, good in zip(self.judged, self.good, strict=True))


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


def counted(
    by_rate: Mapping[float, list[Trial]], level: float, n_seeds: int
) -> dict[float, list[Trial]]:
    """Rates that count: those of all seeds, and those that some seeds decide.

    Some decide what fails without load, at the lowest rate, and that a rate is beyond the level,
    where no rate below it is known to be of all seeds: those that decide are not any.
    """
    lowest, found = min(by_rate), {}
    for rate in sorted(by_rate):
        keeps = verdict(by_rate[rate], level, n_seeds)
        if rate == lowest or keeps is not None:
            found[rate] = by_rate[rate]
        if keeps is False and len(by_rate[rate]) == n_seeds:
            break
    for rate in sorted(by_rate):
        if len(by_rate[rate]) == n_seeds:
            found.setdefault(rate, by_rate[rate])
    return found


def verdict(trials: Sequence[Trial], level: float, n_seeds: int) -> bool | None:
    """Whether a rate keeps the level, and the queue as a whole does not grow.

    None if the seeds that have not run yet may decide; a queue never shrinks much in the mean.
    """
    judged = sum(sum(t.judged) for t in trials)
    bad = sum(sum(t.bad) for t in trials)
    left = n_seeds - len(trials)
    unseen = left * judged / max(len(trials), 1)
    if bad > (1 - level) * (judged + unseen) + 1e-9:
        return False
    if sum(t.behind for t in trials) > BEHIND_MAX * n_seeds:
        return False
    return None if left else True
