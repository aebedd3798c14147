"""Snapshots: what LRU tiers would hold, files, and what does not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cachetune.core.arrivals import Arrivals
from cachetune.core.cache_snapshot import CacheSnapshot, TierContents, snapshot_of
from cachetune.core.errors import CapacityError, WorkloadError
from cachetune.core.trace_make import rag_table
from pydantic import ValidationError

RAG = rag_table(60, Arrivals(rate_rps=1.0), passages=30, per_request=4, seed=3)


def test_tiers_hold_the_latest_first_then_the_next():
    found = snapshot_of(RAG, 50, 2.0, {"hbm": 5 * 1024, "dram": 8 * 1024, "ssd": 10**9})
    order: list[int] = []
    for row in range(50):
        for chunk in reversed(RAG.chunks_of(row).tolist()):
            if chunk in order:
                order.remove(chunk)
            order.append(chunk)
    names = [str(c) for c in order]
    assert list(found.tiers["hbm"].keys) == names[-5:]
    assert list(found.tiers["dram"].keys) == names[-13:-5]
    assert list(found.tiers["ssd"].keys) == names[:-13]
    assert set(found.tiers["hbm"].n_bytes) == {1024}
    found.check_fits({"hbm": 5 * 1024, "dram": 8 * 1024, "ssd": 10**9})
    chunks = found.chunks_in(RAG)
    assert chunks["hbm"].tolist() == order[-5:]


def test_a_file_keeps_it_and_unknown_chunks_take_room(tmp_path: Path):
    found = snapshot_of(RAG, 9, 2.0, {"dram": 10**9})
    found.write(tmp_path / "s.json")
    assert CacheSnapshot.read(tmp_path / "s.json") == found
    foreign = found.replace(tiers={"dram": TierContents(keys=("x", "0", "y"), n_bytes=(1, 2, 3))})
    n = len(RAG.chunk_tokens)
    assert foreign.chunks_in(RAG)["dram"].tolist() == [n, 0, n + 1]


def test_what_does_not_fit_says_by_how_much():
    found = snapshot_of(RAG, 60, 2.0, {"dram": 10**9})
    total = found.tiers["dram"].total_bytes()
    assert total == 2 * np.unique(RAG.chunk_ids).size * 512
    with pytest.raises(CapacityError, match="100 more than it has"):
        found.check_fits({"dram": total - 100})
    with pytest.raises(WorkloadError, match="names tiers of the machine"):
        found.check_fits({"ssd": 1})


def test_refused(tmp_path: Path):
    for rows, per_token, tiers in ((0, 1.0, {"a": 1}), (61, 1.0, {"a": 1}), (1, 0.0, {"a": 1})):
        with pytest.raises(WorkloadError):
            snapshot_of(RAG, rows, per_token, tiers)
    with pytest.raises(WorkloadError):
        snapshot_of(RAG, 1, 1.0, {})
    for keys, n_bytes in ((("a", "a"), (1, 1)), (("a",), (0,)), (("a",), (1, 2))):
        with pytest.raises(ValidationError):
            TierContents(keys=keys, n_bytes=n_bytes)
    path = tmp_path / "s.json"
    path.write_text(
        '{"schema_version": 1, "tiers": {"a": {"keys": ["x", "x"], "n_bytes": [1, 1]}}}'
    )
    with pytest.raises(WorkloadError, match="'x' twice"):
        CacheSnapshot.read(path)
