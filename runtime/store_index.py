"""The store's index on disk (SQLite, WAL), shared by the processes that have the folder open.

The files are the truth: a row is written after its file is safe, and deleted before its file is,
so no row is ever without its bytes. A `claim` row says who writes, moves or removes a chunk, and
which bytes of a tier that owner was promised meanwhile; it outlives its owner, so whoever finds it
(catalog.py), or the next start (store_scan.py), can tell what to clear up.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from ..core.chunk_index import ChunkEntry
from ..core.errors import StoreError
from ..core.model_spec import ModelSpec
from .chunk_file import FORMAT_VERSION

INDEX_VERSION = 2
"""Version 1 had no claims and no tiers, as one process alone could have a store open."""

BUSY_S = 20.0
"""How long to wait while another process changes the index."""

_TABLES = (
    "CREATE TABLE IF NOT EXISTS chunks (key TEXT PRIMARY KEY, content_id TEXT, n_tokens INTEGER,"
    " kind TEXT, chain TEXT, order_name TEXT, tenant_id TEXT, header_bytes INTEGER, tiers TEXT)",
    "CREATE TABLE IF NOT EXISTS identity (name TEXT PRIMARY KEY, value TEXT)",
    "CREATE TABLE IF NOT EXISTS claims (key TEXT PRIMARY KEY, owner INTEGER, tier TEXT,"
    " n_bytes INTEGER)",
    "CREATE TABLE IF NOT EXISTS tiers (name TEXT PRIMARY KEY, config TEXT)",
    "CREATE TABLE IF NOT EXISTS changes (number INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT)",
    *(
        f"CREATE TRIGGER IF NOT EXISTS chunks_{act} AFTER {act} ON chunks"
        f" BEGIN INSERT INTO changes (key) VALUES ({row}.key); END"
        for act, row in (("insert", "new"), ("update", "new"), ("delete", "old"))
    ),
)
_COLUMNS = "key, content_id, n_tokens, kind, chain, order_name, tenant_id, header_bytes, tiers"


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


class Seal(NamedTuple):
    """What the header of a chunk's bytes said: `order`, int64 [N], and the checksum seed of it."""

    order: Tensor
    seed: int
    n_changes: int
    """Of `Kept`, when the header was read."""


@dataclass(slots=True)
class Kept:
    """A chunk in the store. `entry.tier` serves it; `tiers` are all that hold it.

    Another process may remove a chunk and put it anew in another order, under the same key. So
    `seal` is to be trusted only while `n_changes`, of its row by others, is what it was; and the
    checksums are seeded with the order, for what changes while it is read.
    """

    row: Row
    entry: ChunkEntry
    path: Path
    blob_bytes: int
    tiers: set[str]
    tick: int
    seal: Seal | None = None
    n_changes: int = 0


class Claim(NamedTuple):
    """A chunk that `owner` works on, and the bytes of a tier it was promised for it."""

    key: str
    owner: int
    tier: str
    n_bytes: int


class StoreIndex:
    """Rows in SQLite. The caller serialises the calls.

    Args:
        alone: nobody else has the folder open, so that it may be migrated or made anew.

    Raises:
        StoreError: on any call, when the database cannot be read or written; at opening, when it
            belongs to another model or version.
    """

    def __init__(self, path: Path, identity: dict[str, str], *, alone: bool = True) -> None:
        self.rebuilt = False
        self._path = path
        self._seen_version = self._seen_change = -1
        try:
            self._db = self._open(alone)
        except sqlite3.OperationalError as e:
            raise self._error(e) from None
        except sqlite3.DatabaseError as e:
            if not alone:
                raise self._error(e) from None
            # Not a database any more. The files know everything that is in it.
            for suffix in ("", "-wal", "-shm"):
                Path(f"{path}{suffix}").unlink(missing_ok=True)
            self.rebuilt = True
            self._db = self._open(alone)
        try:
            self._check_identity(identity)
        except BaseException:
            self.close()
            raise

    # Rows

    def rows(self) -> list[Row]:
        """All rows, oldest first."""
        return [_row(f) for f in self._run(f"SELECT {_COLUMNS} FROM chunks ORDER BY rowid")]

    def row(self, key: str) -> Row | None:
        """The row of one chunk."""
        found = self._run(f"SELECT {_COLUMNS} FROM chunks WHERE key = ?", (key,))
        return _row(found[0]) if found else None

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

    # Processes

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Keep other processes from changing the index meanwhile; all or nothing."""
        self._run("BEGIN IMMEDIATE")
        try:
            yield
            self._run("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Several reads that see one state."""
        if self._db.in_transaction:
            yield
            return
        self._run("BEGIN")
        try:
            yield
        finally:
            self._run("COMMIT")

    def changed_elsewhere(self) -> bool:
        """Whether another process has changed anything since the last call."""
        version: int = self._run("PRAGMA data_version")[0][0]
        changed = version != self._seen_version
        self._seen_version = version
        return changed

    def look_again(self) -> None:
        """Take everything as changed."""
        self._seen_version = self._seen_change = -1

    def changed_rows(self) -> dict[str, Row | None]:
        """Chunks whose rows were put, changed or deleted (None) since the last call, by anyone."""
        if self._seen_change < 0:
            changed: dict[str, Row | None] = {row.key: row for row in self.rows()}
        else:
            sql = "SELECT DISTINCT key FROM changes WHERE number > ?"
            keys = [key for (key,) in self._run(sql, (self._seen_change,))]
            changed = {key: self.row(key) for key in keys}
        last = self._run("SELECT max(number) FROM changes")[0][0]
        self._seen_change = last or 0
        return changed

    @property
    def sees_all_anew(self) -> bool:
        """Whether the next `changed_rows` lists every chunk there is, and no other."""
        return self._seen_change < 0

    def forget_changes(self) -> None:
        """Start the list of changes anew; for who is alone."""
        self._run("DELETE FROM changes")

    def claims(self) -> list[Claim]:
        """Chunks that somebody works on, in any process."""
        return [Claim(*c) for c in self._run("SELECT key, owner, tier, n_bytes FROM claims")]

    def claim_of(self, key: str) -> Claim | None:
        """Who works on `key`."""
        sql = "SELECT key, owner, tier, n_bytes FROM claims WHERE key = ?"
        found = self._run(sql, (key,))
        return Claim(*found[0]) if found else None

    def claim(self, claim: Claim) -> None:
        """Note or change who works on a chunk and what was promised."""
        self._run("INSERT OR REPLACE INTO claims VALUES (?,?,?,?)", claim)

    def release(self, key: str) -> None:
        """The work on `key` has ended."""
        self._run("DELETE FROM claims WHERE key = ?", (key,))

    def agree_on_tiers(self, mine: dict[str, str], alone: bool) -> None:
        """Write the tiers' terms, or compare with those who have the folder open.

        Raises:
            StoreError: theirs are others.
        """
        if alone:
            self.forget_changes()
            self._run("DELETE FROM tiers")
            for item in mine.items():
                self._run("INSERT INTO tiers VALUES (?,?)", item)
            return
        theirs = dict(self._run("SELECT name, config FROM tiers"))
        if theirs != mine:
            raise StoreError(
                "processes that share a store must name the same tiers, capacities and evictions",
                values=f"{mine} for {theirs}",
                remedy="give them the same, or close the other process first",
            )

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    # Inside

    def _open(self, alone: bool) -> sqlite3.Connection:
        db = sqlite3.connect(
            self._path, check_same_thread=False, isolation_level=None, timeout=BUSY_S
        )
        try:
            db.execute("PRAGMA journal_mode = WAL")
            # A row lost to a power cut comes back from its file.
            db.execute("PRAGMA synchronous = NORMAL")
            self._migrate(db, alone)
        except BaseException:
            db.close()
            raise
        return db

    def _migrate(self, db: sqlite3.Connection, alone: bool) -> None:
        """Bring a database of version 1, or a new one, to this version."""
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version == INDEX_VERSION:
            return
        if version > INDEX_VERSION or not alone:
            raise StoreError(
                f"the index of a store must have version {INDEX_VERSION}",
                values=f"{self._path} with version {version}",
                remedy="use the program that wrote it, or choose another folder",
            )
        # Version 1 did not number itself; its rows are those of version 2.
        for sql in _TABLES:
            db.execute(sql)
        db.execute(f"PRAGMA user_version = {INDEX_VERSION}")

    def _check_identity(self, identity: dict[str, str]) -> None:
        stored = dict(self._run("SELECT name, value FROM identity"))
        if not stored:
            for item in identity.items():
                self._run("INSERT INTO identity VALUES (?,?)", item)
        elif stored != identity:
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


def _row(fields: tuple[Any, ...]) -> Row:
    key, content_id, n_tokens, kind, chain, order_name, tenant_id, header_bytes, tiers = fields
    return Row(
        key, content_id, n_tokens, kind, chain, order_name, tenant_id, header_bytes,
        tuple(json.loads(tiers)),
    )  # fmt: skip


def wrong_model(folder: Path, values: str) -> StoreError:
    """The error for a folder that holds chunks of another model or format."""
    return StoreError(
        f"the store {folder} must hold chunks of one model and format",
        values=values,
        remedy="give each model its own folder, or empty this one",
    )


def identity_of(model: ModelSpec, fingerprint: str) -> dict[str, str]:
    """What must stay the same over the life of a store folder."""
    shape = f"{model.n_layers}x{model.n_kv_heads}x{model.head_dim} {model.stored_dtype}"
    return {"format": str(FORMAT_VERSION), "model": fingerprint, "shape": shape}
