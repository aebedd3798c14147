"""Snapshots: files, and what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
from cachetune.core.arrivals import Arrivals
from cachetune.core.cache_snapshot import CacheSnapshot, TierContents
from cachetune.core.errors import CapacityError, WorkloadError
from cachetune.core.trace_make import rag_table
from pydantic import ValidationError

RAG = rag_table(60, Arrivals(rate_rps=1.0), passages=30, per_request=4, seed=3)


def held(*chunks: int) -> CacheSnapshot:
    names = tuple(map(str, chunks))
    return CacheSnapshot(tiers={"dram": TierContents(keys=names, n_bytes=(1024,) * len(names))})


def test_a_file_keeps_it_and_unknown_chunks_take_room(tmp_path: Path):
    found = held(3, 0, 7)
    found.write(tmp_path / "s.json")
    assert CacheSnapshot.read(tmp_path / "s.json") == found
    foreign = found.replace(tiers={"dram": TierContents(keys=("x", "0", "y"), n_bytes=(1, 2, 3))})
    n = len(RAG.chunk_tokens)
    assert foreign.chunks_in(RAG)["dram"].tolist() == [n, 0, n + 1]


def test_what_does_not_fit_says_by_how_much():
    found = held(*range(20))
    total = found.tiers["dram"].total_bytes()
    assert total == 20 * 1024
    with pytest.raises(CapacityError, match="100 more than it has"):
        found.check_fits({"dram": total - 100})
    with pytest.raises(WorkloadError, match="names tiers of the machine"):
        found.check_fits({"ssd": 1})


def test_refused(tmp_path: Path):
    for keys, n_bytes in ((("a", "a"), (1, 1)), (("a",), (0,)), (("a",), (1, 2))):
        with pytest.raises(ValidationError):
            TierContents(keys=keys, n_bytes=n_bytes)
    path = tmp_path / "s.json"
    path.write_text(
        '{"schema_version": 1, "tiers": {"a": {"keys": ["x", "x"], "n_bytes": [1, 1]}}}'
    )
    with pytest.raises(WorkloadError, match="'x' twice"):
        CacheSnapshot.read(path)
