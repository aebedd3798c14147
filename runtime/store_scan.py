"""The start-up scan: makes index, files and remote tiers agree. Run by who is alone in a folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from ..core.layout import chunk_bytes
from ..core.model_spec import ModelSpec
from .chunk_file import (
    CHUNK_SUFFIX,
    TEMP_SUFFIX,
    ChunkCorrupt,
    ChunkMeta,
    decode_header,
    other_version,
    read_header,
)
from .store_index import Claim, Row, StoreIndex, wrong_model
from .tiers import StoreTier

log = logging.getLogger(__name__)

REPAIRS = (
    "temp_files_removed", "files_reindexed", "bad_files_removed", "stray_files_removed",
    "rows_removed", "places_removed", "remote_adopted",
)  # fmt: skip


class Scan:
    """One scan. `repairs` counts what was done.

    Args:
        known_tiers: maps a row's tiers to those of this store, never to none.
    """

    def __init__(
        self,
        folder: Path,
        index: StoreIndex,
        model: ModelSpec,
        fingerprint: str,
        tiers: Mapping[str, StoreTier],
        known_tiers: Callable[[tuple[str, ...]], tuple[str, ...]],
    ) -> None:
        self.repairs = dict.fromkeys(REPAIRS, 0)
        self._folder = folder
        self._index = index
        self._model = model
        self._fingerprint = fingerprint
        self._tiers = tiers
        self._known_tiers = known_tiers
        self._files: dict[str, int] = {}
        self._objects: dict[str, set[str]] = {}
        """By remote tier: the keys it holds; a tier that cannot be asked is left out."""

    def run(self) -> list[Row]:
        """Repair; returns the rows that are left."""
        self._list_files()
        self._list_objects()
        rows = [kept for row in self._index.rows() if (kept := self._checked(row)) is not None]
        for key, size in self._files.items():
            found = self._row_of_file(key, size)
            if found is not None:
                rows.append(found)
        known = {row.key for row in rows}
        for name, keys in self._objects.items():
            for key in sorted(keys - known):
                adopted = self._row_of_object(key, name)
                if adopted is not None:
                    rows.append(adopted)
                    known.add(key)
        for claim in self._index.claims():
            if claim.key not in known:
                self._clear_half_written(claim)
            self._index.release(claim.key)
        return rows

    def _clear_half_written(self, claim: Claim) -> None:
        """What a killed writer left on a server is listed nowhere but in its claim."""
        tier = self._tiers.get(claim.tier)
        if tier is not None and tier.remote is not None:
            try:
                tier.remote.remove(claim.key)
            except OSError as e:
                log.warning("chunk %s could not be removed: %s", claim.key, e)

    def _list_files(self) -> None:
        for item in list(os.scandir(self._folder)):
            if item.name.endswith(TEMP_SUFFIX):
                os.unlink(item.path)
                self.repairs["temp_files_removed"] += 1
            elif item.name.endswith(CHUNK_SUFFIX):
                self._files[item.name.removesuffix(CHUNK_SUFFIX)] = item.stat().st_size

    def _list_objects(self) -> None:
        for name, tier in self._tiers.items():
            if tier.remote is None:
                continue
            try:
                self._objects[name] = tier.remote.keys()
            except OSError as e:
                log.warning("tier '%s' cannot be asked what it holds: %s", name, e)

    def _checked(self, row: Row) -> Row | None:
        """The row with the places where its bytes are; None when there is none."""
        size = self._files.pop(row.key, None)
        is_whole = size == row.header_bytes + chunk_bytes(self._model, row.n_tokens)
        wanted = self._known_tiers(row.tiers)
        local = [name for name in wanted if self._tiers[name].remote is None]
        path = self._folder / f"{row.key}{CHUNK_SUFFIX}"
        if size is not None and not (local and is_whole):
            path.unlink()
            self.repairs["bad_files_removed" if local else "stray_files_removed"] += 1
        left = tuple(
            name
            for name in wanted
            if (is_whole if name in local else row.key in self._objects.get(name, {row.key}))
        )
        if not left:
            self._index.remove(row.key)
            self.repairs["rows_removed"] += 1
            return None
        if left != wanted:
            self.repairs["places_removed"] += 1
        if left != row.tiers:
            self._index.set_tiers(row.key, left)
        return replace(row, tiers=left)

    def _row_of_file(self, key: str, size: int) -> Row | None:
        """The new row of a file that has none; None when the file is bad and was removed."""
        path = self._folder / f"{key}{CHUNK_SUFFIX}"
        try:
            meta, _, header_bytes = read_header(path)
        except ChunkCorrupt:
            version = other_version(path)
            if version is not None:
                raise wrong_model(self._folder, f"chunk file {key} of format {version}") from None
            header_bytes, meta = 0, None
        if meta is not None and meta.model_fingerprint != self._fingerprint:
            values = f"model {self._fingerprint} for {meta.model_fingerprint}"
            raise wrong_model(self._folder, values)
        if meta is None or size != header_bytes + chunk_bytes(self._model, meta.n_tokens):
            path.unlink()
            self.repairs["bad_files_removed"] += 1
            return None
        local = [name for name, tier in self._tiers.items() if tier.remote is None]
        wanted = [name for name in self._known_tiers((meta.tier,)) if name in local]
        if not local:
            path.unlink()
            self.repairs["stray_files_removed"] += 1
            return None
        self.repairs["files_reindexed"] += 1
        return self._indexed(meta, header_bytes, tuple(wanted or local[:1]))

    def _row_of_object(self, key: str, tier: str) -> Row | None:
        """The new row of what another folder put there; None when it is not this model's."""
        remote = self._tiers[tier].remote
        assert remote is not None
        try:
            header = remote.header(key)
            meta, _ = decode_header(header, key)
        except (OSError, ChunkCorrupt):
            return None
        if meta.model_fingerprint != self._fingerprint:
            return None
        self.repairs["remote_adopted"] += 1
        return self._indexed(meta, len(header), (tier,))

    def _indexed(self, meta: ChunkMeta, header_bytes: int, tiers: tuple[str, ...]) -> Row:
        row = Row(
            meta.key, meta.content_id, meta.n_tokens, meta.kind, meta.chain, meta.order_name,
            meta.tenant_id, header_bytes, tiers,
        )  # fmt: skip
        self._index.put(row)
        return row
