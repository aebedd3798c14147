"""The fewest replicas that carry a target rate, simulated together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..core.step_cost import StepCost
from .candidate import Candidate
from .capacity import keeps
from .question import Question, runner
from .trial import Trial, verdict

TOGETHER_MAX = 256
"""More replicas than that are counted by division."""
REPLICAS_MAX = 4 * TOGETHER_MAX
"""Of those that may be tried to be sure."""


def fleet_row(question: Question, candidate: Candidate, row: Mapping[str, Any]) -> dict[str, Any]:
    """The fewest replicas that carry the target rate, simulated together.

    Several share bursts, so they are often fewer than by division. The first seed finds the count;
    all seeds must agree to it. `replicas_high` is what would be needed to be sure.
    """
    target = question.target_rps
    if target is None:
        return {"replicas": None, "fleet_usd_per_h": None, "fleet": None}
    by_division = math.ceil(target / row["capacity_rps"])
    if by_division > TOGETHER_MAX:
        return _by_division(row, target, by_division)
    most = 2 * by_division + 4
    fleets = _Fleets(question, candidate, target)
    count = fewest(fleets.first_carries, min(by_division, most), most)
    while count is not None and not fleets.carries(count):
        count = count + 1 if count < most else None
    price = row["usd_per_h"]
    if count is None:
        trials = fleets.runs(most, question.seeds[:1])
        return {
            "replicas": None,
            "fleet_usd_per_h": None,
            "fleet": trials[0].metrics,
            "why_not": f"{most} replicas do not keep the level at {target:g} req/s "
            f"({100 * good_share(trials):.1f} % good)",
        }
    trials = fleets.runs(count, question.seeds_at(target))
    per_h = None if price is None else price * count
    return {
        "replicas": count,
        "replicas_high": _to_be_sure(question, candidate, row, count),
        "fleet_usd_per_h": per_h,
        "fleet_usd_per_mtok": per_mtok(per_h, tokens_per_s(trials[0])),
        "fleet_good_share": good_share(trials),
        "fleet": trials[0].metrics,
    }


def _by_division(row: Mapping[str, Any], target: float, count: int) -> dict[str, Any]:
    price, low = row["usd_per_h"], row["low_rps"]
    how = f"replicas by division: more than {TOGETHER_MAX} are not simulated together"
    return {
        "replicas": count,
        "replicas_high": math.ceil(target / low) if low > 0 else None,
        "fleet_usd_per_h": None if price is None else price * count,
        "fleet_usd_per_mtok": row["usd_per_mtok"],
        "fleet": None,
        "note": "; ".join([text for text in (row["note"], how) if text]),
    }


def _to_be_sure(
    question: Question, candidate: Candidate, row: Mapping[str, Any], count: int
) -> int | None:
    """Replicas if the kernels are slow and the traffic is hard; None beyond `REPLICAS_MAX`.

    Kernels at the slow end of their interval, and a rate that is higher by as much as the capacity
    may be lower for the traffic's sake.
    """
    assert question.target_rps is not None
    if not row["capacity_low_rps"]:
        return None
    rate = question.target_rps * row["capacity_rps"] / row["capacity_low_rps"]
    cost = candidate.cost(question.model, "high_s") if question.kernel_band else None
    fleets = _Fleets(question, candidate, rate, cost)
    most = min(REPLICAS_MAX, 16 * count + 16)
    low = row["low_rps"]
    guess = min(most, math.ceil(count * row["capacity_rps"] / low)) if low > 0 else count
    return fewest(lambda n: n >= count and fleets.first_carries(n), guess, most)


class _Fleets:
    """Equal replicas of a candidate at one rate, each number of them for each seed run once."""

    def __init__(
        self, question: Question, candidate: Candidate, rate: float, cost: StepCost | None = None
    ) -> None:
        self.question, self.candidate, self.rate, self.cost = question, candidate, rate, cost
        self.trials: dict[tuple[int, int], Trial] = {}

    def trial(self, count: int, seed: int) -> Trial:
        key = count, seed
        if key not in self.trials:
            run = runner(self.question, self.candidate, n_replicas=count, cost=self.cost)
            self.trials[key] = run(self.rate, seed)
        return self.trials[key]

    def runs(self, count: int, seeds: Sequence[int]) -> list[Trial]:
        return [self.trial(count, seed) for seed in seeds]

    def first_carries(self, count: int) -> bool:
        return keeps(self.trial(count, self.question.seeds[0]), self.question.attainment)

    def carries(self, count: int) -> bool:
        """Of all seeds together; those that cannot turn it do not run."""
        seeds, level = self.question.seeds_at(self.rate), self.question.attainment
        for n in range(1, len(seeds) + 1):
            found = verdict(self.runs(count, seeds[:n]), level, len(seeds))
            if found is not None:
                return found
        return False


def fewest(carries: Callable[[int], bool], guess: int, most: int) -> int | None:
    """Smallest count that carries, if more never carry less; None if `most` does not."""
    low, high, step = 0, guess, max(1, guess // 4)
    if carries(guess):
        while (low := max(0, high - step)) > 0 and carries(low):
            high, step = low, 2 * step
    else:
        low = guess
        while low < most and not carries(high := min(most, low + step)):
            low, step = high, 2 * step
        if low == most:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if carries(middle) else (middle, high)
    return high


def good_share(trials: Sequence[Trial]) -> float:
    """Of the requests of all runs together."""
    return sum(sum(t.good) for t in trials) / sum(sum(t.judged) for t in trials)


def tokens_per_s(trial: Trial) -> float:
    m = trial.metrics
    return float(m["prompt_tokens_per_s"] + m["output_tokens_per_s"])


def per_mtok(usd_per_h: float | None, tokens_per_s: float) -> float | None:
    """Dollars per million tokens, prompt and output together."""
    return None if usd_per_h is None else usd_per_h / (tokens_per_s * 3600 / 1e6)
