"""Published results beside predictions: points, fitted scalars, order, what cannot be matched.

A study predicts the numbers of one paper from its stated settings. A point is `fitted` when any
scalar saw it, else `predicted`; the bounds are asked of predicted points with
stated settings, and shown for the others too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from ..core.errors import InvariantViolation

MEDIAN_BOUND = 0.08
P90_BOUND = 0.20
"""Largest median and 90th percentile of |error| asked for, set before predicting."""


@dataclass(frozen=True)
class Point:
    """One published number and what is predicted for it, in `unit`."""

    name: str
    where: str
    unit: str
    published: float
    predicted: float
    resolution: float
    """Half a unit of the last printed digit: what the published number may be off."""
    stated: bool = True
    """Whether the paper states every setting that the prediction needs."""
    lines: tuple[str, ...] = ()
    """Along each, predictions must stand in the published order."""

    @property
    def error(self) -> float:
        """Signed, predicted / published - 1."""
        return self.predicted / self.published - 1


@dataclass(frozen=True)
class Scalar:
    """One fitted number and the names of the points it was fitted on."""

    name: str
    value: float
    unit: str
    fitted_on: tuple[str, ...]

    @property
    def n_points(self) -> int:
        """Points it was fitted on."""
        return len(self.fitted_on)


@dataclass(frozen=True)
class Claim:
    """A published inequality, and whether the prediction keeps it."""

    name: str
    published: str
    predicted: str
    holds: bool


@dataclass(frozen=True)
class Study:
    """All of one paper that is predicted, and what is not."""

    name: str
    paper: str
    points: tuple[Point, ...]
    scalars: tuple[Scalar, ...]
    assumed: tuple[str, ...]
    unmatched: tuple[tuple[str, str], ...]
    """(what, why) of published numbers for which there is no prediction."""
    claims: tuple[Claim, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)
    """By line or inequality: why it does not come out as published, if it does not."""

    def __post_init__(self) -> None:
        names = [p.name for p in self.points]
        unknown = self.fitted_names - set(names)
        if unknown or len(set(names)) != len(names):
            raise InvariantViolation(f"{self.name}: names of points are unique, {unknown} are none")
        known = {c.name for c in self.claims} | {line for p in self.points for line in p.lines}
        if set(self.reasons) - known:
            raise InvariantViolation(f"{self.name}: {set(self.reasons) - known} are no lines")

    @property
    def fitted_names(self) -> set[str]:
        """Points that some scalar saw."""
        return {name for scalar in self.scalars for name in scalar.fitted_on}

    def held_out(self, stated: bool | None = None) -> list[Point]:
        """Points no scalar saw; only those with stated settings, or without, if asked."""
        seen = self.fitted_names
        return [p for p in self.points if p.name not in seen and stated in (None, p.stated)]


@dataclass(frozen=True)
class Disorder:
    """Two points of a line that are predicted in the wrong order."""

    line: str
    first: Point
    second: Point

    @property
    def settings(self) -> str:
        """Whether the paper states all that both predictions need."""
        return _settings(self.first.stated and self.second.stated)

    @property
    def published_gap(self) -> float:
        """How far apart the two were published, relative to the smaller."""
        low, high = sorted((self.first.published, self.second.published))
        return high / low - 1


def ordered_pairs(points: Iterable[Point]) -> tuple[int, list[Disorder]]:
    """Pairs of every line that rounding cannot swap: how many, and those in the wrong order."""
    lines: dict[str, list[Point]] = {}
    for point in points:
        for line in point.lines:
            lines.setdefault(line, []).append(point)
    count, wrong = 0, []
    for line, of in lines.items():
        for a, b in combinations(of, 2):
            gap = b.published - a.published
            if abs(gap) <= a.resolution + b.resolution + 1e-12:
                continue
            count += 1
            if (b.predicted - a.predicted) * gap <= 0:
                wrong.append(Disorder(line, a, b))
    return count, wrong


def summary(studies: Sequence[Study]) -> list[dict[str, Any]]:
    """A row per study, then over all, apart for stated and other settings."""
    groups: list[tuple[str, Sequence[Study]]] = [(s.name, [s]) for s in studies]
    rows = []
    for name, of in [*groups, ("all", studies)]:
        for stated in (True, False):
            errors = [abs(p.error) for s in of for p in s.held_out(stated)]
            if not errors:
                continue
            median, p90 = (float(np.percentile(errors, q)) for q in (50, 90))
            rows.append(
                {
                    "study": name,
                    "settings": _settings(stated),
                    "points": len(errors),
                    "median_error": median,
                    "p90_error": p90,
                    "max_error": float(max(errors)),
                    "scalars": sum(len(s.scalars) for s in of),
                    "fitted_points": sum(len(s.fitted_names) for s in of),
                    "met": median <= MEDIAN_BOUND and p90 <= P90_BOUND if name == "all" else None,
                }
            )
    return rows


def rows_of(study: Study) -> list[dict[str, Any]]:
    """Every point of a study as a row of the result."""
    seen = study.fitted_names
    return [
        {
            "study": study.name,
            "where": p.where,
            "point": p.name,
            "unit": p.unit,
            "published": p.published,
            "predicted": p.predicted,
            "error": p.error,
            "role": "fitted" if p.name in seen else "predicted",
            "settings": _settings(p.stated),
        }
        for p in study.points
    ]


def disorder_rows(study: Study) -> list[dict[str, Any]]:
    """Pairs of a study in another order than published, the widest apart first."""
    wrong = sorted(ordered_pairs(study.points)[1], key=lambda d: -d.published_gap)
    return [
        {
            "study": study.name,
            "line": d.line,
            "first": _both(d.first),
            "second": _both(d.second),
            "published_gap": d.published_gap,
            "settings": d.settings,
            "why": study.reasons.get(d.line, ""),
        }
        for d in wrong
    ]


def claim_rows(study: Study) -> list[dict[str, Any]]:
    """Inequalities of a study; those that are broken with the reason, if there is one."""
    return [
        {
            "study": study.name,
            **asdict(claim),
            "why": "" if claim.holds else study.reasons.get(claim.name, ""),
        }
        for claim in study.claims
    ]


def _settings(stated: bool) -> str:
    return "stated" if stated else "partly assumed"


def _both(point: Point) -> str:
    return f"{point.name}: {point.published:g}, predicted {point.predicted:.4g}"


def studies() -> list[Study]:
    """Every study, computed."""
    from .published_break_even import break_even
    from .published_cacheblend import cacheblend
    from .published_cachetune import cachetune
    from .published_cake import cake
    from .published_h200 import h200
    from .published_others import others

    made: tuple[Callable[[], Study], ...] = (cake, cachetune, h200, cacheblend, break_even, others)
    return [make() for make in made]
