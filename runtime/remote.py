"""`RemoteMedium`: chunks that lie on another machine, by URL. The same bytes as in a chunk file.

    redis://[:password@]host:port[/db]   rediss:// with TLS, unix:///path of a socket
    s3://bucket/prefix, gs://, az://, file:///folder, memory:///    through obstore

`?timeout_s=2` bounds each wait, `&prefix=name` tells stores on one server apart. Stores that share
a server and a prefix see each other's chunks when they are opened; one may remove what another
still lists, which reads as missing and is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import SplitResult, parse_qs, urlsplit

import numpy as np

from ..core.errors import StoreError

TIMEOUT_S = 2.0
MAX_TIMEOUT_S = 3600.0
PREFIX = "cachetune"
REDIS_SCHEMES = ("redis", "rediss", "unix")
OBJECT_SCHEMES = ("s3", "gs", "az", "file", "memory")


class RemoteSource(Protocol):
    """An open remote chunk; see `tiers.Source`."""

    def announce(self, ranges: Sequence[tuple[int, int]]) -> None:
        """(at_byte, n_bytes) of each `read_into` to come, in order, so that all can be asked."""

    def read_into(self, out: memoryview, at_byte: int) -> int:
        """Fill `out`; returns the bytes there were, fewer at the end of the chunk."""

    def close(self) -> None:
        """Let go of the connection."""


class RemoteMedium(Protocol):
    """Keeps headers and blobs by key. Every method may be called by several threads.

    Raises:
        FileNotFoundError: the chunk is not there.
        OSError: the other side refuses, cannot be reached or takes longer than the timeout.
    """

    def write(self, key: str, header: bytes, blobs: np.ndarray, blob_bytes: int) -> None:
        """Keep a chunk whole, its header last; nothing of it can be listed before."""

    def header(self, key: str) -> bytes:
        """The header's bytes."""

    def open(self, key: str, header_bytes: int, blob_bytes: int) -> RemoteSource:
        """The blobs, to be read."""

    def remove(self, key: str) -> None:
        """Forget a chunk; unknown keys are ignored."""

    def keys(self) -> set[str]:
        """All chunks there."""

    def close(self) -> None:
        """Close every connection."""


@dataclass(frozen=True)
class RemoteUrl:
    """A URL taken apart: where, and the two settings, which are not passed on."""

    scheme: str
    base: str
    timeout_s: float
    prefix: str

    @staticmethod
    def of(url: str) -> RemoteUrl:
        """Take `url` apart.

        Raises:
            StoreError: a scheme that is not supported, or settings that make no sense.
        """
        parts = _split(url)
        settings = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        try:
            timeout_s = float(settings.pop("timeout_s", TIMEOUT_S))
        except ValueError:
            timeout_s = 0.0
        prefix = settings.pop("prefix", PREFIX)
        known = parts.scheme in (*REDIS_SCHEMES, *OBJECT_SCHEMES)
        if not known or settings or not 0 < timeout_s <= MAX_TIMEOUT_S or not prefix:
            raise StoreError(
                "a remote tier needs a URL of a scheme among "
                f"{', '.join((*REDIS_SCHEMES, *OBJECT_SCHEMES))} with no settings but timeout_s "
                f"above 0 and at most {MAX_TIMEOUT_S:g}, and prefix",
                values=f"scheme {parts.scheme!r}, settings {parts.query!r}",
                remedy="correct the URL, such as redis://127.0.0.1:6379/0?timeout_s=2",
            )
        return RemoteUrl(parts.scheme, parts._replace(query="").geturl(), timeout_s, prefix)


def _split(url: str) -> SplitResult:
    """A URL's parts; of a server's, host and port are such that it can be asked for."""
    try:
        parts = urlsplit(url)
        if parts.scheme in REDIS_SCHEMES:
            _ = parts.port, (parts.hostname or "").encode("idna")
    except ValueError:  # its text may hold the password, as all of the URL
        raise StoreError(
            "a remote tier needs a URL with a host name and a port from 0 to 65535",
            values=f"one of scheme {url.partition(':')[0]!r} that cannot be taken apart",
            remedy="correct the URL, such as redis://127.0.0.1:6379/0, an IPv6 address in [ ]",
        ) from None
    return parts


def open_remote(url: str) -> RemoteMedium:
    """The medium behind a URL; nothing is sent yet.

    Raises:
        StoreError: the URL makes no sense, or its library is not installed.
    """
    where = RemoteUrl.of(url)
    if where.scheme in REDIS_SCHEMES:
        from .remote_redis import RedisMedium

        return RedisMedium(where)
    from .remote_object import ObjectMedium

    return ObjectMedium(where)
