"""RESP, the wire protocol of Redis and Valkey, as far as a chunk store needs it.

A bulk reply goes from the socket straight into the caller's buffer; a general client would build
the value, join its parts and hand out a copy. https://redis.io/docs/latest/develop/reference/protocol-spec
"""

from __future__ import annotations

import select
import socket
import ssl
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote, urlsplit

PORT = 6379
_LINE_BUFFER = 4096
"""What is read ahead while looking for the end of a line; the rest of a value bypasses it."""
_MOST_PARTS = 64
"""Buffers per sendmsg; the system's limit is higher."""

Part = bytes | memoryview


class ReplyError(OSError):
    """The server answered with an error."""


class RespConnection:
    """One connection. Not for several threads.

    Raises:
        OSError: on any call, when the server cannot be reached, hangs up or takes too long; the
            connection is of no use then.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        parts = urlsplit(url)
        if parts.scheme == "unix":
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket.settimeout(timeout_s)
            self._socket.connect(parts.path)
        else:
            address = parts.hostname or "127.0.0.1", parts.port or PORT
            self._socket = socket.create_connection(address, timeout_s)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._is_tls = parts.scheme == "rediss"
        if self._is_tls:
            context = ssl.create_default_context()
            self._socket = context.wrap_socket(self._socket, server_hostname=parts.hostname)
        self._buffer = memoryview(bytearray(_LINE_BUFFER))
        self._start = self._stop = 0
        self._greet(parts)

    def _greet(self, parts: Any) -> None:
        if parts.password:
            names = [unquote(parts.username)] if parts.username else []
            self.call("AUTH", *names, unquote(parts.password))
        database = parts.path.strip("/") if parts.scheme != "unix" else ""
        if database:
            self.call("SELECT", database)

    def call(self, *words: str | int | Part) -> Any:
        """One command and its reply: an int, bytes, None or a list of these."""
        self.send([words])
        return self.reply()

    def send(self, commands: Sequence[Sequence[str | int | Part]]) -> None:
        """Send commands at once; their replies must be fetched in order."""
        parts: list[Part] = []
        small = bytearray()
        for words in commands:
            small += b"*%d\r\n" % len(words)
            for word in words:
                data = word if isinstance(word, bytes | memoryview) else str(word).encode()
                n_bytes = data.nbytes if isinstance(data, memoryview) else len(data)
                small += b"$%d\r\n" % n_bytes
                if n_bytes < _LINE_BUFFER:
                    small += data
                else:
                    parts += [bytes(small), data]
                    small.clear()
                small += b"\r\n"
        parts.append(bytes(small))
        self._send_all([memoryview(part).cast("B") for part in parts])

    def _send_all(self, parts: list[memoryview]) -> None:
        while parts:
            if self._is_tls:  # which has no sendmsg
                self._socket.sendall(parts.pop(0))
                continue
            sent = self._socket.sendmsg(parts[:_MOST_PARTS])
            while parts and sent >= len(parts[0]):
                sent -= len(parts.pop(0))
            if parts and sent:
                parts[0] = parts[0][sent:]

    def reply(self) -> Any:
        """The next reply.

        Raises:
            ReplyError: the server says no.
        """
        kind, rest = self._line()
        if kind == b"-":
            raise ReplyError(rest.decode(errors="replace"))
        if kind == b"+":
            return rest
        count = _number(kind, rest)
        if kind == b":":
            return count
        if count < 0:
            return None
        if kind == b"*":
            return [self.reply() for _ in range(count)]
        data = bytearray(count)
        self._fill(memoryview(data))
        self._fill(memoryview(bytearray(2)))
        return bytes(data)

    def reply_into(self, out: memoryview) -> int:
        """The next reply, a value of at most `len(out)` bytes, put into `out`; its length."""
        kind, rest = self._line()
        if kind == b"-":
            raise ReplyError(rest.decode(errors="replace"))
        count = _number(kind, rest)
        if kind != b"$" or count > len(out):
            raise ConnectionError(f"a value of {len(out)} bytes was asked, got {kind!r} {count}")
        self._fill(out[: max(0, count)])
        if count >= 0:
            self._fill(memoryview(bytearray(2)))
        return max(0, count)

    @property
    def is_stale(self) -> bool:
        """While nothing is asked, anything to read is the news that the server hung up."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def _line(self) -> tuple[bytes, bytes]:
        """First byte and rest of the next line."""
        line = bytearray()
        while not line.endswith(b"\r\n"):
            if self._start == self._stop:
                self._start, self._stop = 0, self._receive(self._buffer)
            seen = bytes(self._buffer[self._start : self._stop])
            end = seen.find(b"\n") + 1 or len(seen)
            line += seen[:end]
            self._start += end
        return bytes(line[:1]), bytes(line[1:-2])

    def _fill(self, out: memoryview) -> None:
        """Take `len(out)` bytes, first those that were read ahead."""
        ready = min(len(out), self._stop - self._start)
        out[:ready] = self._buffer[self._start : self._start + ready]
        self._start += ready
        while ready < len(out):
            ready += self._receive(out[ready:])

    def _receive(self, out: memoryview) -> int:
        count = self._socket.recv_into(out)
        if count == 0:
            raise ConnectionResetError("the server has hung up")
        return count


def _number(kind: bytes, rest: bytes) -> int:
    """The number behind the first byte of a reply."""
    try:
        return int(rest)
    except ValueError:
        line = (kind + rest)[:40].decode(errors="replace")
        raise ConnectionError(f"this is no Redis server: it answers {line!r}") from None
