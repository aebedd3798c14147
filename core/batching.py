"""Prompts of several requests through the layers together: their pieces become one.

The rows of a layer group are one op with the sum of its parts' sizes; loads, restores and heads
stay those of each request. Source of the idea: batches of packed rows of any length, as in
continuous batching (Orca, OSDI 2022), here for selective prefill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .ops import Op


def can_join(a: Sequence[Op], b: Sequence[Op]) -> bool:
    """Whether both pieces pass through the same layer groups."""
    return _groups(a) == _groups(b)


def rows_of(piece: Sequence[Op]) -> int:
    """Most rows that pass through a layer of the piece."""
    return max((op.n_tokens for op in piece if op.kind == "prefill"), default=0)


def join(pieces: Sequence[Sequence[Op]]) -> list[Op]:
    """One piece of several that `can_join`; a joined op has the id of its first part.

    What stood before a group's rows in each piece stands before the joined rows, in the order of
    the pieces; what waited for a part waits for the whole.
    """
    now = {
        part.op_id: parts[0].op_id
        for parts in zip(*(_prefills(piece) for piece in pieces), strict=True)
        for part in parts
    }
    left = [list(piece) for piece in pieces]
    joined: list[Op] = []
    for _ in _groups(pieces[0]):
        parts = []
        for piece in left:
            while piece[0].kind != "prefill":
                joined.append(_waiting(piece.pop(0), now))
            parts.append(_waiting(piece.pop(0), now))
        joined.append(_one(parts))
    return [*joined, *(_waiting(op, now) for piece in left for op in piece)]


def in_batches(requests: Sequence[Sequence[Sequence[Op]]], most: int, room: int) -> list[Op]:
    """Pieces of all requests, first come first; up to `most` together, of `room` rows at most."""
    left = [list(pieces) for pieces in requests]
    ops: list[Op] = []
    while left := [pieces for pieces in left if pieces]:
        taken = [left[0].pop(0)]
        for pieces in left[1:most]:
            rows = rows_of(pieces[0]) + sum(rows_of(piece) for piece in taken)
            if rows > room or not can_join(taken[0], pieces[0]):
                break
            taken.append(pieces.pop(0))
        ops += taken[0] if len(taken) == 1 else join(taken)
    return ops


def _prefills(piece: Sequence[Op]) -> list[Op]:
    return [op for op in piece if op.kind == "prefill"]


def _groups(piece: Sequence[Op]) -> list[tuple[int, int]]:
    return [(op.layer_start, op.layer_stop) for op in _prefills(piece)]


def _waiting(op: Op, now: dict[int, int]) -> Op:
    """The op with its dependencies as they are called now."""
    deps = tuple(now.get(dep, dep) for dep in op.deps)
    return op if deps == op.deps else replace(op, deps=deps)


def _one(parts: Sequence[Op]) -> Op:
    return replace(
        parts[0],
        request_ids=tuple(op.request_ids[0] for op in parts),
        n_tokens=sum(op.n_tokens for op in parts),
        n_pairs=sum(op.n_pairs for op in parts),
        n_scored=sum(op.n_scored for op in parts),
        segments=(),
        deps=tuple(dict.fromkeys(dep for op in parts for dep in op.deps)),
        parts=tuple(parts),
    )
