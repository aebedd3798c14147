"""The chunk index: exactness, tenants, eviction, bookkeeping."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cachetune.core.chunk_index import ChunkIndex, chain_id, chunk_key, content_id_of
from cachetune.core.errors import InvariantViolation
from support import make_entry


def keys(index: ChunkIndex, *content_ids: str, tenant: str = "") -> list[str | None]:
    return [e.key if e else None for e in index.lookup(content_ids, tenant)]


@pytest.mark.parametrize("kind", [list, tuple, bytes, np.array])
def test_a_content_id_is_of_four_bytes_a_token(kind: Callable[[list[int]], Any]):
    """SHA-256, little endian; stores on disk are named by it."""
    assert content_id_of(kind([1, 2, 3])) == "4636993d3e1da4e9d6b8f87b79e8f7c6"
    assert content_id_of([0, 2**32 - 1]) == "5981693c8df83eea16da42a0f748facb"
    with pytest.raises(OverflowError):
        content_id_of([2**32])


def test_lookup_answers_chunk_by_chunk():
    index = ChunkIndex()
    index.add(make_entry("a"))
    assert keys(index, "b", "a", "a") == [None, "a", "a"]


def test_prefix_entries_are_found_only_behind_their_prefix():
    index = ChunkIndex()
    exact = make_entry("b", chain=["a"])
    index.add(make_entry("b"))
    index.add(exact)
    assert keys(index, "a", "b") == [None, exact.key]
    assert keys(index, "b") == ["b"]
    assert keys(index, "c", "b") == [None, "b"]
    assert keys(index, "a", "c", "b") == [None, None, "b"]


def test_tenants_do_not_share():
    index = ChunkIndex()
    index.add(make_entry("a"), tenant="x")
    assert keys(index, "a") == [None]
    assert keys(index, "a", tenant="x") == ["a"]
    salts = {chunk_key("a", model="m", order="o", dtype="d", tenant=t) for t in ("", "x", "y")}
    assert len(salts) == 3


def test_least_recently_used_goes_first():
    a, b, c = (make_entry(name) for name in "abc")
    index = ChunkIndex({"dram": 2 * a.n_bytes})
    assert index.add(a) == []
    assert index.add(b) == []
    keys(index, "a")
    assert index.add(c) == [b]
    assert keys(index, "a", "b", "c") == ["a", None, "c"]
    index.check_integrity()


def test_an_entry_larger_than_its_tier_is_not_kept():
    entry = make_entry("a")
    index = ChunkIndex({"dram": entry.n_bytes - 1})
    assert index.add(entry) == [entry]
    assert (len(index), index.used_bytes("dram")) == (0, 0)


def test_adding_again_replaces():
    index = ChunkIndex()
    index.add(make_entry("a"))
    index.add(make_entry("a", tier="disk"))
    assert len(index) == 1
    assert (index.used_bytes("dram"), index.used_bytes("disk")) == (0, make_entry("a").n_bytes)
    index.check_integrity()


def test_another_order_of_the_same_content_does_not_take_the_first_one_along():
    """Two keys, one content: forgetting one leaves the other to be found."""
    index = ChunkIndex()
    old, new = make_entry("a"), replace(make_entry("a"), key="a-other")
    index.add(old)
    index.add(new)
    index.discard(old.key)
    assert keys(index, "a") == ["a-other"]
    index.check_integrity()


def test_discarding_the_unknown_is_ignored():
    index = ChunkIndex()
    index.discard("nothing")
    index.check_integrity()


def test_integrity_compares_both_sides():
    index = ChunkIndex()
    index.add(make_entry("a"))
    index._used["dram"] += 1
    with pytest.raises(InvariantViolation, match="INV-4"):
        index.check_integrity()


def test_ids_are_hashes_of_what_they_name():
    assert content_id_of([1, 2]) == content_id_of((1, 2)) != content_id_of([2, 1])
    assert len(content_id_of([1])) == 32
    assert chain_id("", "a") != chain_id(chain_id("", "a"), "a")
