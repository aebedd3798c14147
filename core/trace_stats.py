"""What a trace holds: rates, lengths, and how much of it caches could reuse."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .record import Record
from .request_table import RequestTable
from .trace_chains import chained
from .trace_reuse import Reuse, reuse_of
from .trace_ticks import tick_s
from .units import NS_PER_S

WINDOW_S = 60


class Spread(Record):
    """Of a column."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float


class CacheSize(Record):
    """Share of prompt tokens that an LRU cache of so many tokens hits, loads taking no time."""

    capacity_tokens: int
    hit_share: float


class TraceStats(Record):
    """Shares are of prompt tokens. Ceilings are of a cache without end.

    `prefix_reuse_ceiling` counts what stands behind the same tokens as before, and is exact to
    reuse; `chunk_reuse_ceiling` counts contents at any position, and is None where ids name
    prefixes, because what returns elsewhere has another id there.
    """

    name: str
    rows: int
    rows_that_follow: int
    duration_s: float
    rate_rps: float | None
    """None where all arrive at once."""
    peak_rate_rps: float
    """In the busiest minute, or the busiest moment of a shorter trace."""
    gap_cv: float | None
    """Coefficient of variation of the gaps: 1 for Poisson arrivals."""
    tick_s: float | None
    """Of a coarse clock, by which most requests come together; else None."""
    prompt_tokens: Spread
    output_tokens: Spread
    chunks: int
    chunk_uses: int
    chunk_tokens: Spread | None
    chunked_share: float
    """Of prompt tokens, what lies in chunks."""
    unique_chunk_tokens: int
    """What a cache without end would hold."""
    prefix_reuse_ceiling: float
    chunk_reuse_ceiling: float | None
    reuse_gap_s: Spread | None
    """Since the last use of what is reused, each token counted."""
    reuse_distance_tokens: Spread | None
    """Tokens of other chunks used since, each token counted."""
    lru: tuple[CacheSize, ...]
    """By the table's ids, up to the size that reaches the ceiling."""
    sampled_share: float
    """Of chunks, looked at for `lru` and the reuse spreads."""


def trace_stats(table: RequestTable) -> TraceStats:
    """Statistics of a table; arrivals that wait for another request count at their earliest."""
    nominal = np.sort(table.nominal_ns())
    duration_s = float(nominal[-1] - nominal[0]) / NS_PER_S
    n_tokens = int(table.prompt_tokens.sum(dtype=np.int64))
    reuse = reuse_of(table)
    return TraceStats(
        name=table.name,
        rows=len(table),
        rows_that_follow=int((table.after >= 0).sum()),
        duration_s=duration_s,
        rate_rps=(len(table) - 1) / duration_s if duration_s else None,
        peak_rate_rps=_peak_rps(nominal),
        gap_cv=_cv(np.diff(nominal)),
        tick_s=tick_s(table),
        prompt_tokens=_spread(table.prompt_tokens),
        output_tokens=_spread(table.output_tokens),
        chunks=len(table.chunk_tokens),
        chunk_uses=len(table.chunk_ids),
        chunk_tokens=_spread(table.chunk_tokens) if len(table.chunk_tokens) else None,
        chunked_share=float(table.chunk_tokens[table.chunk_ids].sum(dtype=np.int64)) / n_tokens,
        unique_chunk_tokens=int(table.chunk_tokens.sum(dtype=np.int64)),
        prefix_reuse_ceiling=reuse_ceiling(chained(table)),
        chunk_reuse_ceiling=None if table.chained else reuse.ceiling,
        reuse_gap_s=_weighted(reuse.gap_ns / NS_PER_S, reuse.tokens),
        reuse_distance_tokens=_weighted(reuse.distance_tokens, reuse.tokens),
        lru=_lru(reuse),
        sampled_share=reuse.share,
    )


def reuse_ceiling(table: RequestTable) -> float:
    """Share of prompt tokens in chunks that an earlier request had."""
    rows = table.rows_of_chunks()
    first = np.full(len(table.chunk_tokens), len(table), np.int64)
    first[table.chunk_ids[::-1]] = rows[::-1]  # of several, the last one written stays
    again = rows > first[table.chunk_ids]
    hit = table.chunk_tokens[table.chunk_ids[again]].sum(dtype=np.int64)
    return float(hit) / float(table.prompt_tokens.sum(dtype=np.int64))


def _lru(reuse: Reuse) -> tuple[CacheSize, ...]:
    if not len(reuse.tokens):
        return ()
    needed = int((reuse.distance_tokens + reuse.tokens).max())
    sizes = [1 << k for k in range(16, max(17, needed.bit_length() + 1))]
    return tuple(CacheSize(capacity_tokens=size, hit_share=reuse.hit_share(size)) for size in sizes)


def _peak_rps(times_ns: NDArray[np.int64]) -> float:
    window_ns = WINDOW_S * NS_PER_S
    length_s = min(WINDOW_S, max(1.0, float(times_ns[-1] - times_ns[0]) / NS_PER_S))
    ends = np.searchsorted(times_ns, times_ns + window_ns, side="left")
    return float((ends - np.arange(len(times_ns))).max()) / length_s


def _cv(gaps: NDArray[np.int64]) -> float | None:
    mean = float(gaps.mean()) if len(gaps) else 0.0
    return float(gaps.std()) / mean if mean else None


def _weighted(values: NDArray[Any], weights: NDArray[np.int64]) -> Spread | None:
    return _spread(values, weights) if len(values) else None


def _spread(values: NDArray[Any], weights: NDArray[np.int64] | None = None) -> Spread:
    """With `weights`, each value counts so many times."""
    column = values.astype(np.float64)
    order = np.argsort(column)
    column = column[order]
    each = np.ones(len(column)) if weights is None else weights[order].astype(np.float64)
    total = np.cumsum(each)

    def at(share: float) -> float:
        return float(column[np.searchsorted(total, share * total[-1])])

    return Spread(
        mean=float((column * each).sum() / total[-1]),
        p50=at(0.5),
        p90=at(0.9),
        p99=at(0.99),
        max=float(column[-1]),
    )
