"""Reading rates: what is read is counted, shares are paired by round, fio is asked for O_DIRECT."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the store needs the runtime")

from cachetune.calibration import io_rates
from cachetune.calibration.io_rates import MODEL, Series
from cachetune.calibration.redis_rates import redis_reader
from cachetune.core.errors import StoreError
from cachetune.core.layout import read_bytes
from cachetune.runtime.chunk_store import ChunkStore
from cachetune.runtime.tiers import TierConfig


def test_shares_are_of_the_same_round() -> None:
    ours, theirs = Series("store", 1, [1.0, 10.0, 3.0]), Series("fio psync", 1, [2.0, 10.0, 4.0])
    assert io_rates.paired_share(ours, theirs) == 0.75
    assert io_rates.best([ours, theirs], "store") is ours
    assert io_rates.best([ours], "fio") is None


def test_the_store_is_read_whole_and_counted(tmp_path: Path) -> None:
    store = ChunkStore(tmp_path, MODEL, "io", [TierConfig("file", "file")])
    keys = io_rates.fill_store(store, "file", 1)
    read_one = io_rates.store_reader(store, keys, "file", 1 << 18)
    per_read = io_rates.LAYERS_PER_READ * read_bytes(MODEL, io_rates.CHUNK_TOKENS)
    assert [read_one(i) for i in range(9)] == [per_read] * 9
    before = store.counters.bytes_read
    rate = io_rates.by_threads(2, read_one)(time.perf_counter() + 0.05)
    assert rate > 0 and (store.counters.bytes_read - before) % per_read == 0
    store.close()


def test_a_server_that_hangs_up_ends_the_read() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            for answer in (b"+OK\r\n", b"$10\r\nhalf"):
                link, _ = server.accept()
                with link:
                    link.recv(1000)
                    link.sendall(answer)
                    link.shutdown(socket.SHUT_WR)
                    while link.recv(1000):
                        pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        read_one = redis_reader(server.getsockname()[1], 1, 10)
        with pytest.raises(ConnectionError, match="hung up"):
            read_one(0)


def test_every_contender_is_in_every_round(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(bytes(1 << 20))
    read = io_rates.by_threads(1, io_rates.file_reader(raw, 1 << 16, direct=False))
    told: list[tuple[int, int]] = []
    contenders = [(Series("a", 1), read), (Series("b", 1), read)]
    found = io_rates.run_rounds(contenders, 2, 0.01, lambda what, i, n: told.append((i, n)))
    assert [len(s.rates) for s in found] == [2, 2] and told[-1] == (6, 6)
    assert min(r for s in found for r in s.rates) > 0


def test_fio_reads_past_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(bytes(1 << 20))
    seen: list[list[str]] = []

    def fake(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        seen.append(command)
        answer = json.dumps({"jobs": [{"read": {"bw_bytes": 123}}]})
        return subprocess.CompletedProcess(command, 0, "note: a line before\n" + answer, "")

    monkeypatch.setattr(io_rates.subprocess, "run", fake)
    assert io_rates.fio_reader(raw, 4, 1 << 18)(time.perf_counter() + 1) == 123.0
    assert {"--direct=1", "--numjobs=4", "--bs=262144", f"--size={1 << 18}"} <= set(seen[0])
    failed = subprocess.CompletedProcess([], 1, "", "no such engine")
    monkeypatch.setattr(io_rates.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(StoreError, match="no such engine"):
        io_rates.fio_reader(raw, 1, 1 << 18)(time.perf_counter() + 1)


def test_storage_is_named(tmp_path: Path) -> None:
    assert set(io_rates.storage_of(tmp_path)) == {"block_device", "virtual"}
