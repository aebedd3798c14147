"""Tallies become a table with intervals, and the table a `QualityProfile`.

Intervals are percentiles of a bootstrap over contexts, 95 %: questions of one context share its
errors, so contexts, not questions, are drawn. All rows of a task share the draws, and a score's
interval comes from the ratio within each draw (paired). Where every context gives the same
answer the interval has no width; it then says only that no context differed.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ..core.errors import ProfileError
from ..core.hardware import Provenance
from ..core.quality import QualityProfile, QualityRow
from ..core.record import Record
from ..core.rng import rng
from .quality import Arm, Tally

N_DRAWS = 2000
LOW, HIGH = 2.5, 97.5

Array = NDArray[np.float64]
Interval = tuple[float, float, float]
"""Value, lower and upper end."""


class TableRow(Record):
    """One policy at one budget: shares of right answers, each with its 95 % interval."""

    task: str
    policy: str
    selector: str
    ratio: float
    """The budget asked for."""
    share: float
    """Of the tokens that are not exact already, those computed at the last layer, counted."""
    cross: Interval | None
    local: Interval | None
    overall: Interval
    score: Interval
    """Right answers over those of full recompute."""
    n: int
    """Answers."""
    n_cross: int
    n_contexts: int


def make_table(tallies: Iterable[tuple[str, int, list[Tally]]], seed: int) -> list[TableRow]:
    """Rows per task and arm, tasks as they come, arms as in the task's first context.

    An arm that was left out in some context has no row: it would be compared on fewer contexts.

    Raises:
        ProfileError: full recompute answers nothing of a task.
    """
    by_task: dict[str, dict[int, dict[Arm, Tally]]] = {}
    for task, context, found in tallies:
        by_task.setdefault(task, {})[context] = {t.arm: t for t in found}
    rows = []
    for task, numbered in by_task.items():
        contexts = [numbered[i] for i in sorted(numbered)]
        n = len(contexts)
        draws = rng(seed, "bootstrap", task).multinomial(n, np.full(n, 1 / n), size=N_DRAWS)
        weights = np.concatenate([np.ones((1, n)), draws])
        full = _sums(
            weights, contexts, next(a for a in contexts[0] if a.policy == "full_recompute")
        )
        if not full[0, 4]:
            raise ProfileError(
                "full recompute must answer something right, scores are relative to it",
                values=f"0 of {int(full[0, 5])} in the task '{task}'",
                remedy="check the task's token ids, or use a model that can do the task",
            )
        for arm in contexts[0]:
            if all(arm in context for context in contexts):
                rows.append(_row(task, arm, contexts, _sums(weights, contexts, arm), full))
    return rows


def profile_of(
    rows: Iterable[TableRow], model_fingerprint: str, provenance: Provenance | None
) -> QualityProfile:
    """The table's scores; EPIC's ratio is the share it computed, others' the plan's ratio."""
    return QualityProfile(
        model_fingerprint=model_fingerprint,
        rows=tuple(
            QualityRow.model_validate(
                {
                    "task": row.task,
                    "policy": row.policy,
                    "selector": row.selector,
                    "ratio": row.share if row.policy == "epic" else row.ratio,
                    "score": row.score[0],
                    "low": row.score[1],
                    "high": row.score[2],
                    "n": row.n,
                }
            )
            for row in rows
        ),
        provenance=provenance,
    )


def _sums(weights: Array, contexts: list[dict[Arm, Tally]], arm: Arm) -> Array:
    """`[1 + draws, 6]`: the sample itself first, then each draw's counts."""
    return weights @ np.array([context[arm].counts for context in contexts], dtype=np.float64)


def _row(
    task: str, arm: Arm, contexts: list[dict[Arm, Tally]], sums: Array, full: Array
) -> TableRow:
    overall = _interval(sums[:, 4], sums[:, 5])
    # A draw in which full recompute answers nothing has no score; it is left out.
    score = _interval(sums[:, 4], full[:, 4])
    assert overall is not None and score is not None
    return TableRow(
        task=task,
        policy=arm.policy,
        selector=arm.selector,
        ratio=arm.ratio,
        share=round(float(np.mean([c[arm].share for c in contexts])), 6),
        cross=_interval(sums[:, 0], sums[:, 1]),
        local=_interval(sums[:, 2], sums[:, 3]),
        overall=overall,
        score=score,
        n=int(sums[0, 5]),
        n_cross=int(sums[0, 1]),
        n_contexts=len(contexts),
    )


def _interval(right: Array, asked: Array) -> Interval | None:
    if not asked[0]:
        return None
    drawn = right[1:][asked[1:] > 0] / asked[1:][asked[1:] > 0]
    value = float(right[0] / asked[0])
    if not drawn.size:
        return value, value, value
    low, high = np.percentile(drawn, [LOW, HIGH])
    return round(value, 6), round(float(low), 6), round(float(high), 6)
