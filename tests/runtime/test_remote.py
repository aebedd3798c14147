"""Remote tiers: the same promises as files, over a real Redis or Valkey server and obstore."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
from cachetune.core.errors import CapacityError, StoreError
from cachetune.core.layout import blob_bytes, chunk_bytes, n_reads, read_bytes
from cachetune.runtime.chunk_store import ChunkCorrupt, ChunkStore, TierConfig
from cachetune.runtime.remote import RemoteUrl, open_remote
from cachetune.runtime.remote_redis import RedisMedium
from cachetune.runtime.resp import RespConnection

from . import store_cases as cases
from .redis_server import RedisServer, call, open_store

N = 200


def files(store: ChunkStore) -> list[str]:
    return sorted(p.name for p in (store.root / "chunks").iterdir())


def test_a_chunk_comes_back_and_any_ratio_is_one_range(url: str, tmp_path: Path) -> None:
    store = open_store(tmp_path, url)
    chunk = cases.make_chunk(store.model, N)
    key = cases.put(store, "a", chunk, "remote")
    assert files(store) == [] and store.entry(key).tier == "remote"
    assert cases.holds(store, key, chunk)
    for ratio in (0.0, 0.15, 0.5, 1.0):
        counts = [round((1 - ratio) * N), 64, 0]
        before = store.counters.bytes_read
        rows = store.read(key, 0, 3, counts, 4096)
        sizes = [read_bytes(store.model, n) for n in counts]
        assert rows.n_bytes == store.counters.bytes_read - before == sum(sizes)
        assert rows.n_requests == sum(n_reads(size, 4096) for size in sizes)
        for layer, n in enumerate(counts):
            assert torch.equal(rows.k(layer), chunk.k[layer][chunk.order[:n]])
    store.close()
    store = open_store(tmp_path, url)  # its order has to be read again
    assert not any(store.repairs.values())
    assert torch.equal(store.order(key), chunk.order)
    assert store.tiers["remote"].used_bytes == chunk_bytes(store.model, N)
    store.close()


def test_moving_between_tiers(url: str, tmp_path: Path) -> None:
    store = open_store(tmp_path, url)
    chunk = cases.make_chunk(store.model, N)
    key = cases.put(store, "a", chunk, "remote")
    assert store.place(key, "dram").tier == "dram" and len(files(store)) == 1
    assert all(cases.holds(store, key, chunk, tier) for tier in ("disk", "dram", "remote"))
    other = cases.put(store, "b", chunk, "dram")
    store.place(other, "remote")
    assert cases.holds(store, other, chunk, "remote")
    for name in ("dram", "remote"):
        assert store.tiers[name].used_bytes == 2 * chunk_bytes(store.model, N)
    store.discard(key)
    remote = store.tiers["remote"].remote
    assert remote is not None and remote.keys() == {other}
    store.close()


def test_another_folder_finds_what_is_there(url: str, tmp_path: Path) -> None:
    store = open_store(tmp_path / "one", url)
    chunk = cases.make_chunk(store.model, N)
    key = cases.put(store, "a", chunk, "remote", tenant="red")
    store.close()
    store = open_store(tmp_path / "two", url)
    assert store.repairs["remote_adopted"] == 1
    assert cases.holds(store, key, chunk)
    assert len(store.index("rank")) == 0 and len(store.index("rank", "red")) == 1
    store.close()
    other = ChunkStore(
        tmp_path / "three", store.model, "weights-2", (TierConfig("r", "remote", url=url),)
    )
    assert len(other._catalog.kept) == 0  # another model's
    other.close()
    one = open_store(tmp_path / "one", url)
    two = open_store(tmp_path / "two", url)
    one.discard(key)
    with pytest.raises(ChunkCorrupt):  # nobody told it
        cases.read_all(two, key)
    one.close()
    two.close()


def test_capacity_of_a_remote_tier(url: str, tmp_path: Path) -> None:
    size = chunk_bytes(cases.make_model(), N)
    store = open_store(tmp_path, url, capacity_bytes=2 * size)
    chunk = cases.make_chunk(store.model, N)
    keys = [cases.put(store, c, chunk, "remote") for c in "abc"]
    remote = store.tiers["remote"].remote
    assert remote is not None and remote.keys() == set(keys[1:])
    assert store.tiers["remote"].used_bytes == 2 * size
    assert store._index.claims() == []
    with pytest.raises(CapacityError):
        cases.put(store, "d", cases.make_chunk(store.model, 3 * N), "remote")
    store.close()


@pytest.mark.parametrize("rate", [20e6])
def test_a_limited_remote_tier_has_its_rate(
    server: RedisServer, tmp_path: Path, rate: float
) -> None:
    store = open_store(tmp_path, server.url, limit_bytes_per_s=rate, read_latency_s=0.001)
    key = cases.put(store, "a", cases.make_chunk(store.model, 2000), "remote")
    slack = 0.02 if os.getloadavg()[0] < (os.cpu_count() or 1) else 0.15
    errors, due_s = [], 0.0
    first = time.perf_counter()
    for _ in range(5):
        start = time.perf_counter()
        rows = store.read(key, 0, 3, [2000] * 3, cases.REQUEST)
        took = time.perf_counter() - start
        link_s = rows.n_bytes / rate + rows.n_requests * 0.001
        errors.append(took / link_s - 1)
        due_s += link_s
        # A read may be faster than the link by what the last one woke too late; never all of them.
        assert time.perf_counter() - first > 0.99 * due_s
    assert min(errors, key=abs) < slack
    store.close()


def test_many_threads_share_a_tier(url: str, tmp_path: Path) -> None:
    store = open_store(tmp_path, url)
    chunks = [cases.make_chunk(store.model, N, i) for i in range(4)]
    keys = [cases.put(store, str(i), c, "remote") for i, c in enumerate(chunks)]
    failed: list[BaseException] = []

    def work(i: int) -> None:
        try:
            for j in range(25):
                assert cases.holds(store, keys[(i + j) % 4], chunks[(i + j) % 4])
        except BaseException as e:
            failed.append(e)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failed
    store.close()


def test_a_large_read_is_pipelined(server: RedisServer, tmp_path: Path) -> None:
    """All ranges are asked for before the first answer is taken, within the window."""
    medium = open_remote(server.url)
    blob = 1 << 20
    data = torch.randint(0, 255, (40 * blob,), dtype=torch.uint8).numpy()
    medium.write("k", b"header", data, blob)
    source = medium.open("k", 6, blob)
    ranges = [(layer * blob, blob) for layer in range(40)]
    source.announce(ranges)
    assert len(source._asked) == 16
    out = bytearray(blob)
    for at, n in ranges:
        assert source.read_into(memoryview(out), at) == n
        assert out == data[at : at + n].tobytes()
    source.close()
    medium.close()


TIMES = ("0", "-1", "nan", "inf", "1e300", "3601")


@pytest.mark.parametrize(
    "bad",
    [
        "ftp://x", "x", "redis://x?colour=red", *(f"redis://x?timeout_s={t}" for t in TIMES),
        "redis://:secret@x:abc", "redis://:secret@x:65536", "rediss://[::1", "redis://a..b",
    ],
)  # fmt: skip
def test_a_url_that_makes_no_sense(bad: str) -> None:
    with pytest.raises(StoreError, match="needs a URL") as e:
        RemoteUrl.of(bad)
    assert "secret" not in str(e.value)


def test_urls_that_can_be_asked() -> None:
    for good in ("redis://[::1]:7/0", "redis://h", "unix:///a/b", "s3://bucket/x", "memory:///"):
        assert RemoteUrl.of(good + "?timeout_s=3600").timeout_s == 3600


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\r\n", b"$x\r\n"])
def test_what_is_no_redis_server(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            for _ in range(2):
                link, _ = server.accept()
                with link:
                    link.recv(1000)
                    link.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        url = f"redis://127.0.0.1:{server.getsockname()[1]}"
        for ask in (
            lambda link: link.reply(),
            lambda link: link.reply_into(memoryview(bytearray(10))),
        ):
            link = RespConnection(url, 5)
            link.send([("PING",)])
            with pytest.raises(ConnectionError, match="no Redis server"):
                ask(link)
            link.close()
        thread.join()


def test_a_password_is_never_printed() -> None:
    config = TierConfig("r", "remote", url="redis://:secret@127.0.0.1:1/0")
    assert "secret" not in repr(config) + config.terms


@pytest.mark.parametrize("way", ["password", "socket"])
def test_ways_to_reach_a_server(tmp_path: Path, way: str) -> None:
    path = tmp_path / "s"
    more = ("--requirepass", "p@ss") if way == "password" else ("--unixsocket", str(path))
    server = RedisServer(tmp_path, *more)
    url = f"redis://:p%40ss@127.0.0.1:{server.port}/3" if way == "password" else f"unix://{path}"
    store = open_store(tmp_path / "store", url)
    chunk = cases.make_chunk(store.model, N)
    key = cases.put(store, "a", chunk, "remote")
    assert cases.holds(store, key, chunk)
    store.close()
    if way == "password":
        store = open_store(tmp_path / "other", url.replace("p%40ss", "wrong"))
        with pytest.raises(StoreError, match="must answer") as e:
            cases.put(store, "a", chunk, "remote")
        assert "wrong" not in str(e.value)
        store.close()
    server.kill()


def test_sizes_of_blobs_are_those_of_the_layout(server: RedisServer, tmp_path: Path) -> None:
    store = open_store(tmp_path, server.url)
    key = cases.put(store, "a", cases.make_chunk(store.model, N), "remote")
    remote = store.tiers["remote"].remote
    assert isinstance(remote, RedisMedium)
    assert call(server, "STRLEN", remote.name(key, 0)) == blob_bytes(store.model, N)
    store.close()
