"""`QualityProfile`: how good answers are relative to full recompute, per policy and ratio.

Simulation cannot see quality, so it is measured on tasks and becomes a constraint of the search.
"""

from __future__ import annotations

from typing import ClassVar, get_args

from pydantic import Field

from .errors import CacheTuneError, ProfileError
from .hardware import Provenance
from .plan import PolicyName, ReusePlan, SelectorName
from .policies import order_of
from .record import Document, Record

EXACT_POLICIES = ("full_recompute", "prefix_cache")
"""Their answers are those of full recompute by construction."""


class QualityRow(Record):
    """One measured point: mean score relative to full recompute, with its 95 % interval."""

    task: str
    policy: PolicyName
    selector: str
    """Stored order, see `core.policies.order_of`; '' where the policy does not use one."""
    ratio: float = Field(ge=0, le=1)
    """Share of the reused tokens that was recomputed."""
    score: float
    low: float
    high: float
    n: int

    @property
    def is_deployable(self) -> bool:
        """False for reference orders (oracles) that need to see the actual prompt."""
        return self.selector in ("", *get_args(SelectorName))


class QualityProfile(Document):
    """Rows for one model; `score` interpolates between measured ratios."""

    document: ClassVar[str] = "quality"
    version: ClassVar[int] = 1
    error: ClassVar[type[CacheTuneError]] = ProfileError

    model_fingerprint: str
    rows: tuple[QualityRow, ...]
    provenance: Provenance | None = None

    def score(self, plan: ReusePlan, chunk_tokens: int) -> float | None:
        """Score of a plan: the worst task at the plan's smallest ratio; None if not measured.

        Below the smallest measured ratio the line goes to the `full_reuse` row, ratio 0.
        """
        if plan.policy in EXACT_POLICIES:
            return 1.0
        ratio = smallest_ratio(plan, chunk_tokens)
        worst: float | None = None
        for task in sorted({row.task for row in self.rows}):
            points = self._points(task, plan)
            if len(points) < 2:
                return None
            value = _interpolate(points, ratio)
            worst = value if worst is None else min(worst, value)
        return worst

    def _points(self, task: str, plan: ReusePlan) -> list[tuple[float, float]]:
        """(ratio, score) ascending: the policy's own rows between full reuse and full recompute."""
        order = "" if plan.policy in ("cacheblend", "full_reuse") else order_of(plan)
        points = {1.0: 1.0}
        for row in self.rows:
            if row.task == task and row.policy == "full_reuse":
                points[0.0] = row.score
        for row in self.rows:
            if row.task == task and row.policy == plan.policy and row.selector == order:
                points[row.ratio] = row.score
        return sorted(points.items()) if 0.0 in points else []


def smallest_ratio(plan: ReusePlan, chunk_tokens: int) -> float:
    """The least share of a reused chunk that the plan recomputes in any tier and layer."""
    if plan.policy == "full_reuse":
        return 0.0
    if plan.policy == "epic":
        return min(1.0, plan.epic_tokens / chunk_tokens)
    return min(min(rule.ratios) for rule in plan.rules)


def _interpolate(points: list[tuple[float, float]], ratio: float) -> float:
    for (r0, s0), (r1, s1) in zip(points, points[1:], strict=False):
        if r0 <= ratio <= r1:
            return s0 + (s1 - s0) * (ratio - r0) / (r1 - r0) if r1 > r0 else s1
    return points[-1][1]
