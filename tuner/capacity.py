"""The highest rate that keeps a service level: a bracket, interpolated, with confidence.

One seed fixes the requests; rates only squeeze their arrivals, and all candidates see the same
ones. So the share of good requests falls almost monotonically with the rate, and it is searched
where it crosses the level (`tuner/rate_search.py`): by the first seed alone, then by all; then
rates further out run, until the interval (`tuner/attainment.py`) lies between those that ran. What
is compared is compared pair by pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..core.errors import CacheTuneError
from .attainment import Attainment
from .rate_search import FIRST_TOLERANCE, RATE_MIN_RPS, Evaluate, RateSearch
from .trial import Estimate, Trial, verdict

RATE_MAX_RPS = 1e5


@dataclass(frozen=True)
class Capacity:
    """What `find_capacity` found; `rate` is None where no rate keeps the level."""

    rate: Estimate | None
    first_rps: float | None
    """Of the first seed alone, interpolated."""
    trials: tuple[Trial, ...]
    seeds: tuple[int, ...]
    at_least: bool = False
    grows: bool = False
    """Whether the queue's growth limits it, not the level."""

    def closest(self) -> Trial:
        """The trial with the largest share of good requests; then the one that misses least."""

        def near(trial: Trial) -> tuple[float, float, bool, float, float]:
            kept = trial.metrics.get("in_ttft", 0.0) + trial.metrics.get("in_tpot", 0.0)
            late = trial.metrics.get("ttft_ms_p99", 0.0)
            return trial.good_share, kept, trial.stable, -late, trial.rate_rps

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
    return bool(verdict([trial], attainment, 1))


def find_capacity(
    evaluate: Evaluate,
    attainment: float,
    seeds: Sequence[int],
    *,
    start_rps: float = 1.0,
    tolerance: float = 0.02,
    most_rps: float = RATE_MAX_RPS,
    seeds_at: Callable[[float], Sequence[int]] | None = None,
) -> Capacity:
    """Rate at which the share of good requests falls below `attainment`.

    Args:
        evaluate: simulates one run; the same arguments give the same trial.
        attainment: share of requests that must keep the level, in (0, 1].
        seeds: traffic samples.
        start_rps: where to begin.
        tolerance: relative width at which bisection ends; between rates near the level it may be
            wider, as there the share is interpolated.
        most_rps: what runs can show; a capacity that reaches it is `at_least`.
        seeds_at: those of `seeds` that tell something new at about this rate, its first among them.

    Raises:
        CacheTuneError: no seeds, or an attainment or tolerance out of range.
    """
    _check(attainment, seeds, start_rps, tolerance)
    runs = RateSearch(evaluate, attainment, seeds[:1])
    start = min(start_rps, most_rps)
    low, high = runs.bracket(start, 2.0, max(tolerance, FIRST_TOLERANCE), most_rps)
    first = runs.inside((low, high))
    runs.seeds = tuple(seeds if seeds_at is None or first is None else seeds_at(first))
    if low is None:
        low, high = runs.bracket(start, 2.0, tolerance, most_rps)
    else:
        step = 1 + FIRST_TOLERANCE if high is None else high / low
        low, high = runs.bracket(low, step, tolerance, most_rps)
    if low is None:
        return Capacity(None, first, tuple(runs.trials.values()), runs.seeds)
    runs.settle(low, most_rps)
    table, at_least = runs.attainment(), low >= most_rps
    trials = tuple(runs.trials.values())
    return Capacity(table.estimate(), first, trials, runs.seeds, at_least, table.grows)


def first_capacity(
    evaluate: Evaluate,
    attainment: float,
    seed: int,
    start_rps: float,
    factor: float = 2.0,
    most_rps: float = RATE_MAX_RPS,
) -> float | None:
    """Of one seed, interpolated: what comparisons of it with itself need."""
    runs = RateSearch(evaluate, attainment, (seed,))
    start = min(start_rps, most_rps)
    return runs.inside(runs.bracket(start, factor, max(FIRST_TOLERANCE, factor - 1), most_rps))


def ratio(changed: Capacity, base: Capacity, attainment: float) -> Estimate | None:
    """Capacity of one over another, on the same requests; None where one of them has none."""
    if changed.rate is None or base.rate is None:
        return None
    seeds = [seed for seed in base.seeds if seed in changed.seeds]
    one, other = (Attainment(c.trials, attainment, seeds) for c in (changed, base))
    return one.over(other)


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
