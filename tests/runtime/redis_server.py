"""A real Redis or Valkey server for the tests, on a port of its own, without a disk."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from cachetune.runtime.chunk_store import ChunkStore, TierConfig
from cachetune.runtime.resp import RespConnection

from . import store_cases as cases

BINARY = shutil.which("valkey-server") or shutil.which("redis-server")


class RedisServer:
    """Start, stop, freeze and kill a server."""

    def __init__(self, folder: Path, *settings: str) -> None:
        if BINARY is None:
            pytest.skip("neither valkey-server nor redis-server is installed")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0?timeout_s=1"
        self._folder = folder
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it and wait until it answers."""
        assert BINARY is not None
        self._process = subprocess.Popen(
            [BINARY, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "",
             "--appendonly", "no", "--dir", str(self._folder), *self._settings],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline_s = time.monotonic() + 20
        while time.monotonic() < deadline_s:
            try:
                with socket.create_connection(("127.0.0.1", self.port), 1) as s:
                    s.sendall(b"PING\r\n")
                    if s.recv(64):
                        return
            except OSError:
                time.sleep(0.02)
        raise AssertionError("the server did not start")

    def kill(self) -> None:
        """End it at once; everything it held is lost."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """It stays connected and answers nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """It goes on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)


def call(server: RedisServer, *words: Any) -> Any:
    """One command on a connection of its own."""
    connection = RespConnection(server.url, 5.0)
    try:
        return connection.call(*words)
    finally:
        connection.close()


def open_store(root: Path, url: str, **settings: Any) -> ChunkStore:
    """A store with the tiers disk, dram and remote."""
    remote = TierConfig("remote", "remote", url=url, **settings)
    return cases.open_store(root, tiers=(*cases.TIERS, remote))
