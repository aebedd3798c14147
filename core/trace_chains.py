"""Block ids as chains: with a prefix cache, a block is what it holds and all that stands before it.

Mooncake's ids are chains already. Others hash each block alone, so that one id may follow
different ones; told apart by what precedes it, it becomes several chunks.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from .request_table import RequestTable


def before_ids(table: RequestTable) -> NDArray[np.int32]:
    """The id before each entry of `chunk_ids` in its prompt, -1 for the first of a row."""
    before = np.empty_like(table.chunk_ids)
    before[1:] = table.chunk_ids[:-1]
    starts = table.chunk_start[:-1]
    before[starts[starts < len(before)]] = -1
    return before


def is_chained(table: RequestTable) -> bool:
    """Whether each id always follows the same one."""
    ids, before = table.chunk_ids, before_ids(table)
    usual = np.full(len(table.chunk_tokens), -1, np.int32)
    usual[ids] = before
    return bool((usual[ids] == before).all())


def chained(table: RequestTable) -> RequestTable:
    """The same requests with ids that stand for their prefix too, numbered as they come."""
    if table.chained:
        return table
    if is_chained(table):
        return replace(table, chained=True)
    chains, contents = _chains(table)
    firsts = np.empty(len(contents), np.int64)
    firsts[chains[::-1]] = np.arange(len(chains))[::-1]  # of several, the last one written stays
    order = np.argsort(firsts)
    place = np.empty(len(order), np.int32)
    place[order] = np.arange(len(order))
    return replace(
        table,
        chunk_ids=place[chains],
        chunk_tokens=table.chunk_tokens[contents[order]],
        chained=True,
        chunk_names=_names(table, contents[order].tolist()),
    )


def _chains(table: RequestTable) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(chain of each entry of `chunk_ids`, content of each chain), one place of all prompts after
    the other: a chain is the pair of the chain before it and a content."""
    n_contents = len(table.chunk_tokens)
    lengths = np.diff(table.chunk_start)
    chains = np.empty(len(table.chunk_ids), np.int64)
    contents: list[NDArray[np.int64]] = []
    n_chains = 0
    rows = np.flatnonzero(lengths)
    before = np.full(len(rows), -1, np.int64)
    for place in range(int(lengths.max())):
        longer = lengths[rows] > place
        rows, before = rows[longer], before[longer]
        entries = table.chunk_start[rows] + place
        pairs = (before + 1) * n_contents + table.chunk_ids[entries]
        known, numbers = np.unique(pairs, return_inverse=True)
        before = n_chains + numbers
        chains[entries] = before
        contents.append(known % n_contents)
        n_chains += len(known)
    return chains, np.concatenate(contents)


def _names(table: RequestTable, contents: list[int]) -> tuple[str, ...] | None:
    """The name of the content, numbered where it stands in several chains."""
    if table.chunk_names is None:
        return None
    times: dict[int, int] = {}
    names = []
    for content in contents:
        times[content] = times.get(content, 0) + 1
        name = table.chunk_names[content]
        names.append(name if times[content] == 1 else f"{name}/{times[content]}")
    return tuple(names) if len(set(names)) == len(names) else None
