"""Chunks on a Redis or Valkey server: a value per layer, so that any ratio is one range of it.

    <prefix>:<key>:<layer>   the blob of a layer
    <prefix>:<key>:h         the header, written last and removed first

The ranges of a read are asked for ahead of the answers, up to `WINDOW_BYTES`. A server that failed
is left alone for `REST_S`, so that a request with many chunks waits for one timeout, not for all.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from .remote import RemoteUrl
from .resp import ReplyError, RespConnection

WINDOW_BYTES = 16 << 20
REST_S = 1.0
MAX_IDLE = 32
_SCAN_COUNT = 1000
_T = TypeVar("_T")


class RedisMedium:
    """Implements `remote.RemoteMedium`."""

    def __init__(self, where: RemoteUrl) -> None:
        self._where = where
        self._idle: deque[RespConnection] = deque()
        self._lock = threading.Lock()
        self._rests_until_s = 0.0
        self._closed = False
        self.n_connects = 0
        """Connections made so far, those made again included."""

    def write(self, key: str, header: bytes, blobs: np.ndarray, blob_bytes: int) -> None:
        """Keep a chunk; what a failed write left is removed if the server can be reached."""
        view = blobs.data.cast("B")
        layers = range(len(view) // blob_bytes)

        def put(connection: RespConnection) -> None:
            for layer in layers:
                blob = view[layer * blob_bytes : (layer + 1) * blob_bytes]
                connection.call("SET", self.name(key, layer), blob)
            connection.call("SET", self.name(key, "h"), header)

        try:
            self._with(put)
        except ReplyError:  # no memory, mostly
            names = [self.name(key, part) for part in ("h", *layers)]
            self._with(lambda connection: connection.call("UNLINK", *names))
            raise

    def header(self, key: str) -> bytes:
        """The header's bytes."""
        found: bytes | None = self._with(lambda c: c.call("GET", self.name(key, "h")))
        if found is None:
            raise FileNotFoundError(key)
        return found

    def open(self, key: str, header_bytes: int, blob_bytes: int) -> RedisSource:
        """The blobs, to be read."""
        return RedisSource(self, key, blob_bytes)

    def remove(self, key: str) -> None:
        """Header first, so that half a chunk is never listed."""

        def drop(connection: RespConnection) -> None:
            connection.call("UNLINK", self.name(key, "h"))
            layer = 0
            while connection.call("UNLINK", *(self.name(key, layer + i) for i in range(64))):
                layer += 64

        self._with(drop)

    def keys(self) -> set[str]:
        """Chunks with a header."""
        start, end = f"{self._where.prefix}:".encode(), b":h"

        def scan(connection: RespConnection) -> set[str]:
            found: set[str] = set()
            cursor = b"0"
            pattern = start + b"*" + end
            while True:
                cursor, names = connection.call(
                    "SCAN", cursor, "MATCH", pattern, "COUNT", _SCAN_COUNT
                )
                found |= {name[len(start) : -len(end)].decode() for name in names}
                if cursor == b"0":
                    return found

        return self._with(scan)

    def close(self) -> None:
        """Close every connection."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()

    def name(self, key: str, part: int | str) -> str:
        """What a part of a chunk is called on the server."""
        return f"{self._where.prefix}:{key}:{part}"

    # Connections

    def take(self) -> RespConnection:
        """A connection, to be given back or closed.

        Raises:
            OSError: no server; at once if it failed a moment ago.
        """
        while self._idle:
            try:
                connection = self._idle.pop()
            except IndexError:
                break
            if not connection.is_stale:
                return connection
            connection.close()
        if time.monotonic() < self._rests_until_s:
            raise ConnectionError(f"the server failed less than {REST_S:.0f} s ago")
        try:
            connection = RespConnection(self._where.base, self._where.timeout_s)
        except OSError:
            self.rest()
            raise
        with self._lock:
            self.n_connects += 1
        return connection

    def give_back(self, connection: RespConnection) -> None:
        """A connection whose replies were all fetched."""
        if self._closed or len(self._idle) >= MAX_IDLE:
            connection.close()
        else:
            self._idle.append(connection)

    def rest(self) -> None:
        """The server does not answer: drop idle connections, ask nothing for a while."""
        self._rests_until_s = time.monotonic() + REST_S
        while self._idle:
            self._idle.pop().close()

    def _with(self, work: Callable[[RespConnection], _T]) -> _T:
        """Do `work` on a connection."""
        connection = self.take()
        try:
            result = work(connection)
        except ReplyError:
            self.give_back(connection)
            raise
        except BaseException as e:
            connection.close()
            if isinstance(e, OSError):
                self.rest()
            raise
        self.give_back(connection)
        return result


class RedisSource:
    """One read of a chunk: ranges are asked ahead, answers come in order."""

    def __init__(self, medium: RedisMedium, key: str, blob_bytes: int) -> None:
        self._medium = medium
        self._key = key
        self._blob_bytes = blob_bytes
        self._connection: RespConnection | None = None
        self._ahead: deque[tuple[int, int]] = deque()
        self._asked: deque[tuple[int, int]] = deque()
        self._asked_bytes = 0

    def announce(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Ask for as many ranges as the window holds; the others follow the answers."""
        self._ahead.extend(ranges)
        self._ask()

    def read_into(self, out: memoryview, at_byte: int) -> int:
        """The answer to the oldest range, which must be this one."""
        if not self._asked:
            self.announce([(at_byte, len(out))])
        wanted = self._asked[0]
        if wanted != (at_byte, len(out)):
            raise AssertionError(f"announced {wanted}, read {(at_byte, len(out))}")
        count = self._guarded(lambda c: c.reply_into(out))
        self._asked.popleft()
        self._asked_bytes -= len(out)
        self._ask()
        return count

    def close(self) -> None:
        """Give the connection back, or hang up when answers are still to come."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if self._asked:
            connection.close()
        else:
            self._medium.give_back(connection)

    def _ask(self) -> None:
        commands = []
        while self._ahead and (
            not self._asked or self._asked_bytes + self._ahead[0][1] <= WINDOW_BYTES
        ):
            at_byte, n_bytes = self._ahead.popleft()
            self._asked.append((at_byte, n_bytes))
            self._asked_bytes += n_bytes
            commands.append(self._command(at_byte, n_bytes))
        if commands:
            self._guarded(lambda c: c.send(commands))

    def _command(self, at_byte: int, n_bytes: int) -> tuple[str | int, ...]:
        layer, start = divmod(at_byte, self._blob_bytes)
        return "GETRANGE", self._medium.name(self._key, layer), start, start + n_bytes - 1

    def _guarded(self, work: Callable[[RespConnection], _T]) -> _T:
        """Do `work`; after trouble the connection is of no use, as answers may be missing."""
        if self._connection is None:
            self._connection = self._medium.take()
        try:
            return work(self._connection)
        except OSError as e:
            self._connection.close()
            self._connection = None
            self._asked.clear()
            if not isinstance(e, ReplyError):
                self._medium.rest()
            raise
