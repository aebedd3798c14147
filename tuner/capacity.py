"""The highest rate that keeps a service level: bisection, with confidence.

One seed fixes the requests; rates only squeeze their arrivals, and all candidates see the same
ones. So the share of good requests falls almost monotonically with the rate, and bisection finds
where it crosses. The first seed alone finds the neighbourhood; there all seeds run, fewer where
those that ran have decided, and bisection ends at the tolerance or where a narrower bracket would
be far inside the interval (`tuner/attainment.py`); then rates further out, until the interval lies
between those that ran. What is compared is compared pair by pair.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..core.errors import CacheTuneError
from .attainment import Attainment, Estimate, Trial, verdict

RATE_MIN_RPS = 1e-3
RATE_MAX_RPS = 1e5
FIRST_TOLERANCE = 0.05
"""Of the first seed's own bracket."""
INSIDE = 0.25
"""A bracket of this share of the interval is narrow enough."""
IDLE = 8.0
"""At the capacity divided by this, requests hardly meet."""
BEYOND_MAX = 8
"""Rates that are tried, about, to find the upper end of the interval."""

Evaluate = Callable[[float, int], Trial]
"""(rate, seed) -> what happened."""


@dataclass(frozen=True)
class Capacity:
    """What `find_capacity` found; `rate` is None where no rate keeps the level."""

    rate: Estimate | None
    first_rps: float | None
    """Of the first seed alone, within `FIRST_TOLERANCE`."""
    trials: tuple[Trial, ...]
    seeds: tuple[int, ...]
    at_least: bool = False

    def closest(self) -> Trial:
        """The trial with the largest share of good requests; then the one that misses least."""

        def near(trial: Trial) -> tuple[float, float, bool, float]:
            kept = trial.metrics.get("in_ttft", 0.0) + trial.metrics.get("in_tpot", 0.0)
            return trial.good_share, kept, trial.stable, trial.rate_rps

        return max(self.trials, key=near)

    def at_capacity(self) -> Trial:
        """Of the first seed, the fastest run that is not beyond the capacity (else the closest)."""
        if self.rate is None:
            return self.closest()
        limit = self.rate.value * (1 + 1e-9)
        below = [t for t in self.trials if t.seed == self.seeds[0] and t.rate_rps <= limit]
        return max(below, key=lambda t: t.rate_rps) if below else self.closest()


def keeps(trial: Trial, attainment: float) -> bool:
    """Whether enough requests are good and the queue does not grow."""
    return trial.stable and trial.good_share >= attainment


def find_capacity(
    evaluate: Evaluate,
    attainment: float,
    seeds: Sequence[int],
    *,
    start_rps: float = 1.0,
    factor: float = 2.0,
    tolerance: float = 0.02,
    most_rps: float = RATE_MAX_RPS,
) -> Capacity:
    """Rate at which the share of good requests falls below `attainment`.

    Args:
        evaluate: simulates one run; the same arguments give the same trial.
        attainment: share of requests that must keep the level, in (0, 1].
        seeds: traffic samples.
        start_rps: where to begin.
        factor: first step away from there; steps grow.
        tolerance: relative width at which bisection ends.
        most_rps: what runs can show; a capacity that reaches it is `at_least`.

    Raises:
        CacheTuneError: no seeds, or an attainment or tolerance out of range.
    """
    _check(attainment, seeds, start_rps, tolerance)
    runs = _Runs(evaluate, attainment, tuple(seeds))
    start = min(start_rps, most_rps)
    first = _bisect(runs.first_keeps, start, factor, lambda: FIRST_TOLERANCE, most_rps)
    guess, step = (start, factor) if first is None else (first, 1 + 4 * tolerance)
    enough = lambda: max(tolerance, INSIDE * runs.width())  # noqa: E731
    rate = _bisect(runs.keeps, guess, step, enough, most_rps)
    estimate = None
    if rate is not None:
        runs.settle(rate, 1 + 2 * tolerance, most_rps)
        estimate = runs.attainment().estimate()
    at_least = rate is not None and rate >= most_rps
    return Capacity(estimate, first, tuple(runs.trials.values()), runs.seeds, at_least)


def first_capacity(
    evaluate: Evaluate,
    attainment: float,
    seed: int,
    start_rps: float,
    factor: float = 2.0,
    most_rps: float = RATE_MAX_RPS,
) -> float | None:
    """Of one seed, within `FIRST_TOLERANCE`: what comparisons of it with itself need."""
    runs = _Runs(evaluate, attainment, (seed,))
    start = min(start_rps, most_rps)
    return _bisect(runs.first_keeps, start, factor, lambda: FIRST_TOLERANCE, most_rps)


class _Runs:
    """Every run once."""

    def __init__(self, evaluate: Evaluate, level: float, seeds: tuple[int, ...]) -> None:
        self.evaluate, self.level, self.seeds = evaluate, level, seeds
        self.trials: dict[tuple[float, int], Trial] = {}

    def trial(self, rate: float, seed: int) -> Trial:
        if (rate, seed) not in self.trials:
            self.trials[rate, seed] = self.evaluate(rate, seed)
        return self.trials[rate, seed]

    def first_keeps(self, rate: float) -> bool:
        return keeps(self.trial(rate, self.seeds[0]), self.level)

    def keeps(self, rate: float) -> bool:
        """Of all seeds together; those that cannot turn it do not run."""
        ran: list[Trial] = []
        found = None
        for seed in self.seeds:
            ran.append(self.trial(rate, seed))
            found = verdict(ran, self.level, len(self.seeds))
            if found is not None:
                break
        return bool(found)

    def attainment(self) -> Attainment:
        return Attainment(self.trials.values(), self.level, self.seeds)

    def width(self) -> float:
        """Of the interval, relative to the rate, as far as it is known."""
        found = self.attainment().estimate()
        return (found.high - found.low) / found.value

    def settle(self, rate: float, step: float, most_rps: float) -> None:
        """Run what the interval around the capacity `rate` lacks.

        A rate so low that what fails there does so without any load, rates beyond the upper end,
        and the seeds that are missing in between.
        """
        self.all_seeds(max(rate / IDLE, RATE_MIN_RPS))
        for _ in range(2 * BEYOND_MAX):
            table = self.attainment()
            higher = min(float(table.rates[-1]) * step, most_rps)
            if table.ends()[1] is None and higher > table.rates[-1]:
                self.all_seeds(higher)
                step = min(step**2, 2.0)
            elif not self.completed():
                break

    def completed(self) -> bool:
        """Run the seeds that are missing inside the interval and at the rates next to it.

        Those that ran there are not any seeds: they are the ones that decided against a rate.
        """
        found, rates = self.attainment().estimate(), sorted({rate for rate, _ in self.trials})
        begin = max(0, bisect_left(rates, found.low) - 1)
        before = len(self.trials)
        for rate in rates[begin : bisect_right(rates, found.high) + 1]:
            self.all_seeds(rate)
        return len(self.trials) > before

    def all_seeds(self, rate: float) -> None:
        for seed in self.seeds:
            self.trial(rate, seed)


def ratio(changed: Capacity, base: Capacity, attainment: float) -> Estimate | None:
    """Capacity of one over another, on the same requests; None where one of them has none."""
    if changed.rate is None or base.rate is None:
        return None
    one, other = (Attainment(c.trials, attainment, base.seeds) for c in (changed, base))
    return one.over(other)


def _bisect(
    good: Callable[[float], bool],
    guess: float,
    factor: float,
    tolerance: Callable[[], float],
    most: float,
) -> float | None:
    """Highest good rate within the tolerance; None if even the lowest is not."""
    low = high = guess
    step = factor
    if good(guess):
        while True:
            high = min(low * step, most)
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
    while high / low > 1 + tolerance():
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
