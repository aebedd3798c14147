"""The share of good requests by rate, and how surely it crosses a level.

Each run (one rate, one seed) is told in batches of requests in a row. The share at a rate is that
of the requests of all seeds together, none of an overloaded run being good, and the capacity is
where it falls below the level, interpolated between the rates that ran.

Its interval is a test turned round: a rate is inside if so many failures as were seen there are
not surprising where the level is just kept. Failures come in bursts, so requests count as fewer:
their number is divided by the variance of the batches over that of independent requests (batch
means; Law, Simulation Modeling and Analysis, section 9.5), and once more by how often windows of
one trace overlap. The failures allowed are binomial (mid-P), the tail that of Student with as many
degrees of freedom as batches count (Kish's effective number, less one). Where even no failure at
all would not be surprising, the lower end goes on down along the slope of the failures' logarithm.
It leaves out what no run shows, such as bursts that are longer than the runs. How often it holds
the truth is tested on queues in `tests/tuner/test_coverage.py`.

What is compared on the same requests is compared by a two-stage bootstrap over seeds and batches
(Davison and Hinkley 1997, section 3.8).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.rng import rng
from .failures import allowed, design_effect, kish, surprise

CONFIDENCE = 0.95
RESAMPLES = 1000
BATCHES = 10
NEAR = (0.7, 3.0)
"""Rates whose share of failures is so many times what the level allows tell how they cluster."""
FEW = 0.1
"""Of the failures that the level allows: hardly any."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Trial:
    """One simulated run."""

    rate_rps: float
    seed: int
    good_share: float
    """Of the requests that are judged, those that keep TTFT and TPOT."""
    stable: bool
    """Whether the queue did not grow; if it did, a longer run would have no good request."""
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
    def bad(self) -> tuple[int, ...]:
        """Requests of each batch that do not count as good."""
        if not self.stable:
            return self.judged
        return tuple(n - good for n, good in zip(self.judged, self.good, strict=True))


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


class Attainment:
    """Runs at several rates, and where the share of good requests crosses `level`."""

    def __init__(self, trials: Iterable[Trial], level: float, seeds: Sequence[int]) -> None:
        self.level, self.seeds = level, tuple(seeds)
        by_rate: dict[float, list[Trial]] = {}
        for trial in trials:
            by_rate.setdefault(trial.rate_rps, []).append(trial)
        known = {r: t for r, t in by_rate.items() if verdict(t, level, len(self.seeds)) is not None}
        self.rates = np.array(sorted(known))
        rows = [self._row(known[rate]) for rate in self.rates.tolist()]
        self.bad = np.array([r[0] for r in rows])
        self.judged = np.array([r[1] for r in rows])
        self.share = self.bad.sum(axis=(1, 2)) / self.judged.sum(axis=(1, 2))
        self.n_whole = next((t.n_whole for r in known for t in known[r]), None)

    def _row(self, trials: Sequence[Trial]) -> tuple[Floats, Floats]:
        """[seeds, batches] bad and judged; unseen seeds are as the seen ones."""
        bad = {t.seed: np.array(t.bad, float) for t in trials}
        judged = {t.seed: np.array(t.judged, float) for t in trials}
        mean = [np.mean(list(x.values()), axis=0) for x in (bad, judged)]
        return (
            np.array([bad.get(s, mean[0]) for s in self.seeds]),
            np.array([judged.get(s, mean[1]) for s in self.seeds]),
        )

    @property
    def rate(self) -> float:
        """The crossing."""
        return self._crossing(1 - self.level)

    @property
    def _least(self) -> float:
        """Share of failures that stands for none: half of one."""
        return 0.5 / float(self.judged.sum(axis=(1, 2)).max())

    @property
    def _at(self) -> int:
        """The first rate beyond the crossing, or the last."""
        return min(int(np.searchsorted(self.rates, self.rate, side="right")), len(self.rates) - 1)

    @property
    def of_load(self) -> Floats:
        """[rates, seeds, batches] failures that the lowest rate does not have: those of load."""
        return np.asarray(np.maximum(self.bad - self.bad[0], 0.0))

    def n_effective(self, at_level: float) -> float:
        """Independent requests that tell as much of the failures of load near the crossing.

        Args:
            at_level: share of them that is allowed.
        """
        of_load = self.of_load
        share = of_load.sum(axis=(1, 2)) / self.judged.sum(axis=(1, 2))
        found = np.flatnonzero((share >= NEAR[0] * at_level) & (share <= NEAR[1] * at_level))
        near = found.tolist() or [self._at]
        effects = [design_effect(of_load[k], self.judged[k]) for k in near]
        return self._n_apart(self._at) / float(np.mean(effects))

    def _n_apart(self, k: int) -> float:
        """Requests at a rate, those in two windows of one trace once."""
        n = float(self.judged[k].sum())
        return n / max(1.0, n / self.n_whole) if self.n_whole else n

    def ends(self) -> tuple[float | None, float | None]:
        """Ends of the interval; None for one that lies beyond the rates that ran.

        What fails at the lowest rate has nothing to do with load, so it is taken off the level
        where the level is surely above it; if it is not, there is no lower end.
        """
        tail = surprise(CONFIDENCE, kish(self.of_load[self._at]) - 1)
        floor = float(self.share[0])
        at_level = max(1 - self.level, 2 * self._least) - floor
        if at_level <= 0:
            return None, None
        n = self.n_effective(at_level)
        few, many = (None if k is None else k / n for k in allowed(n, at_level, tail))
        assert many is not None
        high = None if self.share[-1] <= floor + many else self._crossing(floor + many)
        if not self._is_below():
            return None, high
        if few is not None and few >= FEW * at_level:
            return self._crossing(floor + few), high
        return self._below_all(at_level, 1 - tail ** (1 / n)), high

    def _is_below(self) -> bool:
        """Whether the lowest rate is surely one that keeps the level."""
        n = self._n_apart(0) / design_effect(self.bad[0], self.judged[0])
        tail = surprise(CONFIDENCE, kish(self.bad[0]) - 1)
        few = allowed(n, max(1 - self.level, 2 * self._least), tail)[0]
        return float(self.share[0]) <= max(self._least, (few or 0.0) / n)

    def _below_all(self, at_level: float, unseen: float) -> float:
        """Rate that has the allowed failures if there are `unseen` where hardly any are seen.

        Further down than what was seen: along the slope of the failures' logarithm.
        """
        floor = float(self.share[0])
        first = self._crossing(floor + FEW * at_level)
        more = min(NEAR[1] * at_level, float(self.share[-1]) - floor)
        if more <= at_level:
            return first
        slope = np.log(more / at_level) / max(self._crossing(floor + more) - self.rate, 1e-9)
        return max(0.0, first - max(0.0, float(np.log(unseen / at_level) / slope)))

    def estimate(self) -> Estimate:
        """The crossing with its interval; 0 where no rate is sure to keep the level."""
        low, high = self.ends()
        value = self.rate
        return Estimate(
            value,
            0.0 if low is None else min(value, low),
            max(value, float(self.rates[-1]) if high is None else high),
        )

    def over(self, base: Attainment) -> Estimate:
        """This crossing over another's; both draw the same seeds and batches, so it is paired."""
        drawn = weights(*self.bad.shape[1:])
        resampled = self._crossings(drawn) / base._crossings(drawn)
        value = self.rate / base.rate
        tails = [surprise(CONFIDENCE, kish(a.of_load[a._at]) - 1) for a in (self, base)]
        return _percentiles(value, resampled, min(tails))

    def _crossing(self, bad_share: float) -> float:
        """Rate where, going up, this share of failures is first exceeded."""
        return float(_cross(self.rates, self.share[None], bad_share, self._least)[0])

    def _crossings(self, drawn: Floats) -> Floats:
        """For [n, seeds, batches] weights: where the level is first not kept."""
        bad = np.einsum("nsb,ksb->nk", drawn, self.bad)
        share = bad / np.einsum("nsb,ksb->nk", drawn, self.judged)
        return _cross(self.rates, share, 1 - self.level, self._least)


def _cross(rates: Floats, share: Floats, limit: float, least: float) -> Floats:
    """For [n, rates] shares of failures: the rate of `limit`, or the first or last one.

    Between rates by the logarithm of the share, which falls about linearly with the rate in a
    queue; `least` stands for none.
    """
    fails = share > limit + 1e-12
    last = len(rates) - 1
    at = np.where(fails.any(axis=1), fails.argmax(axis=1), last)
    below = np.maximum(at - 1, 0)
    n = np.arange(len(share))
    known = np.log(np.maximum(share, least))
    rise = known[n, at] - known[n, below]
    missing = np.log(max(limit, least)) - known[n, below]
    part = np.clip(missing / np.where(rise > 0, rise, 1.0), 0.0, 1.0)
    found = np.exp((1 - part) * np.log(rates[below]) + part * np.log(rates[at]))
    found = np.where(fails[:, 0], rates[0], found)
    return np.asarray(np.where(fails.any(axis=1), found, rates[-1]))


def verdict(trials: Sequence[Trial], level: float, n_seeds: int) -> bool | None:
    """Whether a rate keeps the level; None if the seeds that have not run yet may decide."""
    judged = sum(sum(t.judged) for t in trials)
    bad = sum(sum(t.bad) for t in trials)
    left = n_seeds - len(trials)
    unseen = left * judged / max(len(trials), 1)
    if bad > (1 - level) * (judged + unseen) + 1e-9:
        return False
    return None if left else True


@lru_cache(maxsize=8)
def weights(n_seeds: int, n_batches: int) -> Floats:
    """[RESAMPLES, seeds, batches] how often each batch is drawn; the same ones each time."""
    stream = rng(0, "bootstrap", n_seeds, n_batches)
    drawn = stream.integers(0, n_seeds, (RESAMPLES, n_seeds))
    batches = stream.multinomial(n_batches, np.full(n_batches, 1 / n_batches), drawn.shape)
    found = np.zeros((RESAMPLES, n_seeds, n_batches))
    np.add.at(found, (np.arange(RESAMPLES)[:, None], drawn), batches)
    return found


def _percentiles(value: float, resampled: Floats, tail: float) -> Estimate:
    """Of `resampled`, stretched from the normal's tail to `tail` each way."""
    from scipy.stats import norm

    half = (1 - CONFIDENCE) / 2
    stretch = float(norm.isf(tail) / norm.isf(half))
    ends = np.percentile(resampled, (100 * half, 100 - 100 * half)) / value
    low, high = ends**stretch * value
    return Estimate(value, min(value, float(low)), max(value, float(high)))
