"""A Redis server of our own for as long as a measurement lasts, and bare reads from it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from ..core.errors import StoreError
from ..core.units import MIB


@dataclass(frozen=True)
class RedisServer:
    """A server of our own on a free port, without persistence. Use as a context manager."""

    folder: tempfile.TemporaryDirectory[str]
    process: subprocess.Popen[bytes]
    port: int

    @staticmethod
    def start() -> RedisServer | None:
        """None where neither redis-server nor valkey-server is installed."""
        binary = shutil.which("redis-server") or shutil.which("valkey-server")
        if binary is None:
            return None
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        folder = tempfile.TemporaryDirectory(prefix="cachetune-")
        command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly",
                   "no", "--dir", folder.name]  # fmt: skip
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        for _ in range(100):
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                return RedisServer(folder, process, port)
            except OSError:
                time.sleep(0.05)
        process.kill()
        folder.cleanup()
        return None

    def __enter__(self) -> RedisServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()
        self.folder.cleanup()


def redis_reader(port: int, n_values: int, value_bytes: int = 4 * MIB) -> Callable[[int], int]:
    """`read_one` of `by_threads` on bare sockets: GET of a large value; fills the server first."""
    mine = threading.local()

    def connect() -> socket.socket:
        return socket.create_connection(("127.0.0.1", port))

    with connect() as link:
        for i in range(n_values):
            key, data = f"v{i}".encode(), os.urandom(value_bytes)
            link.sendall(b"*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n" % (len(key), key))
            link.sendall(b"$%d\r\n%s\r\n" % (len(data), data))
            if not link.recv(64).startswith(b"+OK"):
                raise StoreError("the server must keep a value", values=f"{value_bytes} bytes")

    def read_one(i: int) -> int:
        if not hasattr(mine, "link"):
            mine.link, mine.buffer = connect(), memoryview(bytearray(value_bytes + 64))
        key = f"v{i % n_values}".encode()
        mine.link.sendall(b"*2\r\n$3\r\nGET\r\n$%d\r\n%s\r\n" % (len(key), key))
        want, got = len(b"$%d\r\n" % value_bytes) + value_bytes + 2, 0
        while got < want:
            n = mine.link.recv_into(mine.buffer[got:want])
            if not n:
                raise ConnectionResetError("the server has hung up")
            got += n
        return value_bytes

    return read_one
