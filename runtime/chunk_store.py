"""`ChunkStore`: keeps encoded chunks in files, serves them from tiers, never returns bad rows.

Every chunk has one file, whatever its tier; a `dram` tier adds one RAM copy that all dram tiers
share. A chunk may be held by several tiers at once: one serves it, the others count it against
their capacity and keep it alive. Writers and bookkeeping share one lock, which is never held
during reads of chunk data.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import mmap
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..core.chunk_index import ChunkEntry, ChunkIndex, chunk_key
from ..core.errors import StoreError
from ..core.layout import ALIGN_BYTES, GROUP_TOKENS, chunk_bytes
from ..core.model_spec import ModelSpec
from ..core.units import MIB, ceil_div
from .chunk_file import (
    CHUNK_SUFFIX,
    ChunkCorrupt,
    ChunkMeta,
    Geometry,
    LayerRows,
    cannot_write,
    encode_header,
    pack_blobs,
    read_header,
    write_chunk,
)
from .rate_limit import RateLimiter
from .store_index import Catalog, Kept, Row, StoreIndex, identity_of, lock_file, scan
from .tiers import (
    BufferPool,
    FileMedium,
    FileSource,
    RamSource,
    ReadRun,
    Source,
    StoreTier,
    TierConfig,
)

__all__ = ["ChunkCorrupt", "ChunkStore", "Counters", "LayerRows", "TierConfig"]

log = logging.getLogger(__name__)

LOAD_REQUEST_BYTES = 4 * MIB


@dataclass(slots=True)
class Counters:
    """What a store has done since it was opened."""

    reads: int = 0
    requests: int = 0
    bytes_read: int = 0
    bad_groups: int = 0
    missing_files: int = 0
    puts: int = 0
    ram_loads: int = 0


class ChunkStore:
    """Chunks of one model in the folder `root`, open in one process at a time.

    Args:
        root: made if it is not there.
        model: shapes and dtype of K and V.
        model_fingerprint: identity of the weights; part of every key.
        tiers: where chunks can be served from. A tier that has less capacity than it holds on
            disk evicts at once.

    Raises:
        StoreError: the folder cannot be used, is open elsewhere, or holds another model's chunks.
    """

    def __init__(
        self, root: Path, model: ModelSpec, model_fingerprint: str, tiers: Sequence[TierConfig]
    ) -> None:
        self.root = Path(root)
        self.model = model
        self.counters = Counters()
        self._fingerprint = model_fingerprint
        self._shape = Geometry.of(model)
        self._pool = BufferPool()
        self._count_lock = threading.Lock()
        self._folder = self.root / "chunks"
        if not tiers or len({t.name for t in tiers}) != len(tiers):
            raise StoreError(
                "a store needs one tier or more, each with its own name",
                values=f"{[t.name for t in tiers]}",
                remedy="name each tier once",
            )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock_file = lock_file(self.root / "lock")
            self._files = FileMedium(self._folder)
            self.tiers = {config.name: StoreTier(config, self._files) for config in tiers}
            self._index = StoreIndex(
                self.root / "index.sqlite", identity_of(model, model_fingerprint)
            )
            rows, self.repairs = scan(
                self._folder, self._index, model, model_fingerprint, self._known_tiers
            )
            self._catalog = Catalog(self._folder, self._index, model, self.tiers, rows)
        except OSError as e:
            raise cannot_write(self.root, e) from None
        self.repairs["chunks_evicted"] = self._catalog.evictions
        if any(self.repairs.values()):
            log.warning("repaired the chunk store %s: %s", self.root, self.repairs)

    # Writing

    def put(
        self,
        content_id: str,
        k: Tensor,
        v: Tensor,
        order: Tensor,
        *,
        order_name: str,
        tier: str,
        kind: Literal["isolated", "prefix"] = "isolated",
        chain: str = "",
        tenant: str = "",
    ) -> ChunkEntry:
        """Keep a chunk, safe on disk when this returns; one that is there already is left as is.

        Args:
            content_id: of the chunk's tokens, `core.chunk_index.content_id_of`.
            k: keys before RoPE, [L, N, HK, D] in token order, in the model's dtype.
            v: values, same shape.
            order: integers [N]: stored row i will be token `order[i]`.
            order_name: says how `order` was made; part of the key.
            tier: that will serve the chunk. Its least recently used chunks make room.

        Raises:
            StoreError: shapes that do not fit the model, no space, no permission.
            CapacityError: the chunk is larger than the tier.
        """
        where = self._tier(tier)
        order = self._checked(k, v, order)
        n_tokens = order.numel()
        key = chunk_key(
            content_id, model=self._fingerprint, order=order_name, dtype=self.model.dtype,
            tenant=tenant, chain=chain,
        )  # fmt: skip
        catalog = self._catalog
        with catalog.claim(key):
            there = catalog.kept.get(key)
            if there is not None:
                catalog.touch(there)
                return there.entry
            with catalog.room(where, chunk_bytes(self.model, n_tokens)):
                meta = ChunkMeta(
                    key, content_id, n_tokens, self._fingerprint,
                    (self.model.n_layers, self.model.n_kv_heads, self.model.head_dim),
                    self.model.dtype, kind, chain, order_name, _tenant_id(tenant), tier,
                )  # fmt: skip
                header = encode_header(meta, order.numpy())
                blobs = pack_blobs(self.model, key, k.detach().cpu(), v.detach().cpu(), order)
                path = self._folder / f"{key}{CHUNK_SUFFIX}"
                write_chunk(path, header, blobs)
                row = Row(
                    key, content_id, n_tokens, kind, chain, order_name, meta.tenant_id,
                    len(header), (tier,),
                )  # fmt: skip
                with catalog.changed:
                    try:
                        self._index.put(row)
                    except StoreError:
                        path.unlink(missing_ok=True)
                        raise
                    if where.is_dram:
                        catalog.ram[key] = blobs
                    kept = catalog.adopt(row)
                    kept.order = order
                    self.counters.puts += 1
        return kept.entry

    def place(self, key: str, tier: str) -> ChunkEntry:
        """Serve a chunk from `tier` from now on; a dram tier reads the file into RAM first.

        The tiers that hold it already go on doing so.

        Raises:
            StoreError: no such chunk or tier.
            CapacityError: the chunk is larger than the tier.
            ChunkCorrupt: the file is bad; nothing was changed.
        """
        where = self._tier(tier)
        catalog = self._catalog
        with catalog.claim(key):
            kept = catalog.find(key)
            try:
                if where.is_dram:
                    self._load_ram(kept)
                if tier not in kept.tiers:
                    with catalog.room(where, kept.entry.n_bytes):
                        kept.tiers.add(tier)
            finally:
                catalog.drop_unused_ram(kept)
            with catalog.changed:
                catalog.touch(kept)
                catalog.serve_from(kept, tier)
            return kept.entry

    def discard(self, key: str) -> None:
        """Forget a chunk everywhere; unknown keys are ignored."""
        with self._catalog.claim(key), self._catalog.changed:
            kept = self._catalog.kept.get(key)
            for tier in tuple(kept.tiers) if kept else ():
                self._catalog.leave(kept, self.tiers[tier])

    # Looking up

    def index(self, order_name: str, tenant: str = "", tier: str | None = None) -> ChunkIndex:
        """The tenant's chunks stored in that order, least recently used first, for a policy.

        With `tier`, every one of them is placed there first (`place`); those that its capacity
        then evicts are left out.
        """
        owner = _tenant_id(tenant)

        def listed() -> list[Kept]:
            with self._catalog.changed:
                found = [
                    kept
                    for kept in self._catalog.kept.values()
                    if kept.row.order_name == order_name and kept.row.tenant_id == owner
                ]
            return sorted(found, key=lambda kept: kept.tick)

        if tier is not None:
            for kept in listed():
                self.place(kept.entry.key, tier)
        index = ChunkIndex()
        for kept in listed():
            if tier is None or tier in kept.tiers:
                index.add(kept.entry, tenant)
        return index

    def entry(self, key: str) -> ChunkEntry:
        """The chunk called `key`.

        Raises:
            StoreError: it is not in the store.
        """
        return self._catalog.find(key).entry

    def order(self, key: str) -> Tensor:
        """int64 [N]: stored row i is token `order[i]` of the chunk. Do not write to it.

        Raises:
            StoreError: it is not in the store.
            ChunkCorrupt: its header is bad.
        """
        kept = self._catalog.find(key)
        if kept.order is None:
            kept.order = torch.from_numpy(self._verified_order(kept).astype(np.int64))
        return kept.order

    # Reading

    def read(
        self,
        key: str,
        layer_start: int,
        layer_stop: int,
        n_rows_by_layer: Sequence[int],
        request_bytes: int,
        tier: str | None = None,
    ) -> LayerRows:
        """The first rows of layers `layer_start` to `layer_stop - 1`, verified. Blocks.

        Several threads may read at once. Each layer is one run of requests.

        Args:
            n_rows_by_layer: rows of each of these layers, 0 to N.
            request_bytes: most bytes asked of the medium at once; a multiple of 4096.
            tier: to read from instead of the one that serves the chunk.

        Raises:
            ChunkCorrupt: flipped, cut off, swapped or missing; says which layer.
            StoreError: not in the store, not in that tier's RAM, or rows that are not there.
        """
        kept = self._catalog.find(key)
        where = self._tier(kept.entry.tier if tier is None else tier)
        n_layers = layer_stop - layer_start
        if (
            not 0 <= layer_start < layer_stop <= self.model.n_layers
            or len(n_rows_by_layer) != n_layers
            or min(n_rows_by_layer) < 0
            or max(n_rows_by_layer) > kept.entry.n_tokens
            or request_bytes <= 0
            or request_bytes % ALIGN_BYTES
        ):
            raise StoreError(
                f"a read needs layers within 0..{self.model.n_layers}, rows for each within "
                f"0..{kept.entry.n_tokens}, and requests of a multiple of {ALIGN_BYTES} bytes",
                values=f"layers {layer_start}..{layer_stop}, rows {list(n_rows_by_layer)}, "
                f"requests of {request_bytes}",
                remedy="correct the call",
            )
        self._catalog.touch(kept)
        at_byte, total = [], 0
        for n_rows in n_rows_by_layer:
            at_byte.append(total)
            total += self._shape.read_bytes(n_rows)
        staging = self._pool.lend(max(total, ALIGN_BYTES))
        rows = LayerRows(self._shape, staging, layer_start, tuple(n_rows_by_layer), at_byte)
        rows.tier, rows.n_bytes = where.name, total
        with self._corrupt_if_gone(kept), self._source(kept, where) as source:
            run = self._run(kept, source, where.limiter, staging, request_bytes)
            for i, n_rows in enumerate(n_rows_by_layer):
                run.read_layer(layer_start + i, at_byte[i], ceil_div(n_rows, GROUP_TOKENS))
        rows.n_requests = run.n_requests
        with self._count_lock:
            self.counters.reads += 1
            self.counters.requests += run.n_requests
            self.counters.bytes_read += total
        return rows

    def close(self) -> None:
        """Let the folder go. Rows already read stay valid."""
        with self._catalog.changed:
            if self._catalog.closed:
                return
            self._catalog.closed = True
            self._index.close()
            self._catalog.kept.clear()
            self._catalog.ram.clear()
            self._lock_file.close()

    # Inside

    def _tier(self, name: str) -> StoreTier:
        tier = self.tiers.get(name)
        if tier is None:
            raise StoreError(
                f"the tier must be one of {', '.join(self.tiers)}",
                values=repr(name),
                remedy="name one of them, or open the store with that tier",
            )
        return tier

    def _known_tiers(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Those of `names` that this store has, else its first file tier, else its first."""
        by_medium = sorted(self.tiers, key=lambda name: self.tiers[name].is_dram)
        return tuple(name for name in names if name in self.tiers) or (by_medium[0],)

    def _checked(self, k: Tensor, v: Tensor, order: Tensor) -> Tensor:
        """`order` as int64 [N] on the CPU, after checking that the three fit together."""
        shape, n = self._shape, order.numel()
        want = (shape.n_layers, n, shape.n_kv_heads, shape.head_dim)
        order = order.detach().to("cpu", torch.int64, copy=True)
        if n == 0 or tuple(k.shape) != want or tuple(v.shape) != want:
            raise StoreError(
                "K and V of a chunk must be [layers, tokens, kv heads, head dim] with a token or "
                "more, and the order must have one number per token",
                values=f"K {tuple(k.shape)}, V {tuple(v.shape)}, order {tuple(order.shape)}, "
                f"model {want}",
                remedy="store what this model's encoder returns",
            )
        if k.dtype != shape.dtype or v.dtype != shape.dtype:
            raise StoreError(
                f"K and V must have the model's dtype {self.model.dtype}",
                values=f"{k.dtype} and {v.dtype}",
                remedy="convert them, or open a store for that dtype",
            )
        if order.dim() != 1 or not torch.equal(order.sort().values, torch.arange(n)):
            raise StoreError(
                f"the order must name each of the {n} tokens once",
                values=f"{order.unique().numel()} different numbers",
                remedy="pass a permutation, such as an argsort",
            )
        return order

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
    def _corrupt_if_gone(self, kept: Kept) -> Iterator[None]:
        """Tell a file that is gone or unreadable from other trouble."""
        try:
            yield
        except ChunkCorrupt as e:
            with self._count_lock:
                self.counters.bad_groups += e.group is not None
            raise
        except FileNotFoundError:
            with self._count_lock:
                self.counters.missing_files += 1
            raise ChunkCorrupt(kept.entry.key, "the file is missing") from None
        except OSError as e:
            if e.errno == errno.EIO:
                raise ChunkCorrupt(kept.entry.key, "the disk cannot read it") from None
            raise StoreError(
                "chunk files must be readable",
                values=f"{kept.path}: {e.strerror}",
                remedy="fix the permissions, or raise the limit of open files",
            ) from None

    def _verified_order(self, kept: Kept) -> np.ndarray:
        with self._corrupt_if_gone(kept):
            return read_header(kept.path)[1]

    @contextmanager
    def _source(self, kept: Kept, where: StoreTier) -> Iterator[Source]:
        """The chunk opened for reading from that tier."""
        key = kept.entry.key
        source: Source
        if where.is_dram:
            blobs = self._catalog.ram.get(key)
            if blobs is None and where.name in kept.tiers:
                # In RAM before the store was closed; read the file once more.
                with self._catalog.claim(key):
                    blobs = self._load_ram(self._catalog.find(key))
            if blobs is None:
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

    def _load_ram(self, kept: Kept) -> np.ndarray:
        """The RAM copy, read from the file and verified if there is none. Claim it first."""
        key = kept.entry.key
        blobs = self._catalog.ram.get(key)
        if blobs is None:
            self._verified_order(kept)
            # Whole pages of their own, as unbuffered reads need.
            blobs = np.frombuffer(mmap.mmap(-1, kept.entry.n_bytes), dtype=np.uint8)
            n_groups = ceil_div(kept.entry.n_tokens, GROUP_TOKENS)
            with self._corrupt_if_gone(kept):
                source = FileSource(self._files, str(kept.path), kept.row.header_bytes)
                try:
                    run = self._run(kept, source, None, blobs, LOAD_REQUEST_BYTES)
                    for layer in range(self.model.n_layers):
                        run.read_layer(layer, layer * kept.blob_bytes, n_groups)
                finally:
                    source.close()
            self._catalog.ram[key] = blobs
            self.counters.ram_loads += 1
        return blobs


def _tenant_id(tenant: str) -> str:
    """What is written of a tenant's salt: it may be a secret, so not the salt."""
    return hashlib.sha256(f"tenant {tenant}".encode()).hexdigest()[:32] if tenant else ""
