"""After a crash or a damaged index the store repairs itself; when full it says so or evicts."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from cachetune.core.chunk_index import ChunkIndex
from cachetune.core.errors import CapacityError, StoreError
from cachetune.core.layout import chunk_bytes
from cachetune.core.model_spec import ModelSpec
from cachetune.runtime.chunk_store import ChunkStore, TierConfig

from . import store_cases as cases

N = 77


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ChunkStore]:
    store = cases.open_store(tmp_path)
    yield store
    store.close()


def listed(index: ChunkIndex) -> set[tuple]:
    return {
        (e.key, e.content_id, e.n_tokens, e.n_bytes, e.tier) for e, _ in index._entries.values()
    }


@pytest.mark.parametrize("lost", ["nothing", "index", "rows", "ruined"])
def test_opened_again_it_holds_the_same(tmp_path: Path, lost: str) -> None:
    store = cases.open_store(tmp_path)
    chunks = {c: cases.make_chunk(store.model, 30 + i, i) for i, c in enumerate("abc")}
    keys = {c: cases.put(store, c, chunk, "dram") for c, chunk in chunks.items()}
    before = listed(store.index("rank"))
    store.close()
    database = tmp_path / "index.sqlite"
    if lost == "index":
        database.unlink()
    elif lost == "rows":
        with sqlite3.connect(database) as db:
            db.execute("DELETE FROM chunks")
    elif lost == "ruined":
        database.write_bytes(b"no database" * 1000)
    store = cases.open_store(tmp_path)
    assert store.repairs["files_reindexed"] == (0 if lost == "nothing" else 3)
    assert store.repairs["index_rebuilt"] == (lost == "ruined")
    assert listed(store.index("rank")) == before
    for c, key in keys.items():
        assert cases.holds(store, key, chunks[c], "dram")
        assert torch.equal(store.order(key), chunks[c].order)
    assert store.counters.ram_loads == 3
    store.close()


def test_the_scan_repairs(tmp_path: Path) -> None:
    store = cases.open_store(tmp_path)
    keys = [cases.put(store, c, cases.make_chunk(store.model, N)) for c in "abcd"]
    paths = [cases.chunk_file(store, key) for key in keys]
    store.close()
    (tmp_path / "chunks" / ".half.chunk.tmp").write_bytes(b"half")
    paths[0].unlink()
    os.truncate(paths[1], 5000)
    (tmp_path / "chunks" / f"{'f' * 40}.chunk").write_bytes(paths[2].read_bytes())
    store = cases.open_store(tmp_path)
    assert {k: n for k, n in store.repairs.items() if n} == {
        "temp_files_removed": 1, "bad_files_removed": 2, "rows_removed": 2,
    }  # fmt: skip
    assert {p.name for p in (tmp_path / "chunks").iterdir()} == {p.name for p in paths[2:]}
    assert len(store.index("rank")) == 2
    store.close()
    store = cases.open_store(tmp_path)
    assert not any(store.repairs.values())
    store.close()


def test_one_model_per_folder(tmp_path: Path) -> None:
    store = cases.open_store(tmp_path)
    cases.put(store, "a", cases.make_chunk(store.model, N))
    store.close()
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.entry("x")
    with pytest.raises(StoreError, match="must be open"):
        cases.put(store, "b", cases.make_chunk(store.model, N))
    with pytest.raises(StoreError, match="one model"):
        ChunkStore(tmp_path, store.model, "weights-2", cases.TIERS)
    (tmp_path / "index.sqlite").unlink()
    with pytest.raises(StoreError, match="one model"):
        ChunkStore(tmp_path, store.model, "weights-2", cases.TIERS)
    with pytest.raises(StoreError, match="own name"):
        cases.open_store(tmp_path, tiers=())


def write_forever(root: Path, model: ModelSpec, ready: Connection) -> None:
    """Put, place and discard until killed."""
    store = cases.open_store(root, model)
    ready.send(True)
    for i in range(10_000):
        key = cases.put(store, f"{time.time_ns()}", cases.make_chunk(model, 20 + i % 60, i % 7))
        store.place(key, "dram")
        if i % 3 == 2:
            store.discard(key)


def test_killed_while_writing_nothing_is_corrupt(tmp_path: Path) -> None:
    model, rng, context = cases.make_model(n_layers=8), random.Random(1), get_context("fork")
    n_kept = 0
    for _ in range(10):
        ours, theirs = context.Pipe()
        child = context.Process(target=write_forever, args=(tmp_path, model, theirs))
        child.start()
        assert ours.poll(20) and child.pid is not None
        time.sleep(rng.uniform(0.01, 0.12))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        store = cases.open_store(tmp_path, model)
        assert store.repairs["bad_files_removed"] == 0
        index = store.index("rank")
        for key, *_ in listed(index):
            cases.read_all(store, key, "disk")
        names = {p.name for p in (tmp_path / "chunks").iterdir()}
        assert names == {f"{key}.chunk" for key, *_ in listed(index)}
        assert store.counters.bad_groups == store.counters.missing_files == 0
        n_kept = len(index)
        store.close()
    assert n_kept > 10


def leftovers(store: ChunkStore) -> list[str]:
    return sorted(p.name for p in (store.root / "chunks").iterdir())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_a_failed_write_leaves_nothing(
    store: ChunkStore, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    real, calls = os.write, []

    def fail_later(fd: int, data: bytes) -> int:
        calls.append(fd)
        if len(calls) > 2:
            raise OSError(code, os.strerror(code))
        return real(fd, bytes(data)[:5000])

    chunk = cases.make_chunk(store.model, N)
    with monkeypatch.context() as m:
        m.setattr(os, "write", fail_later)
        with pytest.raises(StoreError, match=os.strerror(code)):
            cases.put(store, "a", chunk)
    assert leftovers(store) == [] and store.tiers["disk"].used_bytes == 0
    assert cases.holds(store, cases.put(store, "a", chunk), chunk)


def test_a_file_size_limit_is_an_error(store: ChunkStore) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(StoreError, match="free space"):
            cases.put(store, "a", cases.make_chunk(store.model, 256))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert leftovers(store) == []


def test_a_failed_index_row_leaves_no_file(
    store: ChunkStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(row: object) -> None:
        raise StoreError("the index is full")

    monkeypatch.setattr(store._index, "put", fail)
    with pytest.raises(StoreError, match="the index is full"):
        cases.put(store, "a", cases.make_chunk(store.model, N))
    assert leftovers(store) == [] and len(store.index("rank")) == 0


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(StoreError, match="must be able to write"):
        cases.open_store(file / "store")
    if os.geteuid() != 0:  # root may write anywhere
        tmp_path.chmod(0o500)
        with pytest.raises(StoreError, match="Permission denied"):
            cases.open_store(tmp_path / "store")
        tmp_path.chmod(0o700)


def test_the_least_recently_used_chunk_goes(tmp_path: Path) -> None:
    model = cases.make_model()
    size = chunk_bytes(model, N)
    store = cases.open_store(
        tmp_path, model, (TierConfig("disk", "file", capacity_bytes=2 * size),)
    )
    chunk = cases.make_chunk(model, N)
    a, b = cases.put(store, "a", chunk), cases.put(store, "b", chunk)
    cases.read_all(store, a)
    c = cases.put(store, "c", chunk)
    assert leftovers(store) == sorted(f"{key}.chunk" for key in (a, c))
    with pytest.raises(StoreError, match="evicted"):
        cases.read_all(store, b)
    with pytest.raises(CapacityError, match="fit into its tier 'disk'"):
        cases.put(store, "d", cases.make_chunk(model, 500))
    assert leftovers(store) == sorted(f"{key}.chunk" for key in (a, c))
    store.close()
    store = cases.open_store(tmp_path, model, (TierConfig("disk", "file", capacity_bytes=size),))
    assert store.repairs["chunks_evicted"] == 1 and len(leftovers(store)) == 1
    store.close()


def test_capacity_holds_to_the_byte_under_four_writers(tmp_path: Path) -> None:
    model = cases.make_model()
    capacity = 3 * chunk_bytes(model, N) + 1
    tiers = (TierConfig("disk", "file", capacity_bytes=capacity), TierConfig("dram", "dram"))
    store = cases.open_store(tmp_path, model, tiers)
    chunk, most, failed = cases.make_chunk(model, N), [], []

    def work(i: int) -> None:
        try:
            for j in range(15):
                cases.put(store, f"{(i * 7 + j) % 20}", chunk)
                most.append(store.tiers["disk"].used_bytes)
        except Exception as e:
            failed.append(e)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failed
    assert max(most) <= capacity
    index = store.index("rank")
    assert store.tiers["disk"].used_bytes == len(index) * chunk_bytes(model, N) <= capacity
    assert leftovers(store) == sorted(f"{key}.chunk" for key, *_ in listed(index))
    for key, *_ in listed(index):
        assert cases.holds(store, key, chunk)
    store.close()
