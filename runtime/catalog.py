"""Which tiers hold the chunks of an open store, their copies in memory, and who works on them.

The index on disk is shared by all processes that have the folder open; what is here mirrors it and
is brought up to date before anything is changed.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..core.chunk_index import ChunkEntry
from ..core.errors import StoreError
from ..core.layout import blob_bytes, chunk_bytes
from ..core.model_spec import ModelSpec
from .chunk_file import CHUNK_SUFFIX, temp_path
from .device_chunks import DeviceChunk
from .store_index import Claim, Kept, Row, StoreIndex
from .store_lock import NOBODY, Owners
from .tiers import StoreTier

CLAIM_WAIT_S = 120.0
POLL_S = 0.003
"""Between looks at what another process does; waits within this one are woken."""


class Catalog:
    """The chunks of an open store: which tiers hold them, their copies, who works on them.

    `changed` guards everything here. A chunk that is being written, moved or removed is claimed
    by one thread of one process meanwhile, and never evicted.
    """

    def __init__(
        self,
        folder: Path,
        index: StoreIndex,
        model: ModelSpec,
        tiers: Mapping[str, StoreTier],
        owners: Owners,
    ) -> None:
        self.changed = threading.Condition(threading.Lock())
        self.kept: dict[str, Kept] = {}
        self.ram: dict[str, np.ndarray] = {}
        """Blobs, uint8 [chunk bytes], of chunks that a dram tier holds; read on first use."""
        self.on_device: dict[str, DeviceChunk] = {}
        """The same of device tiers."""
        self.closed = False
        self._folder = folder
        self._index = index
        self._model = model
        self._tiers = tiers
        self._owners = owners
        self._ticks = itertools.count()
        self.claimed: set[str] = set()
        """Those that this process writes, moves or removes."""
        self.leftovers: dict[str, str] = {}
        """Those of them that a remote tier may hold a half of, and that tier."""
        with self.changed, self.shared():
            for claim in index.claims():
                if claim.owner == owners.number:  # of a dead process that had our number
                    self._bury(claim)

    # Finding

    def refresh(self) -> None:
        """See what other processes have done. Hold `changed`."""
        if self._index.changed_elsewhere():
            with self._index.snapshot():
                self._mirror()

    def _mirror(self) -> None:
        is_all = self._index.sees_all_anew
        changed = self._index.changed_rows()
        gone = set(self.kept) - changed.keys() if is_all else set()
        for key in gone | {key for key, row in changed.items() if row is None}:
            kept = self.kept.pop(key, None)
            for copies in (self.ram, self.on_device):
                copies.pop(key, None)
            if kept is not None:
                for name in tuple(kept.tiers):
                    self._part(kept, name)
        for key, row in changed.items():
            there = self.kept.get(key)
            if row is not None and there is None:
                self.adopt(row)
            elif row is not None and there is not None:
                self._follow(there, row)
        self._count()

    def _follow(self, kept: Kept, row: Row) -> None:
        """Be in the tiers that another process has put a chunk into, perhaps in another order."""
        kept.row = row
        kept.n_changes += 1
        kept.entry = replace(kept.entry, tier=row.tiers[0])
        for name in kept.tiers - set(row.tiers):
            self._part(kept, name)
        for name in set(row.tiers) - kept.tiers:
            self._join(kept, name)
        self.drop_unused_copies(kept)

    def find(self, key: str) -> Kept:
        """The chunk called `key`. Do not hold `changed`.

        Raises:
            StoreError: it is not in the store.
        """
        kept = self.kept.get(key)
        if kept is None and not self.closed:
            with self.changed:
                if not self.closed:
                    self.refresh()
            kept = self.kept.get(key)
        if kept is None:
            raise StoreError(
                "the chunk must be in the store",
                values=f"{key}, {'closed' if self.closed else f'{len(self.kept)} chunks'}",
                remedy="put it first; it may have been evicted",
            )
        return kept

    def find_again(self, key: str) -> Kept:
        """`find`, after whatever another process is changing just now has been changed."""
        with self.changed:
            if not self.closed:
                with self.shared():
                    pass
        return self.find(key)

    def path(self, key: str) -> Path:
        """Where the file of a chunk lies."""
        return self._folder / f"{key}{CHUNK_SUFFIX}"

    def tier(self, name: str) -> StoreTier:
        """The tier called `name`."""
        return self._tiers[name]

    def below(self, tier: StoreTier) -> StoreTier | None:
        """Where chunks go that are evicted from `tier`."""
        name = tier.config.demote_to
        return None if name is None else self._tiers[name]

    def has_file(self, kept: Kept) -> bool:
        """Whether a tier of this machine holds the chunk, hence a file."""
        return any(self._tiers[name].remote is None for name in kept.tiers)

    def touch(self, kept: Kept) -> None:
        """A chunk is used: the most recently used one, and once more."""
        kept.tick = next(self._ticks)
        for name in tuple(kept.tiers):
            self._tiers[name].evictor.use(kept.entry.key)

    # Claiming

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Change index and catalog together, other processes kept out. Hold `changed`."""
        try:
            with self._index.transaction():
                self.refresh()
                yield
        except BaseException:
            self._index.look_again()
            raise

    @contextmanager
    def claim(self, key: str) -> Iterator[None]:
        """Be the only one to write, move or remove `key`, over all processes."""
        with self.changed:
            while key in self.claimed:
                self.changed.wait()
            self.claimed.add(key)
        try:
            self._claim_shared(key)
            try:
                yield
            finally:
                with self.changed:
                    if not self.closed:
                        self._let_go(key)
        finally:
            with self.changed:
                self.claimed.discard(key)
                self.changed.notify_all()

    def _claim_shared(self, key: str) -> None:
        deadline_s = time.monotonic() + CLAIM_WAIT_S
        while True:
            with self.changed:
                if self.closed:
                    raise StoreError("the chunk store must be open", remedy="open it again")
                with self.shared():
                    other = self._index.claim_of(key)
                    # One of our own is left of a release that failed.
                    if other is not None and (
                        other.owner == self._owners.number or not self._owners.is_alive(other.owner)
                    ):
                        if half := self._bury(other):
                            self.leftovers[key] = half
                        other = None
                    if other is None:
                        self.promise(key, "", 0)
                        return
            if time.monotonic() > deadline_s:
                raise StoreError(
                    "a chunk must not be in another process's hands for ever",
                    values=f"{key} for {CLAIM_WAIT_S:.0f} s",
                    remedy="end the process that hangs",
                )
            time.sleep(POLL_S)

    def _bury(self, claim: Claim) -> str:
        """Clear up behind a process that died at work on a chunk.

        Returns:
            The remote tier that may hold a half of it, or "". Its claim stays as nobody's, as a
            server may not be asked here: for who next writes to that tier, or for the next scan.
        """
        path, kept = self.path(claim.key), self.kept.get(claim.key)
        temp_path(path).unlink(missing_ok=True)
        if kept is None:
            path.unlink(missing_ok=True)
        tier = self._tiers.get(claim.tier)
        if tier is not None:
            tier.used_bytes -= claim.n_bytes
            if tier.remote is not None and (kept is None or tier.name not in kept.tiers):
                self._index.claim(Claim(claim.key, NOBODY, tier.name, 0))
                return tier.name
        self._index.release(claim.key)
        return ""

    def claim_halves(self, tier: StoreTier) -> list[str]:
        """Claim what others have left half-written in a remote tier. Inside `shared`."""
        found = []
        for claim in self._index.claims():
            if claim.tier == tier.name and self._is_dead(claim) and self._bury(claim):
                self.promise(claim.key, tier.name, 0)
                found.append(claim.key)
        self.claimed.update(found)
        return found

    def _let_go(self, key: str) -> None:
        """End a claim; nobody's from now on if something is left to be removed."""
        half, kept = self.leftovers.pop(key, ""), self.kept.get(key)
        if half and (kept is None or half not in kept.tiers):
            self._index.claim(Claim(key, NOBODY, half, 0))
        else:
            self._index.release(key)

    def _is_dead(self, claim: Claim) -> bool:
        """Whether nobody is at work on it: ours is dead when this process does not know it."""
        if claim.owner == self._owners.number:
            return claim.key not in self.claimed
        return not self._owners.is_alive(claim.owner)

    def promise(self, key: str, tier: str, n_bytes: int) -> None:
        """Note what a claimed chunk was promised, "" and 0 for nothing."""
        half = self.leftovers.get(key, "")  # which is not forgotten if this process dies
        self._index.claim(Claim(key, self._owners.number, tier or half, n_bytes))

    def release(self, key: str) -> None:
        """Let go of a chunk."""
        self._let_go(key)
        self.claimed.discard(key)

    def busy(self) -> set[str]:
        """Chunks that somebody works on; those of dead processes are let go."""
        busy = set(self.claimed)
        for claim in self._index.claims():
            if not self._is_dead(claim):
                busy.add(claim.key)
            elif claim.owner != NOBODY:
                self._bury(claim)
        return busy

    # Changing. Hold `changed` inside `shared`.

    def adopt(self, row: Row) -> Kept:
        """Keep the chunk of `row`, whose tiers have already counted it."""
        entry = ChunkEntry(
            row.key, row.content_id, row.n_tokens, chunk_bytes(self._model, row.n_tokens),
            row.tiers[0], row.kind, row.chain, float(self._model.prefill_flops(row.n_tokens, 0)),
        )  # fmt: skip
        kept = Kept(
            row, entry, self.path(row.key), blob_bytes(self._model, row.n_tokens), set(),
            next(self._ticks),
        )  # fmt: skip
        self.kept[row.key] = kept
        for name in row.tiers:
            self._join(kept, name)
        return kept

    def settle(self, row: Row) -> Kept:
        """The claimed chunk of `row` is written where room was taken for it."""
        self._index.put(row)
        self.promise(row.key, "", 0)
        return self.adopt(row)

    def arrive(self, kept: Kept, tier: StoreTier) -> None:
        """The claimed chunk is in one more tier, where room was taken for it."""
        self._join(kept, tier.name)
        self.promise(kept.entry.key, "", 0)
        self.serve_from(kept, tier.name)

    def add_place(self, kept: Kept, tier: StoreTier) -> None:
        """A chunk that has a file is in one more local tier, where there is room."""
        self._join(kept, tier.name)
        tier.used_bytes += kept.entry.n_bytes

    def serve_from(self, kept: Kept, tier: str) -> None:
        """Make `tier`, which holds the chunk, the one that serves it."""
        self._index.set_tiers(kept.entry.key, (tier, *sorted(kept.tiers - {tier})))
        kept.entry = replace(kept.entry, tier=tier)

    def leave(self, kept: Kept, tier: StoreTier, *, evicted: bool = False) -> bool:
        """Take a chunk out of a tier; it is gone with the last.

        Returns:
            Whether there are bytes on a medium to remove. Until they are removed, the chunk is
            claimed and they stay promised: who is killed in between leaves a claim that tells.
        """
        key = kept.entry.key
        self._part(kept, tier.name, evicted=evicted)
        tier.used_bytes -= kept.entry.n_bytes
        self.drop_unused_copies(kept)
        if kept.tiers:
            left = [name for name in self._tiers if name in kept.tiers]
            self.serve_from(kept, kept.entry.tier if kept.entry.tier in left else left[0])
        else:
            del self.kept[key]
            self._index.remove(key)
        if tier.remote is None and self.has_file(kept):
            return False
        before = self._index.claim_of(key)
        if before is not None and before.owner == NOBODY:
            self.leftovers[key] = before.tier
        self.promise(key, tier.name, kept.entry.n_bytes)
        tier.used_bytes += kept.entry.n_bytes
        self.claimed.add(key)
        return True

    def copies(self, tier: StoreTier) -> dict[str, Any]:
        """What a tier in memory serves chunks from, by key."""
        return self.on_device if tier.is_device else self.ram

    def keep_copy(self, key: str, copy: np.ndarray | DeviceChunk | None) -> None:
        """A chunk has a copy in memory, of whichever kind."""
        if isinstance(copy, DeviceChunk):
            self.on_device[key] = copy
        elif copy is not None:
            self.ram[key] = copy

    def drop_unused_copies(self, kept: Kept) -> None:
        """Free the RAM copy when no dram tier holds the chunk, and that of a device likewise."""
        media = {self._tiers[name].config.medium for name in kept.tiers}
        if "dram" not in media:
            self.ram.pop(kept.entry.key, None)
        if "device" not in media:
            self.on_device.pop(kept.entry.key, None)

    def close(self) -> None:
        """Let everything go. Hold `changed`."""
        self.closed = True
        self.kept.clear()
        self.ram.clear()
        self.on_device.clear()
        with suppress(StoreError):
            for claim in self._index.claims():
                if claim.owner == self._owners.number:
                    self._index.release(claim.key)

    def _join(self, kept: Kept, name: str) -> None:
        kept.tiers.add(name)
        entry = kept.entry
        self._tiers[name].evictor.add(entry.key, entry.n_bytes, entry.recompute_flops)

    def _part(self, kept: Kept, name: str, *, evicted: bool = False) -> None:
        kept.tiers.discard(name)
        self._tiers[name].evictor.remove(kept.entry.key, evicted=evicted)

    def _count(self) -> None:
        """Bytes in use, tier by tier: chunks that are kept and what writers were promised."""
        used = dict.fromkeys(self._tiers, 0)
        for kept in self.kept.values():
            for name in kept.tiers:
                used[name] += kept.entry.n_bytes
        for claim in self._index.claims():
            if claim.tier in used:
                used[claim.tier] += claim.n_bytes
        for name, n_bytes in used.items():
            self._tiers[name].used_bytes = n_bytes
