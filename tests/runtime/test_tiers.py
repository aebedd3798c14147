"""Tiers: one RAM copy, limits that hold, reads that overlap, and O_DIRECT or a warning."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from cachetune.core.errors import StoreError
from cachetune.core.eviction import EvictionName
from cachetune.core.layout import chunk_bytes
from cachetune.runtime.chunk_store import ChunkStore, TierConfig
from cachetune.runtime.rate_limit import RateLimiter
from cachetune.runtime.tiers import BufferPool, RamSource

from . import store_cases as cases

N = 200


def in_threads(n: int, work: Callable[[int], None]) -> None:
    """Run `work(i)` in n threads; the first error is raised here."""
    failed: list[BaseException] = []

    def guarded(i: int) -> None:
        try:
            work(i)
        except BaseException as e:
            failed.append(e)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(n)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if failed:
        raise failed[0]


# Placing


def test_dram_tiers_share_one_copy(tmp_path: Path) -> None:
    tiers = (*cases.TIERS, TierConfig("slow", "dram", limit_bytes_per_s=1e9))
    store = cases.open_store(tmp_path, tiers=tiers)
    chunk = cases.make_chunk(store.model, N)
    key = cases.put(store, "a", chunk)
    assert store.place(key, "dram").tier == "dram"
    assert store.place(key, "slow").tier == "slow"
    assert store.counters.ram_loads == 1 and len(store._catalog.ram) == 1
    for tier in ("disk", "dram", "slow"):
        assert cases.holds(store, key, chunk, tier)
        assert store.tiers[tier].used_bytes == chunk_bytes(store.model, N)
    store.close()


def test_a_chunk_lives_as_long_as_one_tier_holds_it(tmp_path: Path) -> None:
    size = chunk_bytes(cases.make_model(), N)
    tiers = (TierConfig("disk", "file"), TierConfig("dram", "dram", capacity_bytes=size))
    store = cases.open_store(tmp_path, tiers=tiers)
    chunk = cases.make_chunk(store.model, N)
    a, b = cases.put(store, "a", chunk), cases.put(store, "b", chunk)
    only_ram = cases.put(store, "c", chunk, "dram")
    store.place(a, "dram")
    assert not cases.chunk_file(store, only_ram).exists()
    store.place(b, "dram")
    assert store.entry(a).tier == "disk" and cases.holds(store, a, chunk)
    assert set(store._catalog.ram) == {b}
    with pytest.raises(StoreError, match="place it there first"):
        cases.read_all(store, a, "dram")
    store.close()


def test_an_index_of_one_tier_places_all_there(tmp_path: Path) -> None:
    store = cases.open_store(tmp_path)
    for c in "abc":
        cases.put(store, c, cases.make_chunk(store.model, N))
    entries = store.index("rank", tier="dram").lookup("abc")
    assert [e.tier for e in entries if e] == ["dram"] * 3
    assert [e.tier for e in store.index("rank").lookup("abc") if e] == ["dram"] * 3
    store.close()
    only_files = cases.open_store(tmp_path, tiers=(TierConfig("ssd", "file"),))
    assert [e.tier for e in only_files.index("rank").lookup("abc") if e] == ["ssd"] * 3
    only_files.close()


def test_an_index_of_a_small_tier_leaves_out_what_does_not_fit(tmp_path: Path) -> None:
    size = chunk_bytes(cases.make_model(), N)
    tiers = (TierConfig("disk", "file"), TierConfig("dram", "dram", capacity_bytes=2 * size))
    store = cases.open_store(tmp_path, tiers=tiers)
    chunk = cases.make_chunk(store.model, N)
    lost = cases.put(store, "a", chunk, "dram")
    for c in "bcd":
        cases.put(store, c, chunk)
    cases.put(store, "big", cases.make_chunk(store.model, 3 * N))
    index = store.index("rank", tier="dram")
    assert [e is not None for e in index.lookup(["a", "b", "c", "d", "big"])] == [
        False, False, True, True, False,
    ]  # fmt: skip
    with pytest.raises(StoreError, match="must be in the store"):
        store.entry(lost)
    assert len(store.index("rank")) == 4
    store.close()


def test_what_ram_evicts_goes_on_in_files(tmp_path: Path) -> None:
    size = chunk_bytes(cases.make_model(), N)
    tiers = (
        TierConfig("dram", "dram", capacity_bytes=2 * size, demote_to="disk"),
        TierConfig("disk", "file", capacity_bytes=3 * size),
    )
    store = cases.open_store(tmp_path, tiers=tiers)
    chunk = cases.make_chunk(store.model, N)
    keys = [cases.put(store, str(i), chunk, "dram") for i in range(7)]
    assert {key: kept.tiers for key, kept in store._catalog.kept.items()} == {
        key: {"disk"} if key in keys[2:5] else {"dram"} for key in keys[2:]
    }  # fmt: skip
    assert all(cases.holds(store, key, chunk) for key in keys[2:])
    assert [store.tiers[t].used_bytes for t in ("dram", "disk")] == [2 * size, 3 * size]
    assert len(list((tmp_path / "chunks").iterdir())) == 5 and store.room.demotions == 5
    assert store._index.claims() == [] and not store._catalog.claimed
    store.close()
    for bad in (TierConfig("a", "dram", demote_to="b"), TierConfig("a", "file", demote_to="a")):
        with pytest.raises(StoreError, match="demote_to must name"):
            cases.open_store(tmp_path / "bad", tiers=(bad,))


@pytest.mark.parametrize(("eviction", "left"), [("lru", "bcd"), ("lfu", "acd"), ("cost", "abd")])
def test_the_store_evicts_by_the_core_s_policies(
    tmp_path: Path, eviction: EvictionName, left: str
) -> None:
    """a is used often but long ago; c saves least per byte, as most of it is filling."""
    model = cases.make_model()
    size = chunk_bytes(model, 32)
    tiers = (TierConfig("disk", "file", capacity_bytes=3 * size, eviction=eviction),)
    store = cases.open_store(tmp_path, tiers=tiers)
    lengths = {"a": 32, "b": 32, "c": 1, "d": 32}
    assert {chunk_bytes(model, n) for n in lengths.values()} == {size}
    keys = {c: cases.put(store, c, cases.make_chunk(model, lengths[c])) for c in "abc"}
    for c in "aaaaabcc":
        cases.read_all(store, keys[c])
    cases.put(store, "d", cases.make_chunk(model, 32))
    assert {kept.entry.content_id for kept in store._catalog.kept.values()} == set(left)
    store.close()


def test_one_load_for_many_readers(tmp_path: Path) -> None:
    store = cases.open_store(tmp_path)
    chunk = cases.make_chunk(store.model, N)
    key = cases.put(store, "a", chunk, "dram")
    store.close()
    store = cases.open_store(tmp_path)

    def work(_: int) -> None:
        assert cases.holds(store, key, chunk)

    in_threads(4, work)
    assert store.counters.ram_loads == 1 and store.counters.reads == 4
    store.close()


@pytest.mark.parametrize(
    "change",
    [
        {"medium": "tape"},
        {"limit_bytes_per_s": 0.0},
        {"capacity_bytes": -1},
        {"read_latency_s": -1.0},
    ],
)
def test_a_tier_that_makes_no_sense(change: dict) -> None:
    with pytest.raises(StoreError, match="correct the value"):
        TierConfig(**{"name": "x", "medium": "file", **change})


# Reading at once


def test_two_reads_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = cases.open_store(tmp_path)
    chunk = cases.make_chunk(store.model, N)
    keys = [cases.put(store, c, chunk, "dram") for c in "ab"]
    both = threading.Barrier(2, timeout=10)
    real = RamSource.read_into

    def meet(self: RamSource, out: memoryview, at_byte: int) -> int:
        both.wait()
        return real(self, out, at_byte)

    monkeypatch.setattr(RamSource, "read_into", meet)

    def work(i: int) -> None:
        store.read(keys[i], 0, 1, [N], 1 << 20)

    in_threads(2, work)
    store.close()


@pytest.mark.parametrize("tier", ["file", "dram", "device"])
def test_readers_beside_writers_and_evictions(tmp_path: Path, tier: str) -> None:
    size = chunk_bytes(cases.make_model(), N)
    tiers = (TierConfig(tier, tier, capacity_bytes=4 * size),)
    store = cases.open_store(tmp_path, tiers=tiers)
    chunks = [cases.make_chunk(store.model, N, i) for i in range(4)]
    cases.put(store, "0", chunks[0], tier)
    n_good, written, other = [0, 0, 0], threading.Event(), set()

    def read_oldest(i: int) -> None:
        for entry, _ in list(store.index("rank")._entries.values())[:2]:
            try:
                assert cases.holds(store, entry.key, chunks[int(entry.content_id) % 4])
                n_good[i] += 1
            except StoreError as e:
                other.add(e.rule)

    def work(i: int) -> None:
        while i > 0 and not written.is_set():
            read_oldest(i)
        for j in range(60) if i == 0 else ():
            cases.put(store, f"{j}", chunks[j % 4], tier)
        written.set()

    in_threads(3, work)
    assert min(n_good[1:]) > 10
    assert other <= {"the chunk must be in the store"}  # evicted just then
    assert store.counters.bad_groups == store.counters.missing_files == 0
    store.close()


def test_counters_lose_nothing(tmp_path: Path) -> None:
    store = cases.open_store(tmp_path)
    key = cases.put(store, "a", cases.make_chunk(store.model, N), "dram")

    def work(_: int) -> None:
        for _ in range(100):
            cases.read_all(store, key)

    in_threads(4, work)
    size = chunk_bytes(store.model, N)
    assert (store.counters.reads, store.counters.bytes_read) == (400, 400 * size)
    store.close()


def test_a_buffer_is_lent_again_only_when_no_view_is_left() -> None:
    pool = BufferPool()
    array = pool.lend(100_000)
    where = array.ctypes.data
    assert where % 4096 == 0 and array.size >= 100_000
    view = torch.from_numpy(array).view(torch.float32)[5:9]
    del array
    other = pool.lend(100_000)
    assert other.ctypes.data != where
    del view
    assert pool.lend(100_000).ctypes.data == where


# Limits


def test_slots_of_a_link_never_overlap() -> None:
    link = RateLimiter(1e6, latency_s=0.001)
    start = time.perf_counter()
    ends = [link.reserve(1000) for _ in range(5)]
    assert ends[0] >= start + 0.002
    assert [b - a for a, b in pairwise(ends)] == pytest.approx([0.002] * 4)
    # A worker that wakes late asks from the end of its last slot.
    time.sleep(0.02)
    assert link.reserve(1000, ends[-1]) == pytest.approx(ends[-1] + 0.002)
    now = time.perf_counter()
    assert link.reserve(1000) >= now + 0.002  # idle until now


def test_waking_late_is_given_back_only_to_who_asks_again_at_once() -> None:
    link = RateLimiter(1e6)
    end = link.reserve(1000)
    time.sleep(0.01)
    link.wait(end)
    assert link.reserve(1000) == pytest.approx(end + 0.001)
    end = link.reserve(1000)
    link.wait(end)
    time.sleep(0.01)
    assert link.reserve(1000) > end + 0.01


@pytest.mark.parametrize("n_workers", [1, 3])
@pytest.mark.parametrize("medium", ["dram", "file"])
def test_a_limited_tier_has_its_rate(tmp_path: Path, medium: str, n_workers: int) -> None:
    rate, latency = 20e6, 0.001
    tiers = (TierConfig("slow", medium, limit_bytes_per_s=rate, read_latency_s=latency),)
    store = cases.open_store(tmp_path, tiers=tiers)
    chunk = cases.make_chunk(store.model, 2000)
    key = cases.put(store, "a", chunk, "slow")

    def work(_: int) -> None:
        for _ in range(6 // n_workers):
            store.read(key, 0, 3, [2000] * 3, cases.REQUEST)

    # Going too fast is always an error; too slow may be others' work on a busy machine.
    slack = 0.01 if os.getloadavg()[0] < (os.cpu_count() or 1) else 0.10
    errors = []
    for _ in range(5):
        before = (store.counters.requests, store.counters.bytes_read)
        start = time.perf_counter()
        in_threads(n_workers, work)
        took = time.perf_counter() - start
        n_requests = store.counters.requests - before[0]
        n_bytes = store.counters.bytes_read - before[1]
        errors.append(took / (n_bytes / rate + n_requests * latency) - 1)
        assert errors[-1] > -0.01
        if errors[-1] < slack:
            break
    assert min(errors) < slack
    store.close()


def test_waiting_leaves_the_interpreter_to_others() -> None:
    link, counted, stop = RateLimiter(1e6), [0], threading.Event()

    def count() -> None:
        while not stop.is_set():
            counted[0] += 1
            time.sleep(0)

    def wait(i: int) -> None:
        if i == 0:
            for _ in range(20):
                link.wait(link.reserve(5000))
            stop.set()
        else:
            count()

    in_threads(2, wait)
    assert counted[0] > 100  # a spin that holds the lock lets it run every 5 ms


# O_DIRECT


def disk_reads(store: ChunkStore, tmp_path: Path) -> None:
    chunk = cases.make_chunk(store.model, N)
    assert cases.holds(store, cases.put(store, "a", chunk), chunk)


def test_files_are_read_past_the_page_cache_or_say_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = cases.open_store(tmp_path)
    assert store.tiers["dram"].unbuffered is None
    assert store.tiers["disk"].unbuffered is not ("page cache" in caplog.text)
    disk_reads(store, tmp_path)
    store.close()


def test_a_file_system_without_direct_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = os.open

    def refuse(path: str, flags: int, mode: int = 0o777, **more: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, mode, **more)

    monkeypatch.setattr(os, "open", refuse)
    with caplog.at_level(logging.WARNING):
        store = cases.open_store(tmp_path)
        disk_reads(store, tmp_path)
    assert store.tiers["disk"].unbuffered is False
    assert len(caplog.records) == 1 and "page cache" in caplog.text
    store.close()


def test_direct_reads_that_fail_at_the_first_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = cases.open_store(tmp_path)
    if not store.tiers["disk"].unbuffered:
        pytest.skip("no O_DIRECT here")
    real = os.preadv

    def refuse(fd: int, buffers: list, offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", refuse)
    with caplog.at_level(logging.WARNING):
        disk_reads(store, tmp_path)
        chunk = cases.make_chunk(store.model, N, 3)
        assert cases.holds(store, cases.put(store, "b", chunk), chunk)
    assert store.tiers["disk"].unbuffered is False and len(caplog.records) == 1
    store.close()
