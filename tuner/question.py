"""A question of capacity planning, and its runs of a candidate."""

from __future__ import annotations

from pydantic import Field, model_validator

from ..core.model_spec import ModelSpec
from ..core.record import Record
from ..core.workload import Slo
from ..simulator.step_tables import StepTables
from .attainment import Trial
from .candidate import Candidate
from .capacity import RATE_MAX_RPS, Evaluate
from .evaluate import RunLength, evaluate
from .traffic import Traffic


class Question(Record):
    """What is asked, apart from the candidates."""

    model: ModelSpec
    slo: Slo
    attainment: float = Field(default=0.99, gt=0, le=1)
    traffic: Traffic
    target_rps: float | None = Field(default=None, gt=0)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    length: RunLength = RunLength()
    tolerance: float = Field(default=0.02, ge=1e-3, le=0.5)
    kernel_band: bool = True
    """Whether to search again with the kernels at either end of their interval."""

    @property
    def most_rps(self) -> float:
        """The highest rate that runs can show.

        Turns wait for the one before, so that a run which is not as long as its conversations has
        fewer requests at a time than the rate says.
        """
        if not self.traffic.has_turns:
            return RATE_MAX_RPS
        return self.length.max_requests / self.length.horizon_s

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
    cost: StepTables | None = None,
) -> Evaluate:
    """Runs at any rate, for any seed; of another `cost` than the candidate's if that is given."""

    def run(rate: float, seed: int) -> Trial:
        return evaluate(
            candidate,
            question.model,
            question.slo,
            question.traffic,
            question.length,
            rate,
            seed,
            n_replicas=n_replicas,
            cost=cost,
        )

    return run
