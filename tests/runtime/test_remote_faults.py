"""Remote tiers in trouble: damaged values, servers that are full, dead, frozen or absent."""

from __future__ import annotations

import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cachetune.core.errors import StoreError
from cachetune.core.layout import chunk_bytes
from cachetune.runtime.chunk_store import ChunkCorrupt, ChunkStore, TierConfig
from cachetune.runtime.remote_redis import REST_S, RedisMedium
from cachetune.runtime.resp import RespConnection
from cachetune.runtime.runner import Runner
from cachetune.runtime.store_lock import NOBODY

from . import model_cases
from . import store_cases as cases
from .model_cases import plan_with, prompt_workload, tokens
from .redis_server import RedisServer, call, open_store

N = 200


def test_every_flipped_bit_of_a_remote_blob_is_found(server: RedisServer, tmp_path: Path) -> None:
    store = open_store(tmp_path, server.url)
    key = cases.put(store, "a", cases.make_chunk(store.model, 32), "remote")
    remote = store.tiers["remote"].remote
    assert isinstance(remote, RedisMedium)
    name, payload = remote.name(key, 1), 32 * store.model.kv_bytes_per_token_layer + 8
    n_flips = 0
    for bit in range(0, 8 * payload, 37):
        old = call(server, "SETBIT", name, bit, 0)
        call(server, "SETBIT", name, bit, 1 - old)
        with pytest.raises(ChunkCorrupt, match=f"{key} layer 1"):
            cases.read_all(store, key)
        call(server, "SETBIT", name, bit, old)
        n_flips += 1
    assert store.counters.bad_groups == n_flips > 800
    cases.read_all(store, key)
    store.close()


@pytest.mark.parametrize("damage", ["layer gone", "layer short", "swapped", "header gone"])
def test_damaged_values_are_found(server: RedisServer, tmp_path: Path, damage: str) -> None:
    store = open_store(tmp_path, server.url)
    key = cases.put(store, "a", cases.make_chunk(store.model, N), "remote")
    remote = store.tiers["remote"].remote
    assert isinstance(remote, RedisMedium)
    if damage == "layer gone":
        call(server, "DEL", remote.name(key, 2))
    elif damage == "layer short":
        call(server, "SET", remote.name(key, 0), b"x" * 5000)
    elif damage == "swapped":
        call(server, "RENAME", remote.name(key, 0), remote.name(key, 1))
    else:
        call(server, "DEL", remote.name(key, "h"))
        store.close()
        store = open_store(tmp_path, server.url)
        assert store.repairs["rows_removed"] == 1 and len(store.index("rank")) == 0
        store.close()
        return
    with pytest.raises(ChunkCorrupt, match=key):
        cases.read_all(store, key)
    store.close()


def fill(store: ChunkStore) -> None:
    """More than the server of the next test may hold."""
    for i in range(50):
        cases.put(store, str(i), cases.make_chunk(store.model, 512), "remote")


def test_what_a_killed_writer_left_is_removed(server: RedisServer, tmp_path: Path) -> None:
    store = open_store(tmp_path, server.url)
    keep = cases.put(store, "a", cases.make_chunk(store.model, N), "remote")
    remote = store.tiers["remote"].remote
    assert isinstance(remote, RedisMedium)
    for layer in (0, 1):  # of three, and no header
        call(server, "SET", remote.name("f" * 40, layer), b"half")
    with store._catalog.changed:
        store._catalog.promise("f" * 40, "remote", 5000)
    store._catalog._owners.close()  # as if killed: the claim stays
    store._index.close()
    store = open_store(tmp_path, server.url)
    assert len(call(server, "KEYS", "*")) == 4 and len(store.index("rank")) == 1
    assert store.tiers["remote"].used_bytes == store.entry(keep).n_bytes
    store.close()


@pytest.fixture
def breaks(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """While it holds something, connections break as a chunk's second layer is written."""
    real = RespConnection.call
    on: list[bool] = []

    def call(self: RespConnection, *words: Any) -> Any:
        if on and words[0] == "SET" and words[1].endswith(":1"):
            raise ConnectionError("broken pipe")
        return real(self, *words)

    monkeypatch.setattr(RespConnection, "call", call)
    return on


def a_half(store: ChunkStore, breaks: list[bool], how: str) -> None:
    """Leave a half-written chunk "a" on the server."""
    chunk = cases.make_chunk(store.model, N)
    if how == "place":
        work = partial(store.place, cases.put(store, "a", chunk), "remote")
    else:
        work = partial(cases.put, store, "a", chunk, "remote")
    breaks.append(True)
    with pytest.raises(StoreError, match="broken pipe"):
        work()
    breaks.clear()
    assert store.tiers["remote"].used_bytes == 0 and not store._catalog.claimed
    assert [(c.owner, c.tier, c.n_bytes) for c in store._index.claims()] == [(NOBODY, "remote", 0)]


@pytest.mark.parametrize("then", ["another is put", "it is put", "opened again"])
@pytest.mark.parametrize("how", ["put", "place"])
def test_what_a_broken_connection_left_is_removed(
    server: RedisServer, tmp_path: Path, breaks: list[bool], how: str, then: str
) -> None:
    store = open_store(tmp_path, server.url)
    a_half(store, breaks, how)
    assert len(call(server, "KEYS", "*")) == 1
    time.sleep(REST_S)
    whole = 0
    if then == "opened again":
        store.close()
        store = open_store(tmp_path, server.url)
    elif then == "it is put" and how == "place":
        (kept,) = store._catalog.kept
        store.place(kept, "remote")
        whole = 1
    else:
        content_id = "a" if then == "it is put" else "b"
        cases.put(store, content_id, cases.make_chunk(store.model, N), "remote")
        whole = 1
    assert len(call(server, "KEYS", "*")) == 4 * whole
    assert store._index.claims() == []
    assert store.tiers["remote"].used_bytes == whole * chunk_bytes(store.model, N)
    store.close()


def test_a_half_is_remembered_over_a_start_without_the_server(
    tmp_path: Path, breaks: list[bool]
) -> None:
    server = RedisServer(tmp_path)
    store = open_store(tmp_path, server.url)
    a_half(store, breaks, "place")
    store.close()
    server.freeze()
    store = open_store(tmp_path, server.url)
    assert [c.owner for c in store._index.claims()] == [NOBODY]
    server.thaw()
    time.sleep(REST_S)
    cases.put(store, "b", cases.make_chunk(store.model, N), "remote")
    assert len(call(server, "KEYS", "*")) == 4 and store._index.claims() == []
    store.close()
    server.kill()


def test_a_half_is_remembered_when_its_file_is_evicted(
    server: RedisServer, tmp_path: Path, breaks: list[bool]
) -> None:
    tiers = (
        TierConfig("disk", "file", capacity_bytes=chunk_bytes(cases.make_model(), N)),
        TierConfig("remote", "remote", url=server.url),
    )
    store = cases.open_store(tmp_path, tiers=tiers)
    a_half(store, breaks, "place")
    chunk = cases.make_chunk(store.model, N)
    cases.put(store, "b", chunk)
    assert [c.tier for c in store._index.claims()] == ["remote"] and len(store.index("rank")) == 1
    time.sleep(REST_S)
    cases.put(store, "c", chunk, "remote")
    assert len(call(server, "KEYS", "*")) == 4 and store._index.claims() == []
    store.close()


@pytest.mark.parametrize("capacity", [None, 2])
def test_what_a_dead_process_left_is_removed_by_the_others(
    server: RedisServer, tmp_path: Path, capacity: int | None
) -> None:
    size = chunk_bytes(cases.make_model(), N)
    more = {} if capacity is None else {"capacity_bytes": capacity * size}
    one, two = (open_store(tmp_path, server.url, **more) for _ in range(2))
    remote = one.tiers["remote"].remote
    assert isinstance(remote, RedisMedium)
    for layer in (0, 1):
        call(server, "SET", remote.name("f" * 40, layer), b"half")
    with one._catalog.changed:
        one._catalog.promise("f" * 40, "remote", 2 * size)
    one._owners.close()
    one._index.close()
    chunk = cases.make_chunk(two.model, N)
    assert cases.holds(two, cases.put(two, "a", chunk, "remote"), chunk)
    assert len(call(server, "KEYS", "*")) == 4 and two._index.claims() == []
    assert two.tiers["remote"].used_bytes == size
    two.close()


def test_a_full_server_is_one_clear_error(tmp_path: Path) -> None:
    server = RedisServer(tmp_path, "--maxmemory", "3mb", "--maxmemory-policy", "noeviction")
    store = open_store(tmp_path, server.url)
    try:
        with pytest.raises(StoreError, match="OOM") as e:
            fill(store)
        assert "\n" not in str(e.value)
        remote = store.tiers["remote"].remote
        assert isinstance(remote, RedisMedium)
        n_kept = len(store.index("rank"))
        assert remote.keys() == set(store._catalog.kept) and n_kept > 0
        assert len(call(server, "KEYS", "*")) == 4 * n_kept  # nothing half-written
        assert store.tiers["remote"].used_bytes == n_kept * chunk_bytes(store.model, 512)
    finally:
        store.close()
        server.kill()


def test_a_server_that_dies_and_comes_back(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    store = open_store(tmp_path, server.url)
    chunk = cases.make_chunk(store.model, N)
    key, other = (cases.put(store, c, chunk, "remote") for c in "ab")
    cases.read_all(store, key)
    server.kill()
    for _ in range(2):
        with pytest.raises(StoreError, match="remote tier 'remote' must answer") as e:
            cases.read_all(store, key)
        assert not isinstance(e.value, ChunkCorrupt)  # it may be there tomorrow
    assert store.counters.remote_failures == 2
    server.start()
    time.sleep(REST_S)
    with pytest.raises(ChunkCorrupt):  # this server has lost all
        cases.read_all(store, key)
    store.discard(key)
    store.discard(other)
    assert cases.holds(store, cases.put(store, "a", chunk, "remote"), chunk)
    server.freeze()
    start = time.monotonic()
    for _ in range(20):
        with pytest.raises(StoreError, match="must answer"):
            cases.read_all(store, key)
    assert time.monotonic() - start < 5  # the timeout is waited for once or so, not 20 times
    server.thaw()
    time.sleep(REST_S)
    assert cases.holds(store, key, chunk)
    store.close()
    server.kill()


def test_a_store_opens_without_its_server(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    store = open_store(tmp_path, server.url)
    key = cases.put(store, "a", cases.make_chunk(store.model, N), "remote")
    store.close()
    server.kill()
    store = open_store(tmp_path, server.url)
    assert store.entry(key).tier == "remote"
    with pytest.raises(StoreError, match="must answer"):
        cases.put(store, "b", cases.make_chunk(store.model, N), "remote")
    assert store.tiers["remote"].used_bytes == chunk_bytes(store.model, N)
    assert cases.put(store, "b", cases.make_chunk(store.model, N), "disk")
    store.close()


def test_a_server_dying_during_a_request_costs_one_recompute(tmp_path: Path) -> None:
    """The answer is that of a prompt whose chunks are computed; the event is counted."""
    torch.set_num_threads(1)
    loaded, _ = model_cases.make_twins("llama")
    server = RedisServer(tmp_path)
    parts = (tokens(40), tokens(33), tokens(50), tokens(12))
    workload, plan = (
        prompt_workload([parts], n_output=6),
        plan_with("cachetune", 0.3, layer_group=1),
    )
    tiers = [
        TierConfig("file", "file"),
        TierConfig("remote", "remote", url=server.url, limit_bytes_per_s=1e6),
    ]
    with Runner(loaded, tmp_path / "store", tiers) as runner:
        runner.prepare(workload, plan, "remote")
        good = runner.serve(workload, plan, runner.index(plan))
        assert good.n_reused_tokens[0] > 0 and good.n_fallbacks == 0
        expected = runner.serve(workload, plan, type(runner.index(plan))()).token_ids[0]
        killer = threading.Timer(0.03, server.kill)  # the loads take about 0.3 s
        killer.start()
        hurt = runner.serve(workload, plan, runner.index(plan))
        killer.join()
        assert hurt.token_ids[0] == expected
        assert hurt.n_fallbacks >= 1 and hurt.n_read_failures >= 1
        assert runner.store.counters.remote_failures == hurt.n_read_failures
        assert len(runner.store.index(plan.selector)) == 3  # not lost: the server may come back
    server.kill()
