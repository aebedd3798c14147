"""What is in the store: rows on disk (SQLite, WAL), the start-up scan, and who is in which tier.

The files are the truth: a row is written after its file is safe, and deleted after its file is
gone, so after a crash the scan can always tell what to do.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Literal

import numpy as np
from torch import Tensor

from ..core.chunk_index import ChunkEntry
from ..core.errors import CapacityError, StoreError
from ..core.layout import blob_bytes, chunk_bytes
from ..core.model_spec import ModelSpec
from .chunk_file import (
    CHUNK_SUFFIX,
    FORMAT_VERSION,
    TEMP_SUFFIX,
    ChunkCorrupt,
    chunk_seed,
    read_header,
)
from .tiers import StoreTier

ROOM_WAIT_S = 10.0


@dataclass(frozen=True, slots=True)
class Row:
    """One kept chunk. `tiers[0]` serves it; the others hold it too."""

    key: str
    content_id: str
    n_tokens: int
    kind: Literal["isolated", "prefix"]
    chain: str
    order_name: str
    tenant_id: str
    header_bytes: int
    tiers: tuple[str, ...]


class StoreIndex:
    """Rows in SQLite. The caller serialises the calls.

    Raises:
        StoreError: on any call, when the database cannot be read or written.
    """

    def __init__(self, path: Path, identity: dict[str, str]) -> None:
        self.rebuilt = False
        self._path = path
        try:
            self._db = self._open()
        except sqlite3.OperationalError as e:
            raise self._error(e) from None
        except sqlite3.DatabaseError:
            # Not a database any more. The files know everything that is in it.
            for suffix in ("", "-wal", "-shm"):
                Path(f"{path}{suffix}").unlink(missing_ok=True)
            self.rebuilt = True
            self._db = self._open()
        self._check_identity(identity)

    def rows(self) -> list[Row]:
        """All rows, oldest first."""
        found = self._run("SELECT * FROM chunks ORDER BY rowid")
        return [Row(*fields[:-1], tuple(json.loads(fields[-1]))) for fields in found]

    def put(self, row: Row) -> None:
        """Add or replace a row."""
        fields = (
            row.key, row.content_id, row.n_tokens, row.kind, row.chain, row.order_name,
            row.tenant_id, row.header_bytes, json.dumps(row.tiers),
        )  # fmt: skip
        self._run("INSERT OR REPLACE INTO chunks VALUES (?,?,?,?,?,?,?,?,?)", fields)

    def set_tiers(self, key: str, tiers: tuple[str, ...]) -> None:
        """Change where a chunk is."""
        self._run("UPDATE chunks SET tiers = ? WHERE key = ?", (json.dumps(tiers), key))

    def remove(self, key: str) -> None:
        """Delete a row, if there."""
        self._run("DELETE FROM chunks WHERE key = ?", (key,))

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            # A row lost to a power cut comes back from its file.
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute(
                "CREATE TABLE IF NOT EXISTS chunks (key TEXT PRIMARY KEY, content_id TEXT,"
                " n_tokens INTEGER, kind TEXT, chain TEXT, order_name TEXT, tenant_id TEXT,"
                " header_bytes INTEGER, tiers TEXT)"
            )
            db.execute("CREATE TABLE IF NOT EXISTS identity (name TEXT PRIMARY KEY, value TEXT)")
        except sqlite3.DatabaseError:
            db.close()
            raise
        return db

    def _check_identity(self, identity: dict[str, str]) -> None:
        stored = dict(self._run("SELECT name, value FROM identity"))
        if not stored:
            for item in identity.items():
                self._run("INSERT INTO identity VALUES (?,?)", item)
        elif stored != identity:
            self.close()
            differ = sorted(n for n in identity if stored.get(n) != identity[n])
            values = ", ".join(f"{n} {identity[n]} for {stored.get(n)}" for n in differ)
            raise wrong_model(self._path.parent, values)

    def _run(self, sql: str, values: tuple[object, ...] = ()) -> list[tuple]:
        try:
            return self._db.execute(sql, values).fetchall()
        except sqlite3.Error as e:
            raise self._error(e) from None

    def _error(self, e: sqlite3.Error) -> StoreError:
        return StoreError(
            "the store's index must be readable and writable",
            values=f"{self._path}: {e}",
            remedy="free space or fix the permissions; a deleted index is rebuilt from the files",
        )


def wrong_model(folder: Path, values: str) -> StoreError:
    """The error for a folder that holds chunks of another model or format."""
    return StoreError(
        f"the store {folder} must hold chunks of one model and format",
        values=values,
        remedy="give each model its own folder, or empty this one",
    )


def scan(
    folder: Path,
    index: StoreIndex,
    model: ModelSpec,
    fingerprint: str,
    known_tiers: Callable[[tuple[str, ...]], tuple[str, ...]],
) -> tuple[list[Row], dict[str, int]]:
    """Make index and files agree; returns the rows and what was repaired.

    Args:
        known_tiers: maps a row's tiers to those of this store, never to none.
    """
    repairs = dict.fromkeys(
        ("temp_files_removed", "files_reindexed", "bad_files_removed", "rows_removed"), 0
    )
    files: dict[str, int] = {}
    for item in list(os.scandir(folder)):
        if item.name.endswith(TEMP_SUFFIX):
            os.unlink(item.path)
            repairs["temp_files_removed"] += 1
        elif item.name.endswith(CHUNK_SUFFIX):
            files[item.name.removesuffix(CHUNK_SUFFIX)] = item.stat().st_size
    rows = []
    for row in index.rows():
        size = files.pop(row.key, None)
        if size == row.header_bytes + chunk_bytes(model, row.n_tokens):
            rows.append(row)
            continue
        if size is not None:
            (folder / f"{row.key}{CHUNK_SUFFIX}").unlink()
            repairs["bad_files_removed"] += 1
        index.remove(row.key)
        repairs["rows_removed"] += 1
    for key, size in files.items():
        path = folder / f"{key}{CHUNK_SUFFIX}"
        found = _row_of(path, size, model, fingerprint)
        if found is None:
            path.unlink()
            repairs["bad_files_removed"] += 1
            continue
        index.put(found)
        rows.append(found)
        repairs["files_reindexed"] += 1
    for i, row in enumerate(rows):
        tiers = known_tiers(row.tiers)
        if tiers != row.tiers:
            index.set_tiers(row.key, tiers)
            rows[i] = replace(row, tiers=tiers)
    return rows, repairs


def _row_of(path: Path, size: int, model: ModelSpec, fingerprint: str) -> Row | None:
    """The row of a file that has none; None when the file is bad."""
    try:
        meta, _, header_bytes = read_header(path)
    except ChunkCorrupt:
        return None
    if meta.model_fingerprint != fingerprint:
        raise wrong_model(path.parent, f"model {fingerprint} for {meta.model_fingerprint}")
    if size != header_bytes + chunk_bytes(model, meta.n_tokens):
        return None
    return Row(
        meta.key, meta.content_id, meta.n_tokens, meta.kind, meta.chain, meta.order_name,
        meta.tenant_id, header_bytes, (meta.tier,),
    )  # fmt: skip


def lock_file(path: Path) -> IO[bytes]:
    """The open file whose lock keeps other processes out; they would remove our temp files."""
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise StoreError(
            "a chunk store can be open once at a time",
            values=str(path.parent),
            remedy="close the other one, or choose another folder",
        ) from None
    return file


def identity_of(model: ModelSpec, fingerprint: str) -> dict[str, str]:
    """What must stay the same over the life of a store folder."""
    shape = f"{model.n_layers}x{model.n_kv_heads}x{model.head_dim} {model.dtype}"
    return {"format": str(FORMAT_VERSION), "model": fingerprint, "shape": shape}


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
            for tier in row.tiers:
                tiers[tier].used_bytes += kept.entry.n_bytes
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
            kept.path.unlink(missing_ok=True)
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
