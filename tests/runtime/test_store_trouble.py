"""Trouble at the wrong moment: what a store promised, claimed or lent is accounted for after it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cachetune.core.errors import StoreError
from cachetune.core.layout import chunk_bytes
from cachetune.runtime import catalog, chunk_file, store_index
from cachetune.runtime.chunk_store import ChunkStore, TierConfig
from cachetune.runtime.runner import Runner
from cachetune.runtime.tiers import BufferPool

from . import model_cases
from . import store_cases as cases

N = 77
MODEL = cases.make_model()
SIZE = chunk_bytes(MODEL, N)
CHUNK = cases.make_chunk(MODEL, N)


@pytest.fixture(autouse=True)
def _no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "CLAIM_WAIT_S", 1.0)


def die(store: ChunkStore) -> None:
    """As if the process was killed: its claims stay."""
    store._owners.close()
    store._index.close()


def flip(path: Path) -> None:
    """One bit of the last layer's first row group."""
    data = bytearray(path.read_bytes())
    data[-SIZE // MODEL.n_layers + 1000] ^= 4
    path.write_bytes(data)


def test_a_slice_of_pinned_pages_keeps_its_buffer() -> None:
    """A device's pages are arrays: views of them must not forget which array was lent."""
    pool = BufferPool(lambda size: np.zeros(size, dtype=np.uint8))
    part = pool.lend(100_000)[:100_000]
    where = part.ctypes.data
    other = pool.lend(100_000)
    assert other.ctypes.data != where
    part = part[5:]
    assert pool.lend(100_000).ctypes.data != where
    del part
    assert where in {pool.lend(100_000).ctypes.data for _ in range(2)}


def test_a_number_that_is_given_again_does_not_revive_a_claim(tmp_path: Path) -> None:
    tiers = (TierConfig("disk", "file", capacity_bytes=3 * SIZE),)
    a, b = (cases.open_store(tmp_path, MODEL, tiers) for _ in range(2))
    key = cases.put(a, "0", CHUNK)
    a.discard(key)
    with a._catalog.changed:
        a._catalog.promise(key, "disk", 3 * SIZE)
    number = a._owners.number
    die(a)
    c = cases.open_store(tmp_path, MODEL, tiers)
    assert c._owners.number == number and not c._owners.alone
    assert c._index.claims() == []
    for store, content_id in ((b, "0"), (c, "1"), (b, "2")):
        assert cases.holds(store, cases.put(store, content_id, CHUNK), CHUNK)
    assert b.tiers["disk"].used_bytes == 3 * SIZE and len(b.index("rank")) == 3
    b.close()
    c.close()


# Bad bytes


def test_an_index_of_a_tier_leaves_out_and_discards_bad_chunks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = cases.open_store(tmp_path)
    keys = {c: cases.put(store, c, CHUNK) for c in "abc"}
    flip(cases.chunk_file(store, keys["b"]))
    entries = store.index("rank", tier="dram").lookup("abc")
    assert [e is not None for e in entries] == [True, False, True]
    assert "discarded" in caplog.text and keys["b"] in caplog.text
    assert not cases.chunk_file(store, keys["b"]).exists() and len(store.index("rank")) == 2
    assert not store.place_if_sound(keys["b"], "dram")  # gone
    assert store._index.claims() == [] and store.tiers["disk"].used_bytes == 2 * SIZE
    store.close()
    with pytest.raises(StoreError, match="must be open"):
        store.place_if_sound(keys["a"], "dram")


def test_a_bad_chunk_is_ingested_again(tmp_path: Path) -> None:
    loaded, _ = model_cases.make_twins("llama")
    workload = model_cases.prompt_workload(
        [(model_cases.tokens(40), model_cases.tokens(33), model_cases.tokens(5))]
    )
    plan = model_cases.plan_with("cachetune", 0.3)
    with Runner(loaded, tmp_path, model_cases.TIERS) as runner:
        runner.prepare(workload, plan, "dram")
        key = next(iter(runner.store._catalog.kept))
        path = cases.chunk_file(runner.store, key)
        good = path.read_bytes()
    path.write_bytes(good[:9000] + bytes([good[9000] ^ 1]) + good[9001:])
    with Runner(loaded, tmp_path, model_cases.TIERS) as runner:
        runner.prepare(workload, plan, "dram")
        assert len(runner.index(plan, "dram")) == 2
    assert path.read_bytes() == good


# Put anew in another order


ORDERS = CHUNK, cases.Chunk(CHUNK.k, CHUNK.v, CHUNK.order.flip(0))


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[ChunkStore, ChunkStore]]:
    found = cases.open_store(tmp_path), cases.open_store(tmp_path)
    yield found
    for store in found:
        store.close()


def put_anew(store: ChunkStore, key: str, tier: str) -> None:
    store.discard(key)
    assert cases.put(store, "a", ORDERS[1], tier) == key


@pytest.mark.parametrize("tier", ["disk", "dram", "hbm"])
def test_who_follows_reads_the_new_order(pair: tuple[ChunkStore, ChunkStore], tier: str) -> None:
    one, two = pair
    key = cases.put(one, "a", ORDERS[0], tier)
    assert cases.holds(two, key, ORDERS[0])
    assert (two.order(key) == ORDERS[0].order).all()
    put_anew(one, key, tier)
    assert len(two.index("rank")) == 1
    assert (two.order(key) == ORDERS[1].order).all()
    assert cases.holds(two, key, ORDERS[1])
    assert two.counters.bad_groups == 0


@pytest.mark.parametrize("tier", ["disk", "dram", "hbm"])
def test_a_request_under_way_keeps_to_its_order(
    pair: tuple[ChunkStore, ChunkStore], tier: str
) -> None:
    one, two = pair
    key = cases.put(one, "a", ORDERS[0], tier)
    order = two.order(key)
    two.read(key, 0, 1, [N], cases.REQUEST, order=order)
    put_anew(one, key, tier)
    two.index("rank")
    with pytest.raises(StoreError, match="must keep its order"):
        two.read(key, 1, 2, [N], cases.REQUEST, order=order)
    two.read(key, 1, 2, [N], cases.REQUEST, order=two.order(key).clone())


@pytest.mark.parametrize("tier", ["disk", "dram", "hbm"])
def test_a_moved_chunk_keeps_its_copy(pair: tuple[ChunkStore, ChunkStore], tier: str) -> None:
    one, two = pair
    key = cases.put(one, "a", CHUNK, tier)
    assert cases.holds(two, key, CHUNK)
    one.place(key, "dram")
    two.index("rank")
    assert cases.holds(two, key, CHUNK, tier)
    assert two.counters.ram_loads + two.counters.device_loads == (tier != "disk")


def test_who_has_not_looked_never_mixes_two_orders(pair: tuple[ChunkStore, ChunkStore]) -> None:
    one, two = pair
    key = cases.put(one, "a", ORDERS[0])
    assert (two.order(key) == ORDERS[0].order).all()
    put_anew(one, key, "disk")
    with pytest.raises(StoreError, match="must keep its order") as e:
        cases.read_all(two, key)
    assert not isinstance(e.value, chunk_file.ChunkCorrupt)  # it would be discarded
    assert two.counters.bad_groups == 0
    assert (two.order(key) == ORDERS[1].order).all() and cases.holds(two, key, ORDERS[1])


def test_put_anew_while_a_read_waits_for_it(
    pair: tuple[ChunkStore, ChunkStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = pair
    key = cases.put(one, "a", ORDERS[0], "dram")
    two.order(key)
    real = two._catalog.claim

    def claim(wanted: str) -> Any:
        put_anew(one, key, "dram")
        monkeypatch.undo()
        return real(wanted)

    monkeypatch.setattr(two._catalog, "claim", claim)
    with pytest.raises(StoreError, match="must keep its order"):
        cases.read_all(two, key)
    assert cases.holds(two, key, ORDERS[1]) and two.counters.bad_groups == 0


def test_a_store_of_the_first_format_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (chunk_file, store_index):
        monkeypatch.setattr(module, "FORMAT_VERSION", 1)
    store = cases.open_store(tmp_path)
    key = cases.put(store, "a", CHUNK)
    store.close()
    monkeypatch.setattr(chunk_file, "FORMAT_VERSION", 2)
    monkeypatch.setattr(store_index, "FORMAT_VERSION", 2)
    with pytest.raises(StoreError, match=r"one model and format.*format 2 for 1"):
        cases.open_store(tmp_path)
    assert cases.chunk_file(store, key).exists()


# After an eviction


@pytest.fixture
def full(tmp_path: Path) -> Iterator[ChunkStore]:
    """Holds "a" and "b" and nothing more."""
    tiers = (
        TierConfig("disk", "file", capacity_bytes=2 * SIZE),
        TierConfig("dram", "dram", capacity_bytes=SIZE),
        TierConfig("hbm", "device", capacity_bytes=SIZE, demote_to="dram"),
    )
    store = cases.open_store(tmp_path, MODEL, tiers)
    for content_id in "ab":
        cases.put(store, content_id, CHUNK)
    yield store
    store.close()


@pytest.mark.parametrize("where", ["_index.release", "room.remove_bytes"])
def test_trouble_after_an_eviction_leaks_nothing(
    full: ChunkStore, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def fail(*_: Any) -> None:
        raise StoreError("the index is busy")

    evicted = full.index("rank").lookup("a")[0]
    assert evicted is not None
    with monkeypatch.context() as m:
        part, name = where.split(".")
        m.setattr(getattr(full, part), name, fail)
        with pytest.raises(StoreError, match="busy"):
            cases.put(full, "c", CHUNK)
    assert not full._catalog.claimed
    # "b", and "a" until somebody clears up; nothing of "c"
    with full._catalog.changed:
        full._catalog.refresh()
    assert full.tiers["disk"].used_bytes == 2 * SIZE
    for content_id in "ca":
        assert cases.holds(full, cases.put(full, content_id, CHUNK), CHUNK)
    assert full.tiers["disk"].used_bytes == 2 * SIZE == SIZE * len(full.index("rank"))
    assert full._index.claims() == [] and not full._catalog.claimed
    assert len(list((full.root / "chunks").iterdir())) == 2


def test_a_fall_to_ram_that_fails_is_a_read_from_the_file(
    full: ChunkStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    key = cases.put(full, "d", CHUNK, "hbm")
    with monkeypatch.context() as m, caplog.at_level(logging.WARNING):
        m.setattr(full.room, "_to_ram", fail)
        cases.put(full, "e", CHUNK, "hbm")
    assert "launch failure" in caplog.text
    assert full.entry(key).tier == "dram" and key not in full._catalog.ram
    assert cases.holds(full, key, CHUNK) and full.counters.ram_loads == 1
    assert [full.tiers[t].used_bytes for t in ("dram", "hbm")] == [SIZE, SIZE]
    assert full._index.claims() == [] and not full._catalog.claimed


class Slow:
    """A condition that leaves others time to take its lock whenever it is let go."""

    def __init__(self, condition: threading.Condition) -> None:
        self._condition = condition

    def __enter__(self) -> None:
        self._condition.__enter__()

    def __exit__(self, *_: object) -> None:
        self._condition.__exit__(None, None, None)
        time.sleep(0.05)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._condition, name)


def test_who_claims_an_evicted_chunk_next_keeps_its_claim(
    full: ChunkStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is let go under a lock; the next one's claim must not be dropped behind that."""
    evicted = full.index("rank").lookup("a")[0]
    assert evicted is not None
    claims, held = full._catalog, threading.Event()
    done = threading.Event()

    def claim() -> None:
        with claims.claim(evicted.key):
            held.set()
            done.wait(10)

    other = threading.Thread(target=claim)
    release = claims.release

    def release_and_be_awaited(key: str) -> None:
        release(key)
        other.start()
        time.sleep(0.02)  # it waits for the lock by now

    with monkeypatch.context() as m:
        m.setattr(claims, "changed", Slow(claims.changed))
        m.setattr(claims, "release", release_and_be_awaited)
        cases.put(full, "c", CHUNK)
    assert held.wait(10)
    assert evicted.key in claims.claimed
    done.set()
    other.join()
    assert not claims.claimed and full._index.claims() == []
