"""The share of good requests by rate, and how surely it crosses a level.

Each run (one rate, one seed) is told in batches of requests in a row. The share at a rate is that
of the requests of all seeds together. The capacity is where it falls below the level, interpolated
between the rates that ran, or where the queue begins to grow (`tuner/overload.py`) if that comes
first; then its interval is that of the growth.

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

import math
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.rng import rng
from .failures import allowed, design_effect, kish, surprise
from .overload import begins, begins_each, margin
from .trial import Estimate, Trial, counted

CONFIDENCE = 0.95
RESAMPLES = 1000
NEAR = (0.7, 3.0)
"""Rates whose share of failures is so many times what the level allows tell how they cluster."""
FEW = 0.1
"""Of the failures that the level allows: hardly any."""
NEARBY, FURTHER = 0.04, 0.15
"""Logarithms of rates: so far out an end of the interval is extrapolated; the largest step to a
rate that has to run."""

Floats = NDArray[np.float64]


class Attainment:
    """Runs at several rates, and where the share of good requests crosses `level`."""

    def __init__(self, trials: Iterable[Trial], level: float, seeds: Sequence[int]) -> None:
        self.level, self.seeds = level, tuple(seeds)
        by_rate: dict[float, list[Trial]] = {}
        for trial in trials:
            if trial.seed in self.seeds:
                by_rate.setdefault(trial.rate_rps, []).append(trial)
        known = counted(by_rate, level, len(self.seeds))
        self.rates = np.array(sorted(known))
        self.n_ran = [len(known[rate]) for rate in self.rates.tolist()]
        rows = [self._row(known[rate]) for rate in self.rates.tolist()]
        self.bad, self.judged, self.behind = (np.array(x) for x in zip(*rows, strict=True))
        self.share = self.bad.sum(axis=(1, 2)) / self.judged.sum(axis=(1, 2))
        self.n_whole = next((t.n_whole for r in known for t in known[r]), None)

    def _row(self, trials: Sequence[Trial]) -> tuple[Floats, Floats, Floats]:
        """[seeds, batches] bad and judged, [seeds] behind; unseen seeds are as the seen ones."""

        def each(values: dict[int, Any]) -> Floats:
            mean = np.mean(list(values.values()), axis=0)
            return np.array([values.get(s, mean) for s in self.seeds], float)

        return (
            each({t.seed: t.bad for t in trials}),
            each({t.seed: t.judged for t in trials}),
            each({t.seed: t.behind for t in trials}),
        )

    @property
    def rate(self) -> float:
        """The capacity: where the level is crossed, or the queue begins to grow."""
        growth = self._growth
        return self._level if growth is None else min(self._level, growth)

    @property
    def grows(self) -> bool:
        """Whether it is the queue's growth that limits, not the level."""
        return self._growth is not None and self._growth <= self._level

    @property
    def _growth(self) -> float | None:
        return begins(self.rates, self.behind.mean(axis=1))

    @property
    def _level(self) -> float:
        """The crossing of the level, or the last rate."""
        return self._crossing(1 - self.level)

    @property
    def _least(self) -> float:
        """Share of failures that stands for none: half of one."""
        return 0.5 / float(self.judged.sum(axis=(1, 2)).max())

    @property
    def _at(self) -> int:
        """The first rate beyond the crossing, or the last."""
        return min(int(np.searchsorted(self.rates, self._level, side="right")), len(self.rates) - 1)

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
        """Ends of the interval; None for one that lies beyond the rates that ran."""
        (low, high), (from_, to) = self._level_ends(), self._growth_ends()
        highest = min((h for h in (high, to) if h is not None), default=None)
        return (None if low is None else min(low, from_)), highest

    def _growth_ends(self) -> tuple[float, float | None]:
        """Where the queue may begin to grow, and where it surely does, if that is known.

        Beyond what can be served the slope rises as the rate over it: what the slope is uncertain
        by, the rate is, too.
        """
        n = float(self.judged[-1].sum())
        apart = len(self.seeds) * self._n_apart(len(self.rates) - 1) / n
        half, growth = margin(self.behind, apart, CONFIDENCE), self._growth
        if growth is None:
            low = begins(self.rates, self.behind.mean(axis=1) + half)
            return math.inf if low is None else low, None
        at = max(1, int(np.searchsorted(self.rates, growth)))
        width = float(half[at - 1 : at + 1].max())
        return growth * max(0.0, 1 - width), growth * (1 + width)

    def _level_ends(self) -> tuple[float | None, float | None]:
        """Where the level may be crossed, and where it surely is.

        What fails at the lowest rate has nothing to do with load, so it is taken off the level
        where the level is surely above it; if it is not, there is no lower end.
        """
        if self._limits is None:
            return None, None
        at_level, few, many, none_seen = self._limits
        if not self._is_below():
            return None, self._upper(many)
        if few >= FEW * at_level:
            return self._lower(few), self._upper(many)
        return self._below_all(at_level, none_seen), self._upper(many)

    def _lower(self, of_load: float) -> float:
        """Rate that has these failures of load; below those that ran along their slope."""
        load = self.share - self._floor
        if len(load) < 3 or not of_load < load[1] < load[2]:
            return self._crossing(self._floor + of_load)
        slope = math.log(load[2] / load[1]) / math.log(self.rates[2] / self.rates[1])
        found = float(self.rates[1]) * (of_load / load[1]) ** (1 / slope)
        return float(max(self.rates[0], found))

    def _upper(self, of_load: float) -> float | None:
        """The same upwards; None where it is too far beyond the rates that ran."""
        if self.share[-1] > self._floor + of_load:
            return self._crossing(self._floor + of_load)
        step = self._step_to(of_load)
        return None if step is None or step > NEARBY else float(self.rates[-1]) * math.exp(step)

    def _step_to(self, of_load: float) -> float | None:
        """Logarithm of the step from the last rate, along the last slope; None without a slope."""
        load = self.share - self._floor
        if len(load) < 3 or not 0 < load[-2] < load[-1]:
            return None
        slope = math.log(load[-1] / load[-2]) / math.log(self.rates[-1] / self.rates[-2])
        return math.log(of_load / load[-1]) / slope

    def below(self) -> float | None:
        """A rate that would have to run for the lower end to be read between two; None if none."""
        (from_, _), low = self._growth_ends(), self.rate
        if self._limits is not None:
            at_level, few, _, _ = self._limits
            low = self._lower(max(few, FEW * at_level))
        low = min(low, from_)
        above = float(min((r for r in self.rates if r > low), default=self.rates[-1]))
        if len(self.rates) < 2 or above > self.rates[1] or above / low <= math.exp(NEARBY):
            return None
        return max(low, above * math.exp(-FURTHER), float(self.rates[0]) * math.exp(FURTHER))

    def beyond(self) -> float:
        """A rate beyond the last one where the upper end should be known."""
        step = self._step_to(1.2 * self._limits[2]) if self._limits else None
        return float(self.rates[-1]) * math.exp(min(max(step or 0.0, NEARBY), FURTHER))

    @property
    def _floor(self) -> float:
        return float(self.share[0])

    @cached_property
    def _limits(self) -> tuple[float, float, float, float] | None:
        """(failures of load that the level allows, fewest and most not surprising, if none is seen)

        Shares of the requests; the fewest is 0 where none at all would not be surprising.
        """
        at_level = max(1 - self.level, 2 * self._least) - self._floor
        if at_level <= 0:
            return None
        tail = surprise(CONFIDENCE, kish(self.of_load[self._at]) - 1)
        n = self.n_effective(at_level)
        few, many = allowed(n, at_level, tail)
        return at_level, (few or 0.0) / n, many / n, 1 - tail ** (1 / n)

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
        floor = self._floor
        first = self._lower(FEW * at_level)
        more = min(NEAR[1] * at_level, float(self.share[-1]) - floor)
        if more <= at_level:
            return first
        slope = np.log(more / at_level) / max(self._crossing(floor + more) - self._level, 1e-9)
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
        """For [n, seeds, batches] weights: the capacity."""
        bad = np.einsum("nsb,ksb->nk", drawn, self.bad)
        share = bad / np.einsum("nsb,ksb->nk", drawn, self.judged)
        level = _cross(self.rates, share, 1 - self.level, self._least)
        seeds = drawn.sum(axis=2) / drawn.sum(axis=(1, 2))[:, None]
        return np.minimum(level, begins_each(self.rates, seeds @ self.behind.T))


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
