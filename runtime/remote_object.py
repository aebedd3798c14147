"""Chunks in an object store, through obstore: an object per chunk, the bytes of a chunk file.

An object appears whole or not at all, so no order of writes is needed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np

from ..core.errors import StoreError
from ..core.layout import ALIGN_BYTES
from .chunk_file import CHUNK_SUFFIX, header_size
from .remote import RemoteUrl

WINDOW_BYTES = 32 << 20
"""Ranges that are fetched at once; the library sends them side by side."""


class ObjectMedium:
    """Implements `remote.RemoteMedium`.

    Raises:
        StoreError: obstore is not installed.
    """

    def __init__(self, where: RemoteUrl) -> None:
        try:
            import obstore
            from obstore.store import from_url
        except ImportError:
            raise StoreError(
                "an object-store tier needs the library obstore",
                values=f"a URL of scheme {where.scheme}",
                remedy="install cachetune[remote]",
            ) from None
        self._library: Any = obstore
        more: dict[str, Any] = {}
        if where.scheme == "file":
            more = {"mkdir": True}
        elif where.scheme != "memory":
            more = {"client_options": {"timeout": timedelta(seconds=where.timeout_s)}}
        try:
            self.store: Any = from_url(where.base, **more)
        except Exception as e:  # the library's own classes
            raise StoreError(
                "the URL of an object store must be one that obstore can open",
                values=str(e).splitlines()[0],
                remedy="correct it",
            ) from None
        self._prefix = where.prefix

    def write(self, key: str, header: bytes, blobs: np.ndarray, blob_bytes: int) -> None:
        """Keep a chunk."""
        data = b"".join((header, blobs.data.cast("B")))
        with _os_errors(key):
            self._library.put(self.store, self._path(key), data)

    def header(self, key: str) -> bytes:
        """The header's bytes."""
        path = self._path(key)
        with _os_errors(key):
            start = bytes(self._library.get_range(self.store, path, start=0, length=ALIGN_BYTES))
            size = header_size(start)
            if size <= len(start):
                return start[:size]
            return bytes(self._library.get_range(self.store, path, start=0, length=size))

    def open(self, key: str, header_bytes: int, blob_bytes: int) -> ObjectSource:
        """The blobs, to be read."""
        return ObjectSource(self._library, self.store, self._path(key), key, header_bytes)

    def remove(self, key: str) -> None:
        """Forget a chunk."""
        try:
            with _os_errors(key):
                self._library.delete(self.store, self._path(key))
        except FileNotFoundError:
            pass

    def keys(self) -> set[str]:
        """All chunks there."""
        with _os_errors("the list"):
            pages = self._library.list(self.store, prefix=f"{self._prefix}/")
            names = [item["path"].rsplit("/", 1)[-1] for page in pages for item in page]
        return {n.removesuffix(CHUNK_SUFFIX) for n in names if n.endswith(CHUNK_SUFFIX)}

    def close(self) -> None:
        """The library closes by itself."""

    def _path(self, key: str) -> str:
        return f"{self._prefix}/{key}{CHUNK_SUFFIX}"


class ObjectSource:
    """One read of a chunk: announced ranges are fetched many at a time."""

    def __init__(self, library: Any, store: Any, path: str, key: str, blobs_at: int) -> None:
        self._library = library
        self._store = store
        self._path = path
        self._key = key
        self._blobs_at = blobs_at
        self._ahead: deque[tuple[int, int]] = deque()
        self._here: deque[tuple[int, Any]] = deque()

    def announce(self, ranges: Sequence[tuple[int, int]]) -> None:
        """They are fetched when the first of them is read."""
        self._ahead.extend(ranges)

    def read_into(self, out: memoryview, at_byte: int) -> int:
        """Copy the range that was fetched."""
        if not self._here:
            self._fetch(at_byte, len(out))
        start, data = self._here.popleft()
        if start != at_byte:
            raise AssertionError(f"announced byte {start}, read {at_byte}")
        view = memoryview(data).cast("B")
        out[: len(view)] = view
        return len(view)

    def close(self) -> None:
        """Let go of what was fetched."""
        self._here.clear()
        self._ahead.clear()

    def _fetch(self, at_byte: int, n_bytes: int) -> None:
        if not self._ahead:
            self._ahead.append((at_byte, n_bytes))
        batch: list[tuple[int, int]] = []
        total = 0
        while self._ahead and (not batch or total + self._ahead[0][1] <= WINDOW_BYTES):
            batch.append(self._ahead.popleft())
            total += batch[-1][1]
        with _os_errors(self._key):
            found = self._library.get_ranges(
                self._store,
                self._path,
                starts=[self._blobs_at + at for at, _ in batch],
                lengths=[n for _, n in batch],
            )
        self._here.extend((at, data) for (at, _), data in zip(batch, found, strict=True))


@contextmanager
def _os_errors(key: str) -> Iterator[None]:
    """The library's errors as those of a file system."""
    try:
        yield
    except OSError:
        raise
    except Exception as e:  # its classes share no base but this
        if "NotFound" in type(e).__name__:
            raise FileNotFoundError(key) from None
        raise ConnectionError(f"{type(e).__name__}: {str(e).splitlines()[0]}") from None
