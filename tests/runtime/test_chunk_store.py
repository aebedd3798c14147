"""The chunk store gives back what was put, or an error."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cachetune.core.errors import StoreError
from cachetune.core.layout import chunk_bytes, n_reads, read_bytes
from cachetune.core.model_spec import Dtype
from cachetune.runtime.chunk_file import Geometry, temp_path
from cachetune.runtime.chunk_store import ChunkCorrupt, ChunkStore

from . import store_cases as cases

N = 77


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ChunkStore]:
    store = cases.open_store(tmp_path)
    yield store
    store.close()


@pytest.mark.parametrize("tier", ["disk", "dram", "hbm"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("n_tokens", [1, 31, 32, 33, N, 256])
def test_a_chunk_comes_back_in_its_order(
    tmp_path: Path, dtype: Dtype, n_tokens: int, tier: str
) -> None:
    model = cases.make_model(dtype)
    chunk = cases.make_chunk(model, n_tokens)
    store = cases.open_store(tmp_path, model)
    key = cases.put(store, "a", chunk, tier)
    assert cases.holds(store, key, chunk)
    assert torch.equal(store.order(key), chunk.order)
    assert store.entry(key).n_bytes == chunk_bytes(model, n_tokens)
    file_bytes = cases.chunk_file(store, key).stat().st_size
    assert file_bytes % 4096 == 0 and file_bytes > chunk_bytes(model, n_tokens)
    store.close()


@pytest.mark.parametrize("tier", ["disk", "dram"])
def test_a_prefix_of_rows_costs_what_the_layout_says(store: ChunkStore, tier: str) -> None:
    chunk = cases.make_chunk(store.model, 200)
    key = cases.put(store, "a", chunk, tier)
    for ratio in (0.0, 0.15, 0.5, 0.84, 1.0):
        counts = [round((1 - ratio) * 200), 64, 0]
        before = store.counters.bytes_read
        rows = store.read(key, 0, 3, counts, 4096)
        sizes = [read_bytes(store.model, n) for n in counts]
        assert rows.n_bytes == store.counters.bytes_read - before == sum(sizes)
        assert rows.n_requests == sum(n_reads(size, 4096) for size in sizes)
        for layer, n in enumerate(counts):
            assert torch.equal(rows.k(layer), chunk.k[layer][chunk.order[:n]])
            assert torch.equal(rows.v(layer), chunk.v[layer][chunk.order[:n]])


def test_a_read_of_a_limited_tier_lasts_until_its_last_slot_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one so short that the waits between its requests are left out."""
    tiers = (cases.TierConfig("slow", "file", limit_bytes_per_s=1e9),)
    store, chunk = cases.open_store(tmp_path, tiers=tiers), cases.make_chunk(cases.make_model(), N)
    key = cases.put(store, "a", chunk, "slow")
    link, ends, waited = store.tiers["slow"].limiter, [], []
    assert link is not None
    reserve = link.reserve
    monkeypatch.setattr(link, "reserve", lambda *a: ends.append(reserve(*a)) or ends[-1])
    monkeypatch.setattr(link, "wait", waited.append)
    store.read(key, 0, 3, [N, 1, N], 4096)
    assert len(ends) > 3 and waited == ends[-1:]
    store.close()


def test_layers_in_the_middle(store: ChunkStore) -> None:
    chunk = cases.make_chunk(store.model, N)
    rows = store.read(cases.put(store, "a", chunk), 1, 2, [40], 8192)
    assert torch.equal(rows.v(1), chunk.v[1][chunk.order[:40]])
    with pytest.raises(StoreError, match=r"layer 0, read 1\.\.1"):
        rows.k(0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sizes_agree_with_the_layout(dtype: Dtype) -> None:
    model = cases.make_model(dtype)
    shape = Geometry.of(model)
    assert all(shape.read_bytes(n) == read_bytes(model, n) for n in range(300))


def test_rows_outlive_their_buffer_s_next_use(store: ChunkStore) -> None:
    a, b = (cases.make_chunk(store.model, 32, seed) for seed in (1, 2))
    keys = [cases.put(store, "a", a), cases.put(store, "b", b)]
    kept = store.read(keys[0], 0, 1, [32], 4096).k(0)  # one group: a view, its rows object gone
    for _ in range(5):
        store.read(keys[1], 0, 1, [32], 4096)
    assert torch.equal(kept, a.k[0][a.order])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ((0, 4, [1] * 4, 4096), "layers 0..4"),
        ((1, 1, [], 4096), "layers 1..1"),
        ((0, 1, [78], 4096), "within 0..77"),
        ((0, 2, [1], 4096), "rows"),
        ((0, 1, [1], 5000), "multiple of 4096"),
    ],
)
def test_a_read_that_makes_no_sense(store: ChunkStore, call: tuple, message: str) -> None:
    key = cases.put(store, "a", cases.make_chunk(store.model, N))
    with pytest.raises(StoreError, match=message):
        store.read(key, *call)


def test_a_put_that_makes_no_sense(store: ChunkStore) -> None:
    c = cases.make_chunk(store.model, 4)
    twice = torch.tensor([0, 1, 1, 3])
    for k, v, order in (
        (c.k[:2], c.v, c.order), (c.k, c.v, c.order[:3]), (c.k.half(), c.v, c.order),
        (c.k, c.v, twice), (c.k[:, :0], c.v[:, :0], c.order[:0]),
    ):  # fmt: skip
        with pytest.raises(StoreError):
            store.put("a", k, v, order, order_name="rank", tier="disk")
    with pytest.raises(StoreError, match="disk, dram"):
        store.put("a", c.k, c.v, c.order, order_name="rank", tier="tape")
    assert len(store.index("rank")) == 0


def test_a_second_put_writes_nothing(store: ChunkStore) -> None:
    chunk = cases.make_chunk(store.model, N)
    key = cases.put(store, "a", chunk)
    before = cases.chunk_file(store, key).stat()
    assert cases.put(store, "a", cases.make_chunk(store.model, N, seed=9)) == key
    after = cases.chunk_file(store, key).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert cases.holds(store, key, chunk)


def test_a_tenant_never_sees_another_s_chunks(store: ChunkStore) -> None:
    chunk = cases.make_chunk(store.model, N)
    keys = {t: cases.put(store, "a", chunk, tenant=t) for t in ("", "red", "blue")}
    assert len(set(keys.values())) == 3
    for tenant, key in keys.items():
        index = store.index("rank", tenant)
        found = index.lookup(["a"], tenant)[0]
        assert len(index) == 1 and found is not None and found.key == key
    assert len(store.index("rank", "green")) == len(store.index("position", "red")) == 0
    assert b"blue" not in cases.chunk_file(store, keys["blue"]).read_bytes()


def test_prefix_entries_are_found_by_their_chain(store: ChunkStore) -> None:
    c = cases.make_chunk(store.model, N)
    alone = cases.put(store, "a", c)
    chained = store.put(
        "a", c.k, c.v, c.order, order_name="rank", tier="disk", kind="prefix", chain="x" * 32
    )
    assert chained.key != alone and store.entry(chained.key).kind == "prefix"
    assert len(store.index("rank")) == 2


# Damage


def flip(path: Path, bit: int) -> None:
    """Flip one bit of a file in place."""
    with path.open("r+b") as f:
        f.seek(bit // 8)
        byte = f.read(1)[0]
        f.seek(bit // 8)
        f.write(bytes([byte ^ 1 << bit % 8]))


def test_every_flipped_bit_is_found(store: ChunkStore) -> None:
    key = cases.put(store, "a", cases.make_chunk(store.model, N))
    path, rng = cases.chunk_file(store, key), random.Random(0)
    blob = read_bytes(store.model, N)
    header = path.stat().st_size - 3 * blob
    group = 32 * store.model.kv_bytes_per_token_layer + 8
    in_header = [8 * i + rng.randrange(8) for i in range(32)]
    in_header += [rng.randrange(8 * header) for _ in range(60)]
    for bit in in_header:
        flip(path, bit)
        with pytest.raises(ChunkCorrupt, match=key):
            store.place(key, "dram")
        flip(path, bit)
    for _ in range(100):
        layer = rng.randrange(3)
        bit = 8 * (header + layer * blob) + rng.randrange(8 * 3 * group)
        flip(path, bit)
        with pytest.raises(ChunkCorrupt, match=f"{key} layer {layer}"):
            cases.read_all(store, key)
        with pytest.raises(ChunkCorrupt, match=f"{key} layer {layer}"):
            store.place(key, "dram")
        flip(path, bit)
    assert store.counters.bad_groups == 200
    store.place(key, "dram")


def test_a_flipped_bit_in_memory_is_found(store: ChunkStore) -> None:
    key = cases.put(store, "a", cases.make_chunk(store.model, N), "dram")
    store._catalog.ram[key][5000] ^= 1
    with pytest.raises(ChunkCorrupt, match="layer 0"):
        cases.read_all(store, key)
    assert cases.read_all(store, key, "disk")


@pytest.mark.parametrize("keep", [0, 100, 4096, 9000, 0.5, -4096, -1])
def test_a_cut_off_file_is_found(store: ChunkStore, keep: float) -> None:
    key = cases.put(store, "a", cases.make_chunk(store.model, N))
    path = cases.chunk_file(store, key)
    size = path.stat().st_size
    os.truncate(path, int(keep * size) if keep == 0.5 else int(keep) % size)
    with pytest.raises(ChunkCorrupt, match=key):
        cases.read_all(store, key)


def test_a_missing_file_is_found(store: ChunkStore) -> None:
    key = cases.put(store, "a", cases.make_chunk(store.model, N))
    cases.chunk_file(store, key).unlink()
    with pytest.raises(ChunkCorrupt, match=f"{key}: the file is missing"):
        cases.read_all(store, key)
    assert store.counters.missing_files == 1
    store.discard(key)
    with pytest.raises(StoreError, match="must be in the store"):
        store.entry(key)


def test_swapped_files_are_found(store: ChunkStore) -> None:
    keys = [cases.put(store, c, cases.make_chunk(store.model, N)) for c in ("a", "b")]
    a, b = (cases.chunk_file(store, key) for key in keys)
    a.rename(b.with_suffix(".x"))
    b.rename(a)
    b.with_suffix(".x").rename(b)
    for key in keys:
        with pytest.raises(ChunkCorrupt, match=f"{key} layer 0"):
            cases.read_all(store, key)
        with pytest.raises(ChunkCorrupt, match="holds chunk"):
            store.place(key, "dram")


def test_swapped_layers_and_groups_are_found(store: ChunkStore) -> None:
    key = cases.put(store, "a", cases.make_chunk(store.model, 64))
    path = cases.chunk_file(store, key)
    good = path.read_bytes()
    blob = read_bytes(store.model, 64)
    header = len(good) - 3 * blob
    one, two = good[header : header + blob], good[header + blob : header + 2 * blob]
    path.write_bytes(good[:header] + two + one + good[header + 2 * blob :])
    with pytest.raises(ChunkCorrupt, match="layer 0"):
        cases.read_all(store, key)
    group = 32 * store.model.kv_bytes_per_token_layer + 8
    swapped = one[group : 2 * group] + one[:group] + one[2 * group :]
    path.write_bytes(good[:header] + swapped + good[header + blob :])
    with pytest.raises(ChunkCorrupt, match="row group 0"):
        cases.read_all(store, key)


def test_a_chunk_is_on_disk_before_it_has_its_name(
    store: ChunkStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is synced, then renamed, then its folder is synced; only then is it listed."""
    real_sync, real_rename, done = os.fsync, os.rename, []

    def sync(fd: int) -> None:
        done.append(("sync", Path(f"/proc/self/fd/{fd}").readlink().name))
        real_sync(fd)

    def rename(a: Path, b: Path) -> None:
        done.append(("rename", Path(b).name))
        real_rename(a, b)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", rename)
    key = cases.put(store, "a", cases.make_chunk(store.model, 40))
    path = cases.chunk_file(store, key)
    want = [("sync", temp_path(path).name), ("rename", path.name), ("sync", path.parent.name)]
    assert [step for step in done if step in want] == want
