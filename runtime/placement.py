"""`Placement`: has the bytes of a chunk where a tier keeps them: file, server, RAM, device."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .catalog import Catalog, Kept
from .chunk_file import CHUNK_SUFFIX, write_chunk
from .chunk_reader import ChunkReader, remote_error
from .room import Room
from .tiers import StoreTier


class Placement:
    """Moves chunks of an open store into tiers; whoever calls `write` has claimed the chunk."""

    def __init__(self, folder: Path, catalog: Catalog, reader: ChunkReader, room: Room) -> None:
        self._folder = folder
        self._catalog = catalog
        self._reader = reader
        self._room = room

    def path(self, key: str) -> Path:
        """Where the file of a chunk lies."""
        return self._folder / f"{key}{CHUNK_SUFFIX}"

    def write(
        self, where: StoreTier, key: str, header: bytes, blobs: np.ndarray, blob_bytes: int
    ) -> None:
        """Put header and blobs, `blob_bytes` each, where they survive this process.

        Raises:
            StoreError: no space, no permission; a remote tier does not answer.
        """
        if where.remote is None:
            write_chunk(self.path(key), header, blobs)
            return
        try:
            where.remote.write(key, header, blobs, blob_bytes)
        except OSError as e:
            raise remote_error(where, key, e) from None

    def place(self, key: str, where: StoreTier) -> Kept:
        """See `ChunkStore.place`."""
        catalog = self._catalog
        with catalog.claim(key):
            kept = catalog.find(key)
            try:
                if where.name in kept.tiers:
                    self._reader.load(kept, where)
                    with catalog.changed, catalog.shared():
                        catalog.serve_from(kept, where.name)
                else:
                    with self._room.take(key, where, kept.entry.n_bytes):
                        self._bring(kept, where)
            finally:
                catalog.drop_unused_copies(kept)
            catalog.touch(kept)
            return kept

    def _bring(self, kept: Kept, where: StoreTier) -> None:
        """Have the bytes of a claimed chunk in one more tier, where room was taken."""
        catalog, key = self._catalog, kept.entry.key
        writes = where.remote is not None or not catalog.has_file(kept)
        if writes:
            header, blobs = self._reader.whole(kept)
            self.write(where, key, header, blobs, kept.blob_bytes)
        try:
            self._reader.load(kept, where)
            with catalog.changed, catalog.shared():
                catalog.arrive(kept, where)
        except BaseException:
            if writes:
                self._room.remove_bytes(where, key, kept.path)
            raise
