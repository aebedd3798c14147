"""Reading chunks: open the medium, fetch request by request, verify, hand out rows.

Chunks in memory, of the host or of a device, are read from the copy there, which is made of the
file at their first use. Rows that lie on a device are handed out where they lie.
"""

from __future__ import annotations

import errno
import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..core.errors import CapacityError, StoreError
from ..core.layout import ALIGN_BYTES, GROUP_TOKENS
from ..core.units import MIB, ceil_div
from .catalog import Catalog
from .chunk_file import ChunkCorrupt, Geometry, chunk_seed, decode_header, read_header
from .device_chunks import DeviceChunk, DeviceMemory
from .layer_rows import LayerRows
from .rate_limit import RateLimiter
from .read_run import ReadRun
from .store_index import Kept, Seal
from .tiers import (
    BufferPool,
    FileMedium,
    FileSource,
    HostMemory,
    InPlace,
    RamSource,
    Source,
    StoreTier,
)

LOAD_REQUEST_BYTES = 4 * MIB


@dataclass(slots=True)
class Counters:
    """What a store has done since it was opened."""

    reads: int = 0
    requests: int = 0
    bytes_read: int = 0
    bad_groups: int = 0
    missing_files: int = 0
    remote_failures: int = 0
    """Reads that a remote tier refused, broke off or did not answer in time."""
    puts: int = 0
    ram_loads: int = 0
    device_loads: int = 0
    """Copies made on a device of what was kept elsewhere."""


class ChunkReader:
    """Reads for any number of threads; shares nothing between them but counters and buffers."""

    def __init__(
        self,
        shape: Geometry,
        files: FileMedium,
        catalog: Catalog,
        counters: Counters,
        devices: DeviceMemory,
        memory: HostMemory | None = None,
    ) -> None:
        self._shape = shape
        self._files = files
        self._catalog = catalog
        self.counters = counters
        self._count_lock = threading.Lock()
        self._devices = devices
        self._memory = memory
        self._pool = BufferPool(memory.staging if memory is not None else None)

    def read(
        self,
        kept: Kept,
        where: StoreTier,
        layer_start: int,
        n_rows: tuple[int, ...],
        request_bytes: int,
        order: torch.Tensor | None = None,
    ) -> LayerRows:
        """`ChunkStore.read`, its arguments checked."""
        seal = self.sealed(kept)
        if order is not None and order is not seal.order and not torch.equal(order, seal.order):
            raise _put_anew(kept)
        if where.is_device:
            return self._there(kept, seal, where, layer_start, n_rows)
        at_byte, total = [], 0
        for count in n_rows:
            at_byte.append(total)
            total += self._shape.read_bytes(count)
        with self._corrupt_if_gone(kept, where, seal), self._source(kept, where) as source:
            if isinstance(source, RamSource) and self._memory is not None:
                # A device copies from here by itself; staging would be one copy more.
                staging, source = source.blobs, InPlace()
                at_byte = [(layer_start + i) * kept.blob_bytes for i in range(len(n_rows))]
            else:
                staging = self._pool.lend(max(total, ALIGN_BYTES))
            rows = LayerRows(self._shape, staging, layer_start, n_rows, at_byte)
            rows.tier, rows.n_bytes = where.name, total
            run = self._run(kept, seal, source, where.limiter, staging, request_bytes)
            groups = [ceil_div(count, GROUP_TOKENS) for count in n_rows]
            if where.remote is not None:
                run.announce(layer_start, groups)
            for i, count in enumerate(groups):
                run.read_layer(layer_start + i, at_byte[i], count)
            run.finish()
        rows.n_requests = run.n_requests
        with self._count_lock:
            self.counters.reads += 1
            self.counters.requests += run.n_requests
            self.counters.bytes_read += total
        return rows

    def _there(
        self, kept: Kept, seal: Seal, where: StoreTier, layer_start: int, n_rows: tuple[int, ...]
    ) -> LayerRows:
        """Rows that are on their device already: no byte is moved and none verified again."""
        try:
            with self._corrupt_if_gone(kept, where):
                chunk: DeviceChunk = self._copy(kept, where)
        except CapacityError as e:  # the request goes on without it
            raise StoreError(e.rule, values=e.values, remedy=e.remedy) from None
        now = self._catalog.find(kept.entry.key).seal
        if now is None or now.seed != seal.seed:
            raise _put_anew(kept)  # no checksum would tell
        part = chunk.part(layer_start, layer_start + len(n_rows))
        first = layer_start - part.layer_start
        at_byte = [(first + i) * kept.blob_bytes for i in range(len(n_rows))]
        rows = LayerRows(self._shape, part.blobs, layer_start, n_rows, at_byte, part.device)
        rows.tier, rows.n_bytes = where.name, sum(map(self._shape.read_bytes, n_rows))
        with self._count_lock:
            self.counters.reads += 1
        return rows

    def _run(
        self,
        kept: Kept,
        seal: Seal,
        source: Source,
        limiter: RateLimiter | None,
        out: np.ndarray,
        request_bytes: int,
    ) -> ReadRun:
        return ReadRun(
            kept.entry.key, self._shape, kept.blob_bytes, seal.seed, source, limiter,
            out.data, request_bytes,
        )  # fmt: skip

    @contextmanager
    def _corrupt_if_gone(
        self, kept: Kept, where: StoreTier | None, seal: Seal | None = None
    ) -> Iterator[None]:
        """Tell bytes that are gone or unreadable from other trouble."""
        key = kept.entry.key
        try:
            yield
        except ChunkCorrupt as e:
            if e.layer is not None:
                self._check_not_put_anew(kept, seal or kept.seal)
            with self._count_lock:
                self.counters.bad_groups += e.group is not None
            raise
        except FileNotFoundError:
            self._check_still_there(kept, where)
            with self._count_lock:
                self.counters.missing_files += 1
            raise ChunkCorrupt(key, "the file is missing") from None
        except OSError as e:
            if where is not None and where.remote is not None:
                with self._count_lock:
                    self.counters.remote_failures += 1
                raise remote_error(where, key, e) from None
            if e.errno == errno.EIO:
                raise ChunkCorrupt(key, "the disk cannot read it") from None
            raise StoreError(
                "a chunk must be readable from its file into memory",
                values=f"{kept.path}: {e.strerror}",
                remedy="fix the permissions, free memory, or raise the limit of open files",
            ) from None

    def _check_still_there(self, kept: Kept, where: StoreTier | None) -> None:
        """Raises StoreError if the chunk was evicted or moved meanwhile, in whichever process."""
        now = self._catalog.find_again(kept.entry.key)
        is_remote = where is not None and where.remote is not None
        name = "file" if where is None else where.name
        if name not in now.tiers if is_remote else not self._catalog.has_file(now):
            raise StoreError(
                f"a chunk must be in the tier it is read from, '{name}'",
                values=f"{kept.entry.key} in {', '.join(sorted(now.tiers))}",
                remedy="place it there first; it may have been moved",
            )

    def _check_not_put_anew(self, kept: Kept, before: Seal | None) -> None:
        """Raises StoreError if what fails may be sound, but the chunk is not what it was."""
        now, seed = self._catalog.find_again(kept.entry.key), None
        with suppress(StoreError):  # a bad header, as of a bad chunk
            seed = self.sealed(now).seed
        if now is not kept or (seed and before is not None and seed != before.seed):
            raise _put_anew(kept) from None

    def sealed(self, kept: Kept) -> Seal:
        """Order and checksum seed; from the chunk's header unless they are known and to be trusted.

        Raises:
            ChunkCorrupt: the header is bad.
        """
        before, n_changes = kept.seal, kept.n_changes
        if before is not None and before.n_changes == n_changes:
            return before
        key, where = kept.entry.key, self._home(kept)
        with self._corrupt_if_gone(kept, where):
            if where is None or where.remote is None:
                order = read_header(kept.path)[1]
            else:
                order = decode_header(where.remote.header(key), key)[1]
        found = Seal(torch.from_numpy(order.astype(np.int64)), chunk_seed(key, order), n_changes)
        with self._catalog.changed:
            if before is not None and before.seed == found.seed:
                found = before._replace(n_changes=n_changes)
            elif before is not None:  # copies in memory are of the order before
                self._catalog.ram.pop(key, None)
                self._catalog.on_device.pop(key, None)
            kept.seal = found
        return found

    def whole(self, kept: Kept) -> tuple[bytes, np.ndarray]:
        """Header and blobs, uint8 [chunk bytes], verified, from wherever they are. Claim first."""
        key, where = kept.entry.key, self._home(kept)
        self.sealed(kept)  # an older copy is of no use
        with self._corrupt_if_gone(kept, where):
            if where is None or where.remote is None:
                header = kept.path.read_bytes()[: read_header(kept.path)[2]]
            else:
                header = where.remote.header(key)
                decode_header(header, key)
            blobs = self._catalog.ram.get(key)
            return header, self._fetch(kept, where) if blobs is None else blobs

    def _home(self, kept: Kept) -> StoreTier | None:
        """The remote tier that holds the chunk if no file does."""
        if self._catalog.has_file(kept):
            return None
        names = sorted(kept.tiers)
        return self._catalog.tier(names[0]) if names else None

    @contextmanager
    def _source(self, kept: Kept, where: StoreTier) -> Iterator[Source]:
        """The chunk opened for reading from that tier."""
        key = kept.entry.key
        source: Source
        if where.remote is not None:
            source = where.remote.open(key, kept.row.header_bytes, kept.blob_bytes)
        elif where.is_dram:
            source = RamSource(self._copy(kept, where))
        else:
            source = FileSource(self._files, str(kept.path), kept.row.header_bytes)
        try:
            yield source
        finally:
            source.close()

    # Copies in memory

    def _copy(self, kept: Kept, where: StoreTier) -> Any:
        """What a tier in memory serves the chunk from."""
        key = kept.entry.key
        found = self._catalog.copies(where).get(key)
        if found is None and where.name in kept.tiers:
            # There before the store was closed, or in another process; read the file.
            with self._catalog.claim(key):
                if where.name in self._catalog.find(key).tiers:
                    found = self._load(kept, where)
        if found is None:
            self._catalog.find_again(key)  # evicted meanwhile: says so
            raise StoreError(
                f"a chunk must be in memory to be read from tier '{where.name}'",
                values=f"{key} in {', '.join(sorted(kept.tiers))}",
                remedy="place it there first",
            )
        return found

    def load(self, kept: Kept, where: StoreTier) -> None:
        """Have the copy, verified, that a tier in memory needs. Claim the chunk first."""
        if where.is_dram or where.is_device:
            self.sealed(kept)  # an older copy is of no use
            with self._corrupt_if_gone(kept, None):
                self._load(kept, where)

    def _load(self, kept: Kept, where: StoreTier) -> Any:
        copies = self._catalog.copies(where)
        found = copies.get(kept.entry.key)
        if found is not None:
            return found
        if where.is_device:
            found = self._devices.hold(self._verified(kept))
            self.counters.device_loads += 1
        else:
            read_header(kept.path)
            found = self._fetch(kept, None, self._lasting_pages(kept.entry.n_bytes))
            self.counters.ram_loads += 1
        copies[kept.entry.key] = found
        return found

    def _verified(self, kept: Kept) -> np.ndarray:
        """All blobs on the host, uint8 [chunk bytes], verified now: those in RAM, or the file's."""
        blobs = self._catalog.ram.get(kept.entry.key)
        if blobs is not None:
            return self._read_whole(kept, InPlace(), blobs)
        read_header(kept.path)
        n_bytes = kept.entry.n_bytes
        return self._fetch(kept, None, self._pool.lend(n_bytes)[:n_bytes])

    def new_copy(self, where: StoreTier, blobs: np.ndarray) -> np.ndarray | DeviceChunk | None:
        """The copy that a tier in memory needs of a chunk that is being put there."""
        if where.is_device:
            return self._devices.hold(blobs)
        return self._lasting(blobs) if where.is_dram else None

    def to_ram(self, kept: Kept, chunk: DeviceChunk) -> None:
        """Bring what left a device to RAM, unless it has left the dram tiers as well meanwhile."""
        blobs = self._lasting_pages(kept.entry.n_bytes)
        chunk.to_host(blobs)
        with self._catalog.changed:
            self._catalog.ram.setdefault(kept.entry.key, blobs)
            self._catalog.drop_unused_copies(kept)

    def _lasting(self, blobs: np.ndarray) -> np.ndarray:
        """The same bytes where chunks in RAM lie."""
        if self._memory is None:
            return blobs
        pages = self._lasting_pages(blobs.nbytes)
        np.copyto(pages, blobs)
        return pages

    def _lasting_pages(self, n_bytes: int) -> np.ndarray:
        pages = mmap.mmap(-1, n_bytes) if self._memory is None else self._memory.lasting(n_bytes)
        return np.frombuffer(pages, dtype=np.uint8)

    def _fetch(
        self, kept: Kept, where: StoreTier | None, blobs: np.ndarray | None = None
    ) -> np.ndarray:
        """All blobs, uint8 [chunk bytes], verified, from a remote tier or the file."""
        if blobs is None:  # whole pages of their own, as unbuffered reads need
            blobs = np.frombuffer(mmap.mmap(-1, kept.entry.n_bytes), dtype=np.uint8)
        source: Source
        if where is not None and where.remote is not None:
            source = where.remote.open(kept.entry.key, kept.row.header_bytes, kept.blob_bytes)
        else:
            source = FileSource(self._files, str(kept.path), kept.row.header_bytes)
        return self._read_whole(kept, source, blobs)

    def _read_whole(self, kept: Kept, source: Source, blobs: np.ndarray) -> np.ndarray:
        """`blobs`, filled from the source and verified."""
        n_groups = ceil_div(kept.entry.n_tokens, GROUP_TOKENS)
        try:
            run = self._run(kept, self.sealed(kept), source, None, blobs, LOAD_REQUEST_BYTES)
            run.announce(0, [n_groups] * self._shape.n_layers)
            for layer in range(self._shape.n_layers):
                run.read_layer(layer, layer * kept.blob_bytes, n_groups)
        finally:
            source.close()
        return blobs


def _put_anew(kept: Kept) -> StoreError:
    return StoreError(
        "a chunk must keep its order while it is read",
        values=f"{kept.entry.key}, which another process has removed and put anew",
        remedy="read its order again; a request computes it meanwhile",
    )


def remote_error(where: StoreTier, key: str, e: OSError) -> StoreError:
    """The error for a remote tier that does not do what it was asked."""
    why = str(e) or type(e).__name__
    return StoreError(
        f"the remote tier '{where.name}' must answer",
        values=f"chunk {key}: {why}",
        remedy="start the server, or raise timeout_s in the tier's URL",
    )
