"""The store's index on disk (SQLite, WAL) and the start-up scan that makes it agree with files.

The files are the truth: a row is written after its file is safe, and deleted after its file is
gone, so after a crash the scan can always tell what to do.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

from ..core.errors import StoreError
from ..core.layout import chunk_bytes
from ..core.model_spec import ModelSpec
from .chunk_file import (
    CHUNK_SUFFIX,
    FORMAT_VERSION,
    TEMP_SUFFIX,
    ChunkCorrupt,
    read_header,
)


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
        return [Row(*fields, tiers=tuple(json.loads(tiers))) for *fields, tiers in found]

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

    def _run(self, sql: str, values: tuple[object, ...] = ()) -> list[tuple[Any, ...]]:
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
