"""A question of capacity planning, and its runs of a candidate."""

from __future__ import annotations

import math

from pydantic import Field, model_validator

from ..core.model_spec import ModelSpec
from ..core.record import Record
from ..core.step_cost import StepCost
from ..core.workload import Slo
from ..simulator.serving_fleet import Fleet
from .candidate import Candidate
from .capacity import RATE_MAX_RPS
from .evaluate import RunLength, evaluate
from .rate_search import Evaluate
from .traffic import Traffic, apart
from .trial import Trial

LIMITS = 20
"""A run is so many times as long as the TTFT that is allowed."""
RAMP = 4
"""Conversations may take so many times as many requests to get under way as are judged."""
BURSTS = 5
"""Bursts of late requests that the runs of all seeds together may show."""


class Question(Record):
    """What is asked, apart from the candidates."""

    model: ModelSpec
    slo: Slo
    class_slo: dict[str, Slo] = Field(default_factory=dict)
    """Levels of classes of the traffic; `slo` holds for the others."""
    priority: tuple[str, ...] = ()
    """Classes that are admitted first."""
    attainment: float = Field(default=0.99, gt=0, le=1)
    """Share of all requests that keep the level of their class."""
    traffic: Traffic
    target_rps: float | None = Field(default=None, gt=0)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    length: RunLength = RunLength()
    tolerance: float = Field(default=0.02, ge=1e-3, le=0.5)
    kernel_band: bool = True
    """Whether to search again with the kernels at either end of their interval."""

    @property
    def runs(self) -> RunLength:
        """How much traffic a run has: what is asked, or more where that would not show it.

        The queue needs time to grow by the TTFT that is allowed, and one burst of late requests
        lasts about as long: all seeds together should see several. A trace has as many as it has:
        together they are as long.
        """
        ttft_s = self.longest_ttft_s
        misses = max(1 - self.attainment, 1 / self.length.max_requests)
        bursts_s = ttft_s * BURSTS / misses / len(self.seeds)
        fewest = self.length.min_requests
        if self.traffic.n_whole is not None:
            fewest = max(fewest, math.ceil(self.traffic.n_whole / len(self.seeds)))
            bursts_s = 0.0
        return self.length.replace(
            horizon_s=max(self.length.horizon_s, LIMITS * ttft_s, bursts_s),
            min_requests=min(fewest, max(self.length.min_requests, self.length.max_requests)),
        )

    @property
    def longest_ttft_s(self) -> float:
        """Of what the classes are allowed."""
        return max(level.ttft_ms for level in (self.slo, *self.class_slo.values())) / 1e3

    @property
    def asked(self) -> str:
        """The service level, in words."""
        classes = "; ".join(
            f"{name} {level.ttft_ms:g} and {level.tpot_ms:g} ms"
            for name, level in self.class_slo.items()
        )
        return (
            f"TTFT ≤ {self.slo.ttft_ms:g} ms and TPOT ≤ {self.slo.tpot_ms:g} ms "
            f"{f'({classes}) ' if classes else ''}for {100 * self.attainment:g} % of requests"
        )

    def fleet(self, candidate: Candidate, n_replicas: int = 1) -> Fleet:
        """Equal replicas of a candidate, held to the levels that are asked for."""
        fleet = candidate.fleet(self.model, self.slo, n_replicas)
        return fleet.with_classes(self.class_slo, self.priority)

    def seeds_at(self, rate_rps: float) -> tuple[int, ...]:
        """Those that tell something new at a rate: of a trace, windows until it was all seen."""
        n_whole, runs = self.traffic.n_whole, self.runs
        if n_whole is None:
            return self.seeds
        seen = (1 - runs.warm_share) * runs.n_requests(rate_rps) / n_whole
        enough = (n for n in range(2, len(self.seeds)) if apart(self.seeds[:n]) <= seen)
        return self.seeds[: next(enough, len(self.seeds))]

    @property
    def most_rps(self) -> float:
        """The highest rate that runs can show.

        A trace that is over before its first request is late shows no queue. Turns wait for the
        one before: until as many conversations are under way as later, fewer requests come than the
        rate says. What is generated may begin with so many; a trace has only its own, and what it
        shows is sure at the rate at which it was recorded.
        """
        ramp_s, n_whole = self.traffic.ramp_s, self.traffic.n_whole
        if n_whole is None:
            return RAMP * self.length.max_requests / ramp_s if ramp_s else RATE_MAX_RPS
        shown_s = max(2 * ramp_s, self.longest_ttft_s)
        recorded = self.traffic.rate_rps or 0.0
        return min(RATE_MAX_RPS, max(recorded, min(self.length.max_requests, n_whole) / shown_s))

    @model_validator(mode="after")
    def _check(self) -> Question:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different, at least one, got {self.seeds}")
        return self


def runner(
    question: Question,
    candidate: Candidate,
    *,
    n_replicas: int = 1,
    cost: StepCost | None = None,
) -> Evaluate:
    """Runs at any rate, for any seed; of another `cost` than the candidate's if that is given."""

    fleet = question.fleet(candidate, n_replicas)
    step_cost = cost or candidate.cost(question.model)

    def run(rate: float, seed: int) -> Trial:
        return evaluate(fleet, step_cost, question.traffic, question.runs, rate, seed)

    return run
