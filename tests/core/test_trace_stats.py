"""Statistics of traces against counting by hand; LRU distances against an LRU cache."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
from cachetune.core import trace_reuse
from cachetune.core.arrivals import Arrivals
from cachetune.core.request_table import RequestTable
from cachetune.core.trace_chains import chained, is_chained
from cachetune.core.trace_make import Lengths, chat_table, plain_table, rag_table
from cachetune.core.trace_reuse import reuse_of
from cachetune.core.trace_stats import reuse_ceiling, trace_stats

RATE = Arrivals(rate_rps=2.0)


def rag(seed: int = 0, **changes: object) -> RequestTable:
    knobs: dict[str, object] = dict(passages=40, per_request=4, passage=Lengths(mean=50, cv=0.5))
    return rag_table(150, RATE, seed=seed, **{**knobs, **changes})  # type: ignore[arg-type]


def lru_hits(table: RequestTable, capacity: int) -> int:
    """Tokens that a plain LRU cache hits: look-ups first, then touches from the last chunk on."""
    cache: OrderedDict[int, int] = OrderedDict()
    hits = 0
    for row in range(len(table)):
        ids = [int(c) for c in table.chunks_of(row)]
        hits += sum(cache.get(c, 0) for c in ids)
        for c in reversed(ids):
            cache[c] = int(table.chunk_tokens[c])
            cache.move_to_end(c)
        while sum(cache.values()) > capacity:
            cache.popitem(last=False)
    return hits


@pytest.mark.parametrize("capacity", [60, 400, 900, 1500, 4000])
def test_hit_shares_are_those_of_an_lru_cache(capacity: int):
    for table in (rag(), chat_table(25, RATE, systems=3, seed=2)):
        expected = lru_hits(table, capacity) / table.prompt_tokens.sum()
        # A chunk that does not fit beside those of its own request may leave in another order.
        assert reuse_of(table).hit_share(capacity) == pytest.approx(expected, abs=1e-12)


def test_a_cache_without_end_hits_what_an_earlier_request_had():
    for table in (rag(), chat_table(40, RATE, seed=1), rag(sharing=0.0)):
        seen: set[int] = set()
        hits = 0
        for row in range(len(table)):
            ids = table.chunks_of(row).tolist()
            hits += sum(int(table.chunk_tokens[c]) for c in ids if c in seen)
            seen.update(ids)
        share = hits / table.prompt_tokens.sum()
        assert reuse_ceiling(table) == pytest.approx(share)
        assert reuse_of(table).ceiling == pytest.approx(share)
        assert reuse_of(table).hit_share(1e12) == pytest.approx(share)


def test_prefixes_are_chains_of_contents():
    table = rag(passages=6, per_request=3, zipf_a=2.0)
    assert not is_chained(table)
    chain = chained(table)
    chain.check()
    assert is_chained(chain) and chain.chained
    prefixes: dict[tuple[int, ...], int] = {}
    for row in range(len(table)):
        ids = table.chunks_of(row).tolist()
        for n in range(1, 4):
            number = prefixes.setdefault(tuple(ids[:n]), int(chain.chunks_of(row)[n - 1]))
            assert number == chain.chunks_of(row)[n - 1]
    assert len(prefixes) == len(chain.chunk_tokens)
    stats = trace_stats(table)
    assert stats.prefix_reuse_ceiling == reuse_ceiling(chain) < stats.chunk_reuse_ceiling
    assert trace_stats(chain).chunk_reuse_ceiling is None


def test_numbers_of_a_trace():
    table = chat_table(50, RATE, think_s=5, seed=3)
    stats = trace_stats(table)
    assert stats.rows == 250 and stats.rows_that_follow == 200
    assert stats.chunked_share == 1.0 and stats.sampled_share == 1.0
    assert stats.lru[-1].hit_share == pytest.approx(stats.prefix_reuse_ceiling)
    assert stats.output_tokens.p50 == 300 and stats.prompt_tokens.max == 1000 + 100 + 4 * 400
    shares = [size.hit_share for size in stats.lru]
    assert shares == sorted(shares)


def test_nothing_shared_and_one_request():
    stats = trace_stats(plain_table(1, RATE, Lengths(mean=5), Lengths(mean=2)))
    assert stats.rate_rps is None and stats.gap_cv is None and stats.lru == ()
    assert stats.reuse_gap_s is None and stats.prefix_reuse_ceiling == 0.0


def test_poisson_gaps_vary_as_such():
    stats = trace_stats(plain_table(20_000, RATE, Lengths(mean=5), Lengths(mean=2)))
    assert stats.gap_cv == pytest.approx(1.0, abs=0.03)
    assert stats.rate_rps == pytest.approx(2.0, rel=0.03)
    assert 2.0 < stats.peak_rate_rps < 3.5


def test_sampled_chunks_stand_for_all(monkeypatch: pytest.MonkeyPatch):
    table = rag_table(3000, RATE, passages=20_000, per_request=8, zipf_a=0.6, seed=5)
    whole = reuse_of(table)
    monkeypatch.setattr(trace_reuse, "SAMPLE_ABOVE", 8000)
    sampled = reuse_of(table)
    assert sampled.share == pytest.approx(1 / 3, abs=0.01)
    assert sampled.ceiling == pytest.approx(whole.ceiling, rel=0.1)
    middle = float(np.median(whole.distance_tokens))
    assert sampled.hit_share(middle) == pytest.approx(whole.hit_share(middle), rel=0.15)
