"""A tier in the device's own memory: nothing moves on a hit, its cap holds, files survive."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from cachetune.core.errors import CapacityError, StoreError
from cachetune.core.eviction import EvictionName
from cachetune.core.layout import chunk_bytes
from cachetune.runtime.chunk_store import ChunkCorrupt, ChunkStore, TierConfig
from cachetune.runtime.device import Device
from cachetune.runtime.device_chunks import DeviceMemory
from cachetune.runtime.layer_rows import LayerRows
from torch.utils._python_dispatch import TorchDispatchMode

from . import store_cases as cases
from .model_cases import plan_with
from .test_tiers import in_threads

N = 200
MODEL = cases.make_model()
SIZE = chunk_bytes(MODEL, N)
TIERS = (TierConfig("hbm", "device"), TierConfig("dram", "dram"), TierConfig("file", "file"))
PLAN = plan_with("cachetune", 0.3)


class Launches(TorchDispatchMode):
    """Operators that are more than another view, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def opened(root: Path, *tiers: TierConfig, devices: DeviceMemory | None = None) -> ChunkStore:
    return ChunkStore(root, MODEL, "weights-1", tiers or TIERS, devices=devices)


def on_device(store: ChunkStore) -> set[str]:
    return set(store._catalog.on_device)


def test_rows_lie_where_they_are_kept(tmp_path: Path) -> None:
    """A hit hands out views of the chunk's own memory: no request, no byte read, none checked."""
    store = opened(tmp_path)
    chunk = cases.make_chunk(MODEL, N)
    key = cases.put(store, "a", chunk, "hbm")
    assert store.entry(key).tier == "hbm" and cases.holds(store, key, chunk)
    part = store._catalog.on_device[key].parts[0]
    rows = store.read(key, 1, 3, [70, 33], cases.REQUEST)
    assert rows.elements.data_ptr() == part.blobs.data_ptr() and part.blobs.numel() == SIZE
    assert rows.on(part.device) is rows and rows.is_on(part.device)
    assert rows.tier == "hbm" and rows.n_requests == 0
    assert torch.equal(rows.k(1), chunk.k[1, chunk.order[:70]])
    assert torch.equal(rows.v(2), chunk.v[2, chunk.order[:33]])
    counters = store.counters
    assert (counters.requests, counters.bytes_read, counters.device_loads) == (0, 0, 0)
    assert counters.reads == 2 and not store._reader._pool._lent
    store.close()


def test_rows_of_several_chunks_are_put_together_by_whole_groups(tmp_path: Path) -> None:
    """In two launches, however many chunks: hundreds of short ones would outlast their bytes."""
    store, reads, want = opened(tmp_path), [], []
    for name, n in (("a", 70), ("b", 32), ("c", 1)):
        chunk = cases.make_chunk(MODEL, N)
        reads.append(store.read(cases.put(store, name, chunk, "hbm"), 1, 3, [n, n], cases.REQUEST))
        want.append(tuple(x[2, chunk.order[:n]] for x in (chunk.k, chunk.v)))
    with Launches() as launches:
        found = LayerRows.joined_values(reads, 2)
    assert launches.names == ["aten.cat.default"] * 2
    starts = [0, 96, 128]
    for x, half in zip(found, (0, 1), strict=True):
        assert x.shape == (160, MODEL.n_kv_heads, MODEL.head_dim) and x.is_contiguous()
        for start, rows in zip(starts, want, strict=True):
            assert torch.equal(x[start : start + len(rows[half])], rows[half])
    store.close()


def test_files_are_what_survives(tmp_path: Path) -> None:
    store = opened(tmp_path)
    chunk = cases.make_chunk(MODEL, N)
    key = cases.put(store, "a", chunk, "hbm")
    assert cases.chunk_file(store, key).exists() and store.tiers["hbm"].used_bytes == SIZE
    store.close()
    store = opened(tmp_path)
    assert store.entry(key).tier == "hbm" and not on_device(store)
    assert store.tiers["hbm"].used_bytes == SIZE
    in_threads(4, lambda _: None if cases.holds(store, key, chunk) else pytest.fail("wrong rows"))
    assert store.counters.device_loads == 1 and on_device(store) == {key}
    store.discard(key)
    assert not on_device(store) and not list((tmp_path / "chunks").iterdir())
    store.close()


def test_without_the_tier_its_chunks_are_in_files(tmp_path: Path) -> None:
    store = opened(tmp_path)
    chunk = cases.make_chunk(MODEL, N)
    key = cases.put(store, "a", chunk, "hbm")
    store.close()
    store = opened(tmp_path, *TIERS[1:])
    assert store.entry(key).tier == "file" and cases.holds(store, key, chunk)
    store.close()


def test_capacity_holds_to_the_byte_under_four_writers(tmp_path: Path) -> None:
    small, large = 64, 200
    sizes = {n: chunk_bytes(MODEL, n) for n in (small, large)}
    capacity = 3 * sizes[large] + sizes[small]
    tiers = (
        TierConfig("hbm", "device", capacity_bytes=capacity, demote_to="dram"),
        TierConfig("dram", "dram", capacity_bytes=2 * sizes[large], demote_to="file"),
        TierConfig("file", "file", capacity_bytes=4 * sizes[large]),
    )
    store = opened(tmp_path, *tiers)
    stop, most, n_read = threading.Event(), dict.fromkeys(store.tiers, 0), [0] * 4

    def watch() -> None:
        while not stop.is_set():
            with store._catalog.changed:
                for name, tier in store.tiers.items():
                    most[name] = max(most[name], tier.used_bytes)

    def work(i: int) -> None:
        for j in range(12):
            n = (small, large)[j % 2]
            key = cases.put(store, f"{i}.{j}", cases.make_chunk(MODEL, n, j % 2), "hbm")
            with suppress(StoreError):  # evicted just then
                assert cases.holds(store, key, cases.make_chunk(MODEL, n, j % 2))
                n_read[i] += 1

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        in_threads(4, work)
    finally:
        stop.set()
        watcher.join()
    for config in tiers:
        assert config.capacity_bytes is not None
        assert config.capacity_bytes - sizes[large] < most[config.name] <= config.capacity_bytes
    catalog = store._catalog
    for medium, copies in (("hbm", catalog.on_device), ("dram", catalog.ram)):
        held = {key for key, kept in catalog.kept.items() if medium in kept.tiers}
        assert set(copies) <= held
        used = sum(kept.entry.n_bytes for key, kept in catalog.kept.items() if key in held)
        assert store.tiers[medium].used_bytes == used
    real = sum(part.blobs.nbytes for chunk in catalog.on_device.values() for part in chunk.parts)
    assert real == store.tiers["hbm"].used_bytes
    assert store.counters.bad_groups == 0 and not catalog.claimed and min(n_read) > 6
    store.close()


@pytest.mark.parametrize("below", ["dram", "file"])
def test_what_a_device_evicts_goes_on(tmp_path: Path, below: str) -> None:
    """To RAM from the device itself: its file is not read."""
    store = opened(
        tmp_path, TierConfig("hbm", "device", capacity_bytes=2 * SIZE, demote_to=below), *TIERS[1:]
    )
    chunks = [cases.make_chunk(MODEL, N, i) for i in range(5)]
    keys = [cases.put(store, str(i), chunk, "hbm") for i, chunk in enumerate(chunks)]
    assert [store.entry(key).tier for key in keys] == [below] * 3 + ["hbm"] * 2
    assert on_device(store) == set(keys[3:]) and store.room.demotions == 3
    assert set(store._catalog.ram) == (set(keys[:3]) if below == "dram" else set())
    assert all(cases.holds(store, key, chunk) for key, chunk in zip(keys, chunks, strict=True))
    assert store.counters.ram_loads == store.counters.device_loads == 0
    back = store.place(keys[0], "hbm")
    assert back.tier == "hbm" and cases.holds(store, keys[0], chunks[0])
    assert store.entry(keys[3]).tier == below and store.counters.device_loads == 1
    store.close()


@pytest.mark.parametrize(("eviction", "left"), [("lru", "bcd"), ("lfu", "acd"), ("cost", "abd")])
def test_devices_evict_by_the_core_s_policies(
    tmp_path: Path, eviction: EvictionName, left: str
) -> None:
    size = chunk_bytes(MODEL, 32)
    store = opened(
        tmp_path, TierConfig("hbm", "device", capacity_bytes=3 * size, eviction=eviction)
    )
    lengths = {"a": 32, "b": 32, "c": 1, "d": 32}
    keys = {c: cases.put(store, c, cases.make_chunk(MODEL, lengths[c]), "hbm") for c in "abc"}
    for c in "aaaaabcc":
        cases.read_all(store, keys[c])
    keys["d"] = cases.put(store, "d", cases.make_chunk(MODEL, 32), "hbm")
    assert on_device(store) == {keys[c] for c in left}
    store.close()


@pytest.mark.parametrize("where", ["file", "dram"])
def test_bad_bytes_are_found_when_they_are_placed(tmp_path: Path, where: str) -> None:
    store = opened(tmp_path)
    key = cases.put(store, "a", cases.make_chunk(MODEL, N), where)
    path = cases.chunk_file(store, key)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)
    if where == "dram":
        store._catalog.ram[key][SIZE // 2] ^= 16
    with pytest.raises(ChunkCorrupt, match="checksum of row group"):
        store.place(key, "hbm")
    assert store.entry(key).tier == where and not on_device(store)
    assert store.tiers["hbm"].used_bytes == 0 and store.counters.bad_groups == 1
    store.close()


def test_bad_bytes_are_found_at_the_first_use_after_a_restart(tmp_path: Path) -> None:
    store = opened(tmp_path)
    key = cases.put(store, "a", cases.make_chunk(MODEL, N), "hbm")
    path = cases.chunk_file(store, key)
    store.close()
    data = bytearray(path.read_bytes())
    data[-SIZE // 3] ^= 1
    path.write_bytes(data)
    store = opened(tmp_path)
    with pytest.raises(ChunkCorrupt):
        cases.read_all(store, key)
    assert not on_device(store)
    path.unlink()
    with pytest.raises(ChunkCorrupt, match="the file is missing"):
        cases.read_all(store, key)
    store.close()


class FullDevice(Device):
    """Has room for so many bytes."""

    def __init__(self, n_bytes: int) -> None:
        super().__init__()
        self.left = n_bytes

    def hold(self, pages: torch.Tensor) -> torch.Tensor:
        self.left -= pages.numel()
        if self.left < 0:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate much.")
        return super().hold(pages)


def test_a_device_without_room_refuses_and_nothing_is_left_behind(tmp_path: Path) -> None:
    device = FullDevice(SIZE + SIZE // 2)
    store = opened(tmp_path, devices=DeviceMemory(lambda: [(MODEL.n_layers, device)]))
    chunk = cases.make_chunk(MODEL, N)
    kept = cases.put(store, "a", chunk, "hbm")
    with pytest.raises(CapacityError, match="must fit into its memory"):
        cases.put(store, "b", chunk, "hbm")
    assert store.tiers["hbm"].used_bytes == SIZE and on_device(store) == {kept}
    assert len(list((tmp_path / "chunks").iterdir())) == 1 and not store._catalog.claimed
    other = cases.put(store, "b", chunk, "file")
    with pytest.raises(CapacityError):
        store.place(other, "hbm")
    assert cases.holds(store, other, chunk)
    store.close()
    store = opened(tmp_path, devices=DeviceMemory(lambda: [(MODEL.n_layers, FullDevice(0))]))
    with pytest.raises(StoreError, match="must fit into its memory"):  # a failed read: recomputed
        cases.read_all(store, kept)
    store.close()


def test_each_stage_has_its_layers(tmp_path: Path) -> None:
    places = [(1, Device(0)), (2, Device(1))]
    store = opened(tmp_path, devices=DeviceMemory(lambda: places))
    chunk = cases.make_chunk(MODEL, N)
    key = cases.put(store, "a", chunk, "hbm")
    for start, stop, device in ((0, 1, places[0][1]), (1, 3, places[1][1]), (2, 3, places[1][1])):
        rows = store.read(key, start, stop, [N] * (stop - start), cases.REQUEST)
        assert rows.is_on(device)
        for layer in range(start, stop):
            assert torch.equal(rows.k(layer), chunk.k[layer, chunk.order])
    with pytest.raises(StoreError, match="must lie on one pipeline stage"):
        store.read(key, 0, 2, [N] * 2, cases.REQUEST)
    places[:] = [(3, Device(0))]
    store.forget_devices()
    assert cases.holds(store, key, chunk) and store.counters.device_loads == 1
    store.close()


@pytest.mark.parametrize(
    "tier", [{"limit_bytes_per_s": 1e9}, {"read_latency_s": 0.1}, {"url": "redis://x"}]
)
def test_what_a_device_tier_cannot_be(tier: dict[str, Any]) -> None:
    with pytest.raises(StoreError):
        TierConfig(**{"name": "hbm", "medium": "device", **tier})


def test_demotions_go_down_only(tmp_path: Path) -> None:
    for pair in (
        (TierConfig("a", "dram", demote_to="b"), TierConfig("b", "device")),
        (TierConfig("a", "device", demote_to="b"), TierConfig("b", "device")),
    ):
        with pytest.raises(StoreError, match="demote_to must name a file tier, or for a device"):
            opened(tmp_path, *pair)
