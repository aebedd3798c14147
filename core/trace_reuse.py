"""How much of a trace comes back, and after how much else: what caches of any size could hit.

The LRU stack distance of a use is the number of tokens of other chunks used since the same chunk's
last use (Mattson et al., IBM Systems Journal 9(2), 1970): an LRU cache hits it if it holds those
and the chunk. All capacities follow from one pass. A request looks its chunks up before it leaves
any, and touches its last chunk first, so that a prefix always outlives what builds on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .request_table import RequestTable

Ints = NDArray[np.int64]

SAMPLE_ABOVE = 2_000_000
"""Uses beyond which chunks are sampled by hash (SHARDS: Waldspurger et al., FAST 2015)."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Reuse:
    """Every use of a chunk after its first, once per request.

    Attributes:
        distance_tokens: int64, LRU stack distance.
        tokens: int64, of the chunk.
        gap_ns: int64, since the request that used it last (by nominal arrivals).
        n_prompt_tokens: of all requests.
        share: of the chunks that were looked at; above, sums are `share` of what they stand for.
    """

    distance_tokens: Ints
    tokens: Ints
    gap_ns: Ints
    n_prompt_tokens: int
    share: float

    @property
    def ceiling(self) -> float:
        """Share of all prompt tokens that a cache without end would hit."""
        return float(self.tokens.sum()) / self.share / self.n_prompt_tokens

    def hit_share(self, capacity_tokens: float) -> float:
        """Share of all prompt tokens that an LRU cache of this size would hit."""
        fits = self.distance_tokens + self.tokens <= capacity_tokens
        return float(self.tokens[fits].sum()) / self.share / self.n_prompt_tokens


def reuse_of(table: RequestTable) -> Reuse:
    """Reuse by the table's ids: of prefixes where they are chained, else of contents anywhere."""
    share = min(1.0, SAMPLE_ABOVE / max(1, len(table.chunk_ids)))
    rows, ids = _uses(table, share)
    tokens = table.chunk_tokens[ids].astype(np.int64)
    before = _previous(ids)
    again = np.flatnonzero(before >= 0)
    until_row = _sums_before(rows, before, tokens)[again]
    until_use = np.cumsum(tokens)[before[again]]
    nominal = table.nominal_ns()
    return Reuse(
        distance_tokens=((until_row - until_use) / share).astype(np.int64),
        tokens=tokens[again],
        gap_ns=nominal[rows[again]] - nominal[rows[before[again]]],
        n_prompt_tokens=int(table.prompt_tokens.sum(dtype=np.int64)),
        share=share,
    )


def _uses(table: RequestTable, share: float) -> tuple[Ints, Ints]:
    """(row, chunk) of every use in order of touch, each chunk once per row; of a share of them."""
    rows = table.rows_of_chunks()
    ends = table.chunk_start[:-1] + table.chunk_start[1:] - 1
    ids = table.chunk_ids[ends[rows] - np.arange(len(rows))].astype(np.int64)
    n_chunks = len(table.chunk_tokens)
    if share < 1.0:
        hashed = (np.arange(n_chunks, dtype=np.uint64) * _GOLDEN) >> np.uint64(32)
        kept = (hashed < share * 2**32)[ids]
        rows, ids = rows[kept], ids[kept]
    _, firsts = np.unique(rows * n_chunks + ids, return_index=True)
    firsts.sort()
    return rows[firsts], ids[firsts]


def _previous(ids: Ints) -> Ints:
    """Index of the last earlier entry with the same id, -1 for none."""
    order = np.argsort(ids, kind="stable")
    before = np.full(len(ids), -1, np.int64)
    same = ids[order[1:]] == ids[order[:-1]]
    before[order[1:][same]] = order[:-1][same]
    return before


def _sums_before(rows: Ints, before: Ints, weights: Ints) -> Ints:
    """For each k the weight of all j with `rows[j] < rows[k]` and `before[j] <= before[k]`.

    Divide and conquer over the bits of the row: at each bit, entries of a left half count for
    those of the right half beside it. O(n log n log rows), no loop over entries.
    """
    sums = np.zeros(len(rows), np.int64)
    if not len(rows):
        return sums
    order = np.argsort(before, kind="stable")
    for bit in reversed(range(int(rows.max()).bit_length())):
        half = (rows >> bit)[order]
        right = (half & 1).astype(bool)
        left_sums = np.cumsum(np.where(right, 0, weights[order]))
        group = half >> 1
        begins = np.flatnonzero(np.diff(group, prepend=-1))
        offsets = np.concatenate(([0], left_sums))[begins]
        of_group = np.repeat(offsets, np.diff(np.append(begins, len(order))))
        sums[order[right]] += (left_sums - of_group)[right]
        order = order[np.argsort(half, kind="stable")]
    return sums
