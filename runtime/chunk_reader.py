"""Reading chunks: open the medium, fetch request by request, verify, hand out rows."""

from __future__ import annotations

import errno
import mmap
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from ..core.errors import StoreError
from ..core.layout import ALIGN_BYTES, GROUP_TOKENS
from ..core.units import MIB, ceil_div
from .catalog import Catalog, Kept
from .chunk_file import (
    ChunkCorrupt,
    Geometry,
    decode_header,
    first_bad_group,
    layer_seed,
    read_header,
)
from .layer_rows import LayerRows
from .rate_limit import RateLimiter
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


class ChunkReader:
    """Reads for any number of threads; shares nothing between them but counters and buffers."""

    def __init__(
        self,
        shape: Geometry,
        files: FileMedium,
        catalog: Catalog,
        counters: Counters,
        memory: HostMemory | None = None,
    ) -> None:
        self._shape = shape
        self._files = files
        self._catalog = catalog
        self.counters = counters
        self._count_lock = threading.Lock()
        self._memory = memory
        self._pool = BufferPool(memory.staging if memory is not None else None)

    def read(
        self,
        kept: Kept,
        where: StoreTier,
        layer_start: int,
        n_rows: tuple[int, ...],
        request_bytes: int,
    ) -> LayerRows:
        """`ChunkStore.read`, its arguments checked."""
        at_byte, total = [], 0
        for count in n_rows:
            at_byte.append(total)
            total += self._shape.read_bytes(count)
        with self._corrupt_if_gone(kept, where), self._source(kept, where) as source:
            if isinstance(source, RamSource) and self._memory is not None:
                # A device copies from here by itself; staging would be one copy more.
                staging, source = source.blobs, InPlace()
                at_byte = [(layer_start + i) * kept.blob_bytes for i in range(len(n_rows))]
            else:
                staging = self._pool.lend(max(total, ALIGN_BYTES))
            rows = LayerRows(self._shape, staging, layer_start, n_rows, at_byte)
            rows.tier, rows.n_bytes = where.name, total
            run = self._run(kept, source, where.limiter, staging, request_bytes)
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

    def _run(
        self,
        kept: Kept,
        source: Source,
        limiter: RateLimiter | None,
        out: np.ndarray,
        request_bytes: int,
    ) -> ReadRun:
        return ReadRun(
            kept.entry.key, self._shape, kept.blob_bytes, kept.seed, source, limiter,
            memoryview(out), request_bytes,
        )  # fmt: skip

    @contextmanager
    def _corrupt_if_gone(self, kept: Kept, where: StoreTier | None) -> Iterator[None]:
        """Tell bytes that are gone or unreadable from other trouble."""
        key = kept.entry.key
        try:
            yield
        except ChunkCorrupt as e:
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
        if where is not None and (
            where.name not in now.tiers if is_remote else not self._catalog.has_file(now)
        ):
            raise StoreError(
                f"a chunk must be in the tier it is read from, '{where.name}'",
                values=f"{kept.entry.key} in {', '.join(sorted(now.tiers))}",
                remedy="place it there first; it may have been moved",
            )

    def verified_order(self, kept: Kept) -> np.ndarray:
        """The order, int32 [N], from the chunk's header."""
        where = self._home(kept)
        with self._corrupt_if_gone(kept, where):
            if where is None or where.remote is None:
                return read_header(kept.path)[1]
            return decode_header(where.remote.header(kept.entry.key), kept.entry.key)[1]

    def whole(self, kept: Kept) -> tuple[bytes, np.ndarray]:
        """Header and blobs, uint8 [chunk bytes], verified, from wherever they are. Claim first."""
        key, where = kept.entry.key, self._home(kept)
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
            blobs = self._catalog.ram.get(key)
            if blobs is None and where.name in kept.tiers:
                # In RAM before the store was closed, or in another process; read the file.
                with self._catalog.claim(key):
                    if where.name in self._catalog.find(key).tiers:
                        blobs = self._load(kept)
            if blobs is None:
                self._catalog.find(key)  # evicted meanwhile: says so
                raise StoreError(
                    f"a chunk must be in RAM to be read from tier '{where.name}'",
                    values=f"{key} in {', '.join(sorted(kept.tiers))}",
                    remedy="place it there first",
                )
            source = RamSource(blobs)
        else:
            source = FileSource(self._files, str(kept.path), kept.row.header_bytes)
        try:
            yield source
        finally:
            source.close()

    def load_ram(self, kept: Kept) -> None:
        """Have a RAM copy, read from the file and verified if there is none. Claim it first."""
        with self._corrupt_if_gone(kept, None):
            self._load(kept)

    def _load(self, kept: Kept) -> np.ndarray:
        key = kept.entry.key
        blobs = self._catalog.ram.get(key)
        if blobs is not None:
            return blobs
        read_header(kept.path)
        blobs = self._fetch(kept, None, self._lasting_pages(kept.entry.n_bytes))
        self._catalog.ram[key] = blobs
        self.counters.ram_loads += 1
        return blobs

    def lasting(self, blobs: np.ndarray) -> np.ndarray:
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
        n_groups = ceil_div(kept.entry.n_tokens, GROUP_TOKENS)
        source: Source
        if where is not None and where.remote is not None:
            source = where.remote.open(kept.entry.key, kept.row.header_bytes, kept.blob_bytes)
        else:
            source = FileSource(self._files, str(kept.path), kept.row.header_bytes)
        try:
            run = self._run(kept, source, None, blobs, LOAD_REQUEST_BYTES)
            run.announce(0, [n_groups] * self._shape.n_layers)
            for layer in range(self._shape.n_layers):
                run.read_layer(layer, layer * kept.blob_bytes, n_groups)
        finally:
            source.close()
        return blobs


def remote_error(where: StoreTier, key: str, e: OSError) -> StoreError:
    """The error for a remote tier that does not do what it was asked."""
    why = str(e) or type(e).__name__
    return StoreError(
        f"the remote tier '{where.name}' must answer",
        values=f"chunk {key}: {why}",
        remedy="start the server, or raise timeout_s in the tier's URL",
    )


class ReadRun:
    """One read under way: fetches layers request by request and verifies them as they come.

    On a limited tier verifying falls into the time of the slot, as on a medium that is slow.
    """

    __slots__ = (
        "_blob_bytes", "_key", "_limiter", "_out", "_request_bytes", "_seed", "_shape", "_slot_s",
        "_source", "n_requests",
    )  # fmt: skip

    def __init__(
        self,
        key: str,
        shape: Geometry,
        blob_bytes: int,
        seed: int,
        source: Source,
        limiter: RateLimiter | None,
        out: memoryview,
        request_bytes: int,
    ) -> None:
        self._key = key
        self._shape = shape
        self._blob_bytes = blob_bytes
        self._seed = seed
        self._source = source
        self._limiter = limiter
        self._out = out
        self._request_bytes = request_bytes
        self._slot_s: float | None = None
        self.n_requests = 0

    def finish(self) -> None:
        """Wait for the end of the last request's slot."""
        if self._limiter is not None and self._slot_s is not None:
            self._limiter.wait(self._slot_s)

    def announce(self, layer_start: int, n_groups: Sequence[int]) -> None:
        """Tell the source of every request to come: these groups of the layers from one on."""
        ranges = []
        for layer, count in enumerate(n_groups, layer_start):
            n_bytes = self._shape.read_bytes(count * GROUP_TOKENS)
            at_byte = layer * self._blob_bytes
            for start in range(0, n_bytes, self._request_bytes):
                size = min(self._request_bytes, n_bytes - start)
                ranges.append((at_byte + start, size))
        self._source.announce(ranges)

    def read_layer(self, layer: int, at_byte: int, n_groups: int) -> None:
        """Bring the first groups of a layer to `at_byte` of the buffer.

        Raises:
            ChunkCorrupt: not all of them match.
        """
        shape, limiter = self._shape, self._limiter
        n_bytes = shape.read_bytes(n_groups * GROUP_TOKENS)
        seed, n_good, slot_s = layer_seed(self._seed, layer), 0, 0.0
        for start in range(0, n_bytes, self._request_bytes):
            stop = min(start + self._request_bytes, n_bytes)
            if limiter is not None:
                slot_s = limiter.reserve(stop - start, self._slot_s)
            part = self._out[at_byte + start : at_byte + stop]
            n_read = self._source.read_into(part, layer * self._blob_bytes + start)
            self.n_requests += 1
            if n_read < stop - start:
                raise ChunkCorrupt(self._key, "the file is cut off", layer)
            ready = min(stop // shape.group_bytes, n_groups)
            bad = first_bad_group(self._out, at_byte, range(n_good, ready), shape.group_bytes, seed)
            if bad is not None:
                raise ChunkCorrupt(self._key, f"checksum of row group {bad}", layer, bad)
            n_good = ready
            if limiter is not None:
                limiter.pace(slot_s)
                self._slot_s = slot_s
