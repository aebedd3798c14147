"""Eviction policies: one implementation, for the simulated index and for the store."""

from __future__ import annotations

import random

import pytest
from cachetune.core.chunk_index import ChunkEntry, ChunkIndex
from cachetune.core.errors import StoreError
from cachetune.core.eviction import EvictionName, Evictor


def entry(key: str, n_bytes: int = 100, flops: float = 100.0) -> ChunkEntry:
    return ChunkEntry(key, key, 1, n_bytes, "dram", recompute_flops=flops)


def kept(index: ChunkIndex) -> set[str]:
    return {e.key for e, _ in index._entries.values()}


@pytest.mark.parametrize(
    ("eviction", "left"),
    [("lru", {"b", "c", "d"}), ("lfu", {"a", "c", "d"}), ("cost", {"a", "b", "d"})],
)
def test_what_leaves(eviction: EvictionName, left: set[str]) -> None:
    """a is used often but long ago, b seldom, c is recent but cheap to compute."""
    index = ChunkIndex({"dram": 300}, eviction)
    for e in (entry("a"), entry("b"), entry("c", flops=1.0)):
        index.add(e)
    index.lookup(["a"] * 5)
    index.lookup(["b", "c", "c"])
    index.add(entry("d"))
    assert kept(index) == left
    index.check_integrity()


def test_cost_is_what_a_byte_saves() -> None:
    """Of two used alike the larger one goes, though it saves more: its bytes save less each."""
    index = ChunkIndex({"dram": 500}, "cost")
    for e in (entry("small", n_bytes=100, flops=100.0), entry("large", n_bytes=400, flops=200.0)):
        index.add(e)
    index.lookup(["small", "large"])
    assert index.add(entry("new", n_bytes=50)) == [entry("large", n_bytes=400, flops=200.0)]


def test_what_was_popular_once_does_not_stay_for_ever() -> None:
    """The floor rises with each eviction, so a chunk that is not used any more goes."""
    index = ChunkIndex({"dram": 300}, "cost")
    index.add(entry("old"))
    index.lookup(["old"] * 5)
    for i in range(30):
        index.add(entry(f"{i}"))
    assert "old" not in kept(index)


def test_cost_saves_more_compute_than_recency_when_costs_differ() -> None:
    """Zipf popularity, sizes and costs that vary: what is evicted matters."""
    draw = random.Random(7)
    entries = [
        entry(f"{i}", n_bytes=draw.choice([50, 100, 400]), flops=draw.choice([10.0, 100.0, 1000.0]))
        for i in range(60)
    ]
    weights = [1 / (i + 1) for i in range(60)]
    draw.shuffle(weights)
    asked = draw.choices(entries, weights, k=3000)
    saved = {}
    for eviction in ("lru", "lfu", "cost"):
        index = ChunkIndex({"dram": 2000}, eviction)
        total = 0.0
        for e in asked:
            if index.lookup([e.key])[0] is not None:
                total += e.recompute_flops
            else:
                index.add(e)
        index.check_integrity()
        saved[eviction] = total
    assert saved["cost"] > 1.1 * saved["lru"]
    assert saved["cost"] > saved["lfu"]


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(StoreError, match="lru, lfu, cost"):
        Evictor("random")  # type: ignore[arg-type]


def test_only_those_asked_for_are_taken() -> None:
    evictor = Evictor("lru")
    for key in "abc":
        evictor.add(key, 1, 1.0)
    assert evictor.victim(["b", "c", "x"]) == "b"
    assert evictor.victim([]) is None
