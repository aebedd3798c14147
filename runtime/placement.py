"""`Placement`: has the bytes of a chunk where a tier keeps them: file, server, RAM, device."""

from __future__ import annotations

import logging

import numpy as np

from ..core.errors import StoreError
from .catalog import Catalog
from .chunk_file import ChunkCorrupt, write_chunk
from .chunk_reader import ChunkReader, remote_error
from .room import Room
from .store_index import Kept
from .tiers import StoreTier

log = logging.getLogger(__name__)


class Placement:
    """Moves chunks of an open store into tiers; whoever calls `write` has claimed the chunk."""

    def __init__(self, catalog: Catalog, reader: ChunkReader, room: Room) -> None:
        self._catalog = catalog
        self._reader = reader
        self._room = room

    def write(
        self, where: StoreTier, key: str, header: bytes, blobs: np.ndarray, blob_bytes: int
    ) -> None:
        """Put header and blobs, `blob_bytes` each, where they survive this process.

        Raises:
            StoreError: no space, no permission; a remote tier does not answer.
        """
        if where.remote is None:
            write_chunk(self._catalog.path(key), header, blobs)
            return
        try:
            where.remote.write(key, header, blobs, blob_bytes)
        except BaseException as e:
            # The server may have taken a half of it.
            self._room.remove_bytes(where, key)
            if isinstance(e, OSError):
                raise remote_error(where, key, e) from None
            raise

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

    def place_if_sound(self, key: str, where: StoreTier) -> bool:
        """See `ChunkStore.place_if_sound`."""
        try:
            self.place(key, where)
        except ChunkCorrupt as e:
            log.warning("a chunk was discarded: %s", e)
            self.discard(key)
            return False
        except StoreError:
            if self._catalog.closed or key in self._catalog.kept:
                raise
            return False  # making room for another may have removed it
        return True

    def discard(self, key: str) -> None:
        """See `ChunkStore.discard`."""
        catalog = self._catalog
        with catalog.claim(key):
            left = True
            while left:
                with catalog.changed, catalog.shared():
                    kept = catalog.kept.get(key)
                    if kept is None:
                        return
                    tier = catalog.tier(min(kept.tiers))
                    has_bytes = catalog.leave(kept, tier)
                    left = bool(kept.tiers)
                if has_bytes:
                    self._room.remove([(tier, key, kept.entry.n_bytes)], claimed=True)

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
                self._room.remove_bytes(where, key)
            raise
