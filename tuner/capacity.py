"""The highest rate that keeps a service level: bisection per seed, interval over seeds.

One seed fixes the requests; rates only squeeze their arrivals, and all candidates see the same
ones. So for one seed the share of good requests falls almost monotonically with the rate, bisection
finds where it crosses, and the spread over seeds is that of the traffic. The interval is Student's
on the logarithm of the rate. What is compared is compared seed by seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..core.errors import CacheTuneError

RATE_MIN_RPS = 1e-3
RATE_MAX_RPS = 1e5
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Trial:
    """One simulated run."""

    rate_rps: float
    seed: int
    good_share: float
    """Of the requests that are judged, those that keep TTFT and TPOT."""
    stable: bool
    """Whether requests left as fast as they came."""
    metrics: dict[str, Any] = field(default_factory=dict)


Evaluate = Callable[[float, int], Trial]
"""(rate, seed) -> what happened."""


@dataclass(frozen=True)
class Estimate:
    """A rate with its 95 % interval; without one (nan) where there is one seed."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Capacity:
    """What `find_capacity` found; `rate` is None where no rate keeps the level."""

    rate: Estimate | None
    by_seed: dict[int, float]
    trials: tuple[Trial, ...]

    def closest(self) -> Trial:
        """The trial with the largest share of good requests; of those, at the highest rate."""
        return max(self.trials, key=lambda t: (t.good_share, t.rate_rps))

    def at_capacity(self, attainment: float) -> Trial:
        """Of the first seed, the fastest that kept the level (else the closest)."""
        seed = self.trials[0].seed
        kept = [t for t in self.trials if t.seed == seed and keeps(t, attainment)]
        return max(kept, key=lambda t: t.rate_rps) if kept else self.closest()


def keeps(trial: Trial, attainment: float) -> bool:
    """Whether enough requests are good and the queue does not grow."""
    return trial.stable and trial.good_share >= attainment


def find_capacity(
    evaluate: Evaluate,
    attainment: float,
    seeds: Sequence[int],
    *,
    start_rps: float = 1.0,
    tolerance: float = 0.02,
) -> Capacity:
    """Rate at which the share of good requests falls below `attainment`.

    Args:
        evaluate: simulates one run; the same arguments give the same trial.
        attainment: share of requests that must keep the level, in (0, 1].
        seeds: traffic samples; two or more give an interval.
        start_rps: where to begin.
        tolerance: relative width at which bisection of one seed ends.

    Raises:
        CacheTuneError: no seeds, or an attainment or tolerance out of range.
    """
    _check(attainment, seeds, start_rps, tolerance)
    trials: list[Trial] = []

    def good(rate: float, seed: int) -> bool:
        trials.append(evaluate(rate, seed))
        return keeps(trials[-1], attainment)

    by_seed: dict[int, float] = {}
    guess, factor = start_rps, 2.0
    for seed in seeds:
        rate = _bisect(lambda r, s=seed: good(r, s), guess, factor, tolerance)
        if rate is None:
            return Capacity(None, by_seed, tuple(trials))
        by_seed[seed] = rate
        guess, factor = rate, 1.0 + 4 * tolerance  # seeds are alike: look near the last one
    return Capacity(interval(list(by_seed.values())), by_seed, tuple(trials))


def interval(rates: Sequence[float]) -> Estimate:
    """Geometric mean of positive values with Student's 95 % interval."""
    logs = np.log(rates)
    mean = float(logs.mean())
    if len(logs) < 2:
        return Estimate(math.exp(mean), math.nan, math.nan)
    from scipy.stats import t

    half = float(t.ppf((1 + CONFIDENCE) / 2, len(logs) - 1) * logs.std(ddof=1) / len(logs) ** 0.5)
    return Estimate(math.exp(mean), math.exp(mean - half), math.exp(mean + half))


def ratio(changed: Capacity, base: Capacity) -> Estimate | None:
    """Capacity of one over another, seed by seed; None where one of them has none."""
    if changed.rate is None or base.rate is None:
        return None
    common = [s for s in base.by_seed if s in changed.by_seed]
    return interval([changed.by_seed[s] / base.by_seed[s] for s in common])


def _bisect(
    good: Callable[[float], bool], guess: float, factor: float, tolerance: float
) -> float | None:
    """Highest good rate within the tolerance; None if even the lowest is not."""
    low = high = guess
    step = factor
    if good(guess):
        while True:
            high = min(low * step, RATE_MAX_RPS)
            if high <= low or not good(high):
                break
            low, step = high, min(step * step, 4.0)
        if high <= low:
            return low
    else:
        while True:
            low = max(high / step, RATE_MIN_RPS)
            if low >= high:
                return None
            if good(low):
                break
            high, step = low, min(step * step, 16.0)
    while high / low > 1 + tolerance:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if good(middle) else (low, middle)
    return math.sqrt(low * high)


def _check(attainment: float, seeds: Sequence[int], start_rps: float, tolerance: float) -> None:
    if not 0 < attainment <= 1:
        raise CacheTuneError(
            "the attainment must be a share in (0, 1]", values=str(attainment), remedy="0.99, say"
        )
    if not seeds or len(set(seeds)) < len(seeds):
        raise CacheTuneError("seeds must be different, at least one", values=str(list(seeds)))
    if not RATE_MIN_RPS <= start_rps <= RATE_MAX_RPS or not 1e-4 <= tolerance <= 1:
        raise CacheTuneError(
            "the search must start at a sensible rate and end",
            values=f"start_rps={start_rps}, tolerance={tolerance}",
        )
