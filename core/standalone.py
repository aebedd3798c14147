"""Parts of a schedule by themselves: what loading or computing takes with nothing beside it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from .ops import OpKind, Schedule

LOADING: tuple[OpKind, ...] = ("load",)
COMPUTING: tuple[OpKind, ...] = ("prefill", "select", "head")


def part_of(schedule: Schedule, kinds: Collection[OpKind]) -> Schedule:
    """The ops of `kinds` in their streams and order; dependencies on other kinds are dropped."""
    kept = {op.op_id for op in schedule.ops if op.kind in kinds}
    ops = [
        replace(op, deps=tuple(d for d in op.deps if d in kept))
        for op in schedule.ops
        if op.op_id in kept
    ]
    return Schedule.of(ops, label=f"{schedule.label}/{'+'.join(sorted(kinds))}")
