"""Which tiers hold the chunks of an open store, their RAM copies, and who makes room."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from ..core.chunk_index import ChunkEntry
from ..core.errors import CapacityError, StoreError
from ..core.layout import blob_bytes, chunk_bytes
from ..core.model_spec import ModelSpec
from .chunk_file import CHUNK_SUFFIX, cannot_write, chunk_seed
from .store_index import Row, StoreIndex
from .tiers import StoreTier

ROOM_WAIT_S = 10.0


@dataclass(slots=True)
class Kept:
    """A chunk in the store. `entry.tier` serves it; `tiers` are all that hold it."""

    row: Row
    entry: ChunkEntry
    path: Path
    seed: int
    blob_bytes: int
    tiers: set[str]
    tick: int
    order: Tensor | None = None


class Catalog:
    """The chunks of an open store: which tiers hold them, their RAM copies, who makes room.

    `changed` guards everything here. A chunk that is being written, moved or removed is claimed
    by one thread meanwhile, and never evicted.
    """

    def __init__(
        self,
        folder: Path,
        index: StoreIndex,
        model: ModelSpec,
        tiers: Mapping[str, StoreTier],
        rows: list[Row],
    ) -> None:
        self.changed = threading.Condition(threading.Lock())
        self.kept: dict[str, Kept] = {}
        self.ram: dict[str, np.ndarray] = {}
        """Blobs, uint8 [chunk bytes], of chunks that a dram tier holds; read on first use."""
        self.closed = False
        self.evictions = 0
        self._folder = folder
        self._index = index
        self._model = model
        self._tiers = tiers
        self._ticks = itertools.count()
        self._claimed: set[str] = set()
        for row in rows:
            kept = self.adopt(row)
            for name in row.tiers:
                tiers[name].used_bytes += kept.entry.n_bytes
        for tier in tiers.values():
            while tier.overfull and self._evict_one(tier):
                pass

    def find(self, key: str) -> Kept:
        """The chunk called `key`.

        Raises:
            StoreError: it is not in the store.
        """
        kept = self.kept.get(key)
        if kept is None:
            raise StoreError(
                "the chunk must be in the store",
                values=f"{key}, {'closed' if self.closed else f'{len(self.kept)} chunks'}",
                remedy="put it first; it may have been evicted",
            )
        return kept

    def touch(self, kept: Kept) -> None:
        """Make a chunk the most recently used one."""
        kept.tick = next(self._ticks)

    @contextmanager
    def claim(self, key: str) -> Iterator[None]:
        """Be the only one to write, move or remove `key`."""
        with self.changed:
            while key in self._claimed:
                self.changed.wait()
            if self.closed:
                raise StoreError("the chunk store must be open", remedy="open it again")
            self._claimed.add(key)
        try:
            yield
        finally:
            with self.changed:
                self._claimed.discard(key)
                self.changed.notify_all()

    @contextmanager
    def room(self, tier: StoreTier, n_bytes: int) -> Iterator[None]:
        """Take `n_bytes` of a tier, evicting as needed; given back if the body fails."""
        deadline_s = time.monotonic() + ROOM_WAIT_S
        with self.changed:
            while not tier.fits(n_bytes):
                # What is left may be claimed by others, who will soon be done.
                if self._evict_one(tier) or self.changed.wait(deadline_s - time.monotonic()):
                    continue
                raise CapacityError(
                    f"tier '{tier.name}' must have room for a chunk",
                    values=f"{n_bytes} bytes, {tier.used_bytes} in use by other writers",
                    remedy="raise capacity_bytes, or use fewer writers",
                )
            tier.used_bytes += n_bytes
        try:
            yield
        except BaseException:
            with self.changed:
                tier.used_bytes -= n_bytes
                self.changed.notify_all()
            raise

    def adopt(self, row: Row) -> Kept:
        """Keep the chunk of `row`, whose tiers have already counted it."""
        entry = ChunkEntry(
            row.key, row.content_id, row.n_tokens, chunk_bytes(self._model, row.n_tokens),
            row.tiers[0], row.kind, row.chain,
        )  # fmt: skip
        kept = Kept(
            row, entry, self._folder / f"{row.key}{CHUNK_SUFFIX}", chunk_seed(row.key),
            blob_bytes(self._model, row.n_tokens), set(row.tiers), next(self._ticks),
        )  # fmt: skip
        self.kept[row.key] = kept
        return kept

    def serve_from(self, kept: Kept, tier: str) -> None:
        """Make `tier`, which holds the chunk, the one that serves it."""
        self._index.set_tiers(kept.entry.key, (tier, *sorted(kept.tiers - {tier})))
        kept.entry = replace(kept.entry, tier=tier)

    def leave(self, kept: Kept, tier: StoreTier) -> None:
        """Take a chunk out of a tier; it is gone with the last."""
        kept.tiers.discard(tier.name)
        tier.used_bytes -= kept.entry.n_bytes
        key = kept.entry.key
        if not kept.tiers:
            # Memory first, so that no reader starts; the row last, so that a crash can be told.
            del self.kept[key]
            self.ram.pop(key, None)
            try:
                kept.path.unlink(missing_ok=True)
            except OSError as e:
                raise cannot_write(kept.path, e) from None
            self._index.remove(key)
            return
        self.drop_unused_ram(kept)
        left = [name for name in self._tiers if name in kept.tiers]
        self.serve_from(kept, kept.entry.tier if kept.entry.tier in left else left[0])

    def drop_unused_ram(self, kept: Kept) -> None:
        """Free the RAM copy when no dram tier holds the chunk."""
        if not any(self._tiers[name].is_dram for name in kept.tiers):
            self.ram.pop(kept.entry.key, None)

    def _evict_one(self, tier: StoreTier) -> bool:
        """Take the least recently used chunk out of a tier; False when there is none to take."""
        free = (
            kept
            for key, kept in self.kept.items()
            if tier.name in kept.tiers and key not in self._claimed
        )
        victim = min(free, key=lambda kept: kept.tick, default=None)
        if victim is None:
            return False
        self.leave(victim, tier)
        self.evictions += 1
        return True
