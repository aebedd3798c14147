"""Which rates run, and for which seeds: a bracket of the capacity, then what its interval lacks.

One seed finds the neighbourhood: how fast the queue of an overload grew says where to look. All
seeds then run at both ends of its bracket. Between two rates that are near the
level the share is straight enough, in logarithms, to interpolate; otherwise bisection goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from .attainment import FEW, Attainment
from .overload import BEHIND_MAX
from .trial import Trial, verdict

RATE_MIN_RPS = 1e-3
FIRST_TOLERANCE = 0.06
"""Width of the bracket of the first seed alone."""
CLOSER = 1.15
"""Steps larger than that are taken where nothing says how far away the capacity is."""
BUSY = 0.95
"""Of what an overloaded engine can do: the level is mostly lost a little earlier."""
APART = 1.015
"""Rates nearer to each other than that tell the same."""
STRAIGHT = 4.0
"""So many tolerances may lie between rates that are near the level."""
FAR = math.log(5.0)
"""Rates with so many times the failures that are allowed, or so few, are not near the level."""
INSIDE = 0.25
"""A bracket of this share of the interval is narrow enough."""
IDLE = 8.0
"""At the capacity divided by this, requests hardly meet."""
ROUNDS = 12
"""Rates that are run for the interval, at most."""

Evaluate = Callable[[float, int], Trial]
"""(rate, seed) -> what happened."""
Bracket = tuple[float | None, float | None]
"""The highest rate known to keep the level, the lowest known not to."""


class RateSearch:
    """Every run once; `seeds` are those that must agree."""

    def __init__(self, evaluate: Evaluate, level: float, seeds: Sequence[int]) -> None:
        self.evaluate, self.level, self.seeds = evaluate, level, tuple(seeds)
        self.trials: dict[tuple[float, int], Trial] = {}

    def trial(self, rate: float, seed: int) -> Trial:
        if (rate, seed) not in self.trials:
            self.trials[rate, seed] = self.evaluate(rate, seed)
        return self.trials[rate, seed]

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

    def all_seeds(self, rate: float) -> None:
        for seed in self.seeds:
            self.trial(rate, seed)

    def attainment(self) -> Attainment:
        return Attainment(self.trials.values(), self.level, self.seeds)

    # -- the bracket ------------------------------------------------------------------------------

    def bracket(self, start: float, factor: float, tolerance: float, most: float) -> Bracket:
        """A narrow one, or what there is where no rate, or even `most`, keeps the level."""
        low, high = 0.0, math.inf
        rate, step = start, factor
        while low == 0 or high == math.inf or not self._is_narrow(low, high, tolerance):
            if self.keeps(rate):
                low, wanted = rate, rate * min(step, 4.0)
            else:
                high, wanted = rate, rate / step
            if (rate >= most and low) or (rate <= RATE_MIN_RPS and high < math.inf):
                break
            served = self._served(rate)
            if step > CLOSER and served and low < served < high:
                rate, step = served, tolerance + 1
            else:
                rate, step = self._next(wanted, low, high, most), min(step**2, 16.0)
        return low or None, None if high == math.inf else high

    def inside(self, bracket: Bracket) -> float | None:
        """The capacity, interpolated inside a bracket; None where no rate keeps the level."""
        low, high = bracket
        if low is None or high is None:
            return low
        return min(max(self.attainment().rate, low), high)

    def _next(self, wanted: float, low: float, high: float, most: float) -> float:
        """`wanted` or a rate near it that ran; where it is not inside, the middle of what is."""
        if low and high < math.inf and not low * APART < wanted < high / APART:
            return math.sqrt(low * high)
        near = [r for r, _ in self.trials if low < r < high and 1 / APART < r / wanted < APART]
        wanted = min(near, key=lambda r: abs(math.log(r / wanted)), default=wanted)
        return min(max(wanted, RATE_MIN_RPS), most)

    def _served(self, rate: float) -> float | None:
        """About what the first seed's engines can do, as an overload of them shows."""
        trial = self.trials[rate, self.seeds[0]]
        return BUSY * rate / (1 + trial.behind) if trial.behind > BEHIND_MAX else None

    def _is_narrow(self, low: float, high: float, tolerance: float) -> bool:
        width = high / low - 1
        if width <= tolerance + 1e-9 or len(self.seeds) == 1:
            return width <= tolerance + 1e-9
        if width <= STRAIGHT * tolerance and self._is_straight(low, high):
            return True
        found = self.attainment().estimate()
        return width <= INSIDE * (found.high - found.low) / found.value

    def _is_straight(self, low: float, high: float) -> bool:
        """Whether both are near the level, or the queue begins to grow between them."""
        below, above = self._misses(low), self._misses(high)
        return above <= 0 or (below > -FAR and above < FAR)

    def _misses(self, rate: float) -> float:
        """Logarithm of the failures over those allowed."""
        ran = [t for (r, _), t in self.trials.items() if r == rate]
        judged, bad = sum(sum(t.judged) for t in ran), sum(sum(t.bad) for t in ran)
        return math.log(max(bad, 0.5) / max((1 - self.level) * judged, 0.5))

    # -- its interval -----------------------------------------------------------------------------

    def settle(self, rate: float, most: float) -> None:
        """Run what the interval around the capacity, at `rate` or above, lacks.

        A rate so low that what fails there does so without any load; the seeds that are missing at
        rates that count, as those that ran are not any: they decided against it; rates beyond the
        upper end, and near both ends.
        """
        idle = max(rate / IDLE, RATE_MIN_RPS)
        first = self.trial(idle, self.seeds[0])
        if sum(first.bad) > FEW * (1 - self.level) * sum(first.judged):
            self.all_seeds(idle)
        for _ in range(ROUNDS):
            wanted = self._missing(most)
            if wanted is None:
                break
            self.all_seeds(wanted)

    def _missing(self, most: float) -> float | None:
        """The rate that the interval needs next."""
        table = self.attainment()
        found, rates = table.estimate(), table.rates.tolist()
        begin = max((r for r in rates if r < found.low), default=rates[0])
        end = min((r for r in rates if r > found.high), default=rates[-1])
        counted = zip(rates[1:], table.n_ran[1:], strict=True)
        partly = [r for r, n in counted if n < len(self.seeds) and begin <= r <= end]
        if partly:
            return float(min(partly, key=lambda r: abs(math.log(r / found.value))))
        if table.ends()[1] is None and rates[-1] < most:
            return min(table.beyond(), most)
        return table.below()
