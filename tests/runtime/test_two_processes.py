"""Several processes on one store folder: no corrupt read, capacity to the byte, index = files."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import time
from collections import Counter
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from cachetune.core.errors import StoreError
from cachetune.core.layout import chunk_bytes
from cachetune.runtime.chunk_store import ChunkCorrupt, ChunkStore, TierConfig

from . import store_cases as cases

N = 77
MODEL = cases.make_model()
SIZE = chunk_bytes(MODEL, N)
CAPACITY = 6 * SIZE + 1
TIERS = (
    TierConfig("disk", "file", capacity_bytes=CAPACITY),
    TierConfig("dram", "dram", capacity_bytes=2 * SIZE),
    TierConfig("hbm", "device", capacity_bytes=SIZE, demote_to="dram"),
)
HEADER = 4096
CONTEXT = get_context("fork")


def chunk_of(content_id: str) -> cases.Chunk:
    return cases.make_chunk(MODEL, N, int(content_id) % 5)


def work(root: Path, seed: int, until_s: float, result: Connection) -> None:
    """Put, read, place and discard what both processes know; count what happened."""
    torch.set_num_threads(1)
    draw, counts = random.Random(seed), Counter[str]()
    try:
        store = cases.open_store(root, MODEL, TIERS)
        counts["alone"] = int(store._owners.alone)
        while time.monotonic() < until_s:
            act(store, draw, counts)
            for name, tier in store.tiers.items():
                counts[f"{name} overfull"] += tier.overfull
        counts["bad"] = store.counters.bad_groups + store.counters.missing_files
        store.close()
        result.send(dict(counts))
    except BaseException as e:
        result.send({"error": repr(e)})


def act(store: ChunkStore, draw: random.Random, counts: Counter[str]) -> None:
    content_id = str(draw.randrange(16))
    found = store.index("rank").lookup([content_id])[0]
    what = draw.choice(["put", "put", "read", "read", "place", "discard"])
    try:
        if what == "put" or found is None:
            cases.put(store, content_id, chunk_of(content_id), draw.choice(list(store.tiers)))
        elif what == "read":
            assert cases.holds(store, found.key, chunk_of(content_id)), "wrong rows"
        elif what == "place":
            store.place(found.key, draw.choice(list(store.tiers)))
        else:
            store.discard(found.key)
        counts[what] += 1
    except ChunkCorrupt:
        counts["corrupt"] += 1
    except StoreError:
        counts["gone meanwhile"] += 1


def most_on_disk(root: Path, until_s: float) -> int:
    """The most bytes of blobs that were ever seen in the folder, half-written ones included."""
    most = 0
    while time.monotonic() < until_s:
        total = 0
        for item in os.scandir(root / "chunks"):
            try:
                if ".chunk" in item.name:
                    total += max(0, item.stat().st_size - HEADER)
            except FileNotFoundError:
                continue
        most = max(most, total)
        time.sleep(0.001)
    return most


def check(root: Path) -> ChunkStore:
    """Opened alone, there is nothing to repair, and all reads back."""
    store = cases.open_store(root, MODEL, TIERS)
    assert store._owners.alone and not any(store.repairs.values()), store.repairs
    for key, kept in store._catalog.kept.items():
        assert cases.holds(store, key, chunk_of(kept.entry.content_id))
    names = {p.name for p in (root / "chunks").iterdir()}
    assert names == {f"{key}.chunk" for key in store._catalog.kept}
    assert store._index.claims() == []
    return store


def start(root: Path, n: int, seconds: float) -> list[tuple[object, Connection]]:
    until_s = time.monotonic() + seconds
    found = []
    for i in range(n):
        ours, theirs = CONTEXT.Pipe()
        child = CONTEXT.Process(target=work, args=(root, i, until_s, theirs))
        child.start()
        found.append((child, ours))
    return found


@pytest.mark.parametrize(
    ("n_processes", "seconds"), [(2, 2.0), pytest.param(4, 60.0, marks=pytest.mark.slow)]
)
def test_processes_ingest_read_and_evict(tmp_path: Path, n_processes: int, seconds: float) -> None:
    (tmp_path / "chunks").mkdir()
    children = start(tmp_path, n_processes, seconds)
    most = most_on_disk(tmp_path, time.monotonic() + seconds - 0.5)
    results = []
    for child, pipe in children:
        assert pipe.poll(30)
        results.append(pipe.recv())
        child.join()  # type: ignore[attr-defined]
    for counts in results:
        assert "error" not in counts, counts
        assert counts.get("corrupt", 0) == counts["bad"] == 0, counts
        assert not any(counts[f"{tier.name} overfull"] for tier in TIERS)
        assert min(counts["put"], counts["read"]) > 10, counts
    assert sum(counts["alone"] for counts in results) == 1
    # chunks of every tier have files: each tier's cap holds, so their sum does
    assert 0 < most <= CAPACITY + 2 * SIZE + SIZE
    check(tmp_path).close()


@pytest.mark.parametrize("n_rounds", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_one_of_two_is_killed(tmp_path: Path, n_rounds: int) -> None:
    """What it was at is cleared up by the one that lives on; nothing is corrupt."""
    draw = random.Random(3)
    for _ in range(n_rounds):
        (_, pipe), (victim, _) = start(tmp_path, 2, 0.7)
        time.sleep(draw.uniform(0.1, 0.5))
        os.kill(victim.pid, signal.SIGKILL)  # type: ignore[attr-defined]
        assert pipe.poll(30)
        counts = pipe.recv()
        assert "error" not in counts and counts.get("corrupt", 0) == 0, counts
        assert not any(counts[f"{tier.name} overfull"] for tier in TIERS)
        victim.join()  # type: ignore[attr-defined]
        store = cases.open_store(tmp_path, MODEL, TIERS)
        assert store.repairs["bad_files_removed"] == store.repairs["index_rebuilt"] == 0
        store.close()
        check(tmp_path).close()


def test_what_one_does_the_other_sees(tmp_path: Path) -> None:
    one, two = (cases.open_store(tmp_path, MODEL, TIERS) for _ in range(2))
    assert (one._owners.alone, two._owners.alone) == (True, False)
    a = cases.put(one, "0", chunk_of("0"))
    assert cases.holds(two, a, chunk_of("0")) and len(two.index("rank")) == 1
    assert two.tiers["disk"].used_bytes == SIZE
    one.place(a, "dram")
    assert two.index("rank").lookup(["0"])[0].tier == "dram"  # type: ignore[union-attr]
    assert cases.holds(two, a, chunk_of("0"), "dram")
    assert cases.put(two, "0", chunk_of("0")) == a and two.counters.puts == 0
    for i in range(1, 7):
        cases.put(two, str(i), chunk_of(str(i)))
    cases.put(one, "7", chunk_of("7"))
    assert one.tiers["disk"].used_bytes == 6 * SIZE
    one.discard(a)
    assert two.index("rank").lookup(["0"]) == [None]
    with pytest.raises(StoreError, match="must be in the store"):
        cases.read_all(two, a)
    assert two.counters.missing_files == 0
    one.close()
    assert len(two.index("rank")) >= 5
    two.close()


def test_only_what_changed_is_read_again(tmp_path: Path) -> None:
    """Else every write of one process would cost the others a look at the whole index."""
    one, two = (cases.open_store(tmp_path, MODEL) for _ in range(2))
    for i in range(40):
        cases.put(one, str(i), chunk_of(str(i)))
    assert len(two.index("rank")) == 40
    a = one.index("rank").lookup(["3"])[0]
    b = one.index("rank").lookup(["4"])[0]
    assert a is not None and b is not None
    one.discard(a.key)
    one.place(b.key, "dram")
    with two._catalog.changed:
        assert two._index.changed_elsewhere()
        changed = two._index.changed_rows()
        two._index.look_again()
    assert set(changed) == {a.key, b.key} and changed[a.key] is None
    assert len(two.index("rank")) == 39
    one.close()
    two.close()


def test_a_claim_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    store = cases.open_store(tmp_path, MODEL, TIERS)
    key = cases.put(store, "0", chunk_of("0"))
    store.discard(key)
    with sqlite3.connect(tmp_path / "index.sqlite") as db:
        db.execute("INSERT INTO claims VALUES (?, 77, 'disk', ?)", (key, 5 * SIZE))
    assert len(store.index("rank")) == 0 and store.tiers["disk"].used_bytes == 5 * SIZE
    for i in range(1, 6):
        cases.put(store, str(i), chunk_of(str(i)))
    assert cases.holds(store, cases.put(store, "0", chunk_of("0")), chunk_of("0"))
    assert store.tiers["disk"].used_bytes == 6 * SIZE
    store.close()


def test_those_who_share_a_folder_agree_on_its_tiers(tmp_path: Path) -> None:
    store = cases.open_store(tmp_path, MODEL, TIERS)
    with pytest.raises(StoreError, match="name the same tiers") as e:
        cases.open_store(tmp_path, MODEL)
    assert "\n" not in str(e.value)
    store.close()
    cases.open_store(tmp_path, MODEL).close()


# Older versions


def as_version_1(root: Path) -> None:
    """Make the index what the first version wrote: no number, no claims, no tiers."""
    with sqlite3.connect(root / "index.sqlite") as db:
        for name in ("claims", "tiers", "changes"):
            db.execute(f"DROP TABLE {name}")
        for act in ("insert", "update", "delete"):
            db.execute(f"DROP TRIGGER chunks_{act}")
        db.execute("PRAGMA user_version = 0")


def test_a_store_of_version_1_is_migrated(tmp_path: Path) -> None:
    store = cases.open_store(tmp_path, MODEL, TIERS)
    key = cases.put(store, "0", chunk_of("0"))
    store.close()
    as_version_1(tmp_path)
    store = cases.open_store(tmp_path, MODEL, TIERS)
    assert cases.holds(store, key, chunk_of("0")) and not any(store.repairs.values())
    cases.put(store, "1", chunk_of("1"))
    store.close()
    with sqlite3.connect(tmp_path / "index.sqlite") as db:
        assert db.execute("PRAGMA user_version").fetchone() == (2,)


def test_a_store_of_a_later_version_is_refused(tmp_path: Path) -> None:
    cases.open_store(tmp_path, MODEL, TIERS).close()
    with sqlite3.connect(tmp_path / "index.sqlite") as db:
        db.execute("PRAGMA user_version = 3")
    with pytest.raises(StoreError, match=r"must have version 2.*with version 3") as e:
        cases.open_store(tmp_path, MODEL, TIERS)
    assert "\n" not in str(e.value)


def test_chunk_files_of_another_format_are_refused_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cachetune.runtime import chunk_file

    monkeypatch.setattr(chunk_file, "FORMAT_VERSION", 7)
    store = cases.open_store(tmp_path, MODEL, TIERS)
    key = cases.put(store, "0", chunk_of("0"))
    store.close()
    monkeypatch.undo()
    (tmp_path / "index.sqlite").unlink()
    with pytest.raises(StoreError, match=f"{key} of format 7") as e:
        cases.open_store(tmp_path, MODEL, TIERS)
    assert "\n" not in str(e.value) and cases.chunk_file(store, key).exists()
