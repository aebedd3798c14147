"""`ChunkStore`: keeps encoded chunks, serves them from tiers, never returns bad rows.

A chunk in a `file`, `dram` or `device` tier has one file; dram tiers share one RAM copy beside it,
device tiers one on the device. A `remote` tier holds the same bytes elsewhere. A chunk may be held
by several tiers at once: one serves it, the others count it against their capacity and keep it
alive. Several processes may have a folder open; writers and bookkeeping share one lock in each,
never held while chunk data is read.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..core.chunk_index import ChunkEntry, ChunkIndex, chunk_key
from ..core.errors import CapacityError, StoreError
from ..core.layout import ALIGN_BYTES, blob_bytes, chunk_bytes
from ..core.model_spec import ModelSpec
from .catalog import Catalog
from .chunk_file import (
    ChunkCorrupt,
    ChunkMeta,
    Geometry,
    cannot_write,
    check_order,
    check_values,
    chunk_seed,
    encode_header,
    fill_blobs,
    seal_blobs,
)
from .chunk_reader import ChunkReader, Counters
from .device import CPU
from .device_chunks import DeviceMemory
from .layer_rows import LayerRows
from .placement import Placement
from .room import Room
from .store_index import Claim, Kept, Row, Seal, StoreIndex, identity_of
from .store_lock import NOBODY, Owners
from .store_scan import REPAIRS, Scan
from .tiers import FileMedium, HostMemory, StoreTier, TierConfig, check_tiers

__all__ = ["ChunkCorrupt", "ChunkStore", "Counters", "LayerRows", "TierConfig"]

log = logging.getLogger(__name__)


class ChunkStore:
    """Chunks of one model in the folder `root`, which several processes may have open.

    Args:
        root: made if it is not there. Whoever opens it while nobody else has it open repairs it.
        model: shapes and dtype of K and V.
        model_fingerprint: identity of the weights; part of every key.
        tiers: where chunks can be served from. A tier that has less capacity than it holds on
            disk evicts at once. Processes that share a folder name the same tiers.
        memory: of the host, for a device that copies from it by itself.
        devices: where a device tier keeps chunks; by default memory of the CPU.

    Raises:
        StoreError: the folder cannot be used, holds another model's chunks, or is open elsewhere
            with other tiers.
    """

    def __init__(
        self, root: Path, model: ModelSpec, model_fingerprint: str, tiers: Sequence[TierConfig],
        memory: HostMemory | None = None, devices: DeviceMemory | None = None,
    ) -> None:  # fmt: skip
        self.root = Path(root)
        self.model = model
        self.shape = Geometry.of(model)
        self.counters = Counters()
        self.fingerprint = model_fingerprint
        self._memory = memory
        self._devices = devices or DeviceMemory(lambda: [(model.n_layers, CPU)])
        self._folder = self.root / "chunks"
        check_tiers(tiers)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._owners = Owners(self.root / "lock")
        except OSError as e:
            raise cannot_write(self.root, e) from None
        try:
            with self._owners.joining():
                self._open(tiers)
        except OSError as e:
            self._owners.close()
            raise cannot_write(self.root, e) from None
        except BaseException:
            self._owners.close()
            raise

    def _open(self, tiers: Sequence[TierConfig]) -> None:
        files, alone = FileMedium(self._folder), self._owners.alone
        self.tiers = {config.name: StoreTier(config, files) for config in tiers}
        identity = identity_of(self.model, self.fingerprint)
        index = StoreIndex(self.root / "index.sqlite", identity, alone=alone)
        self._index = index
        self.repairs = dict.fromkeys(REPAIRS, 0)
        try:
            index.agree_on_tiers({t.name: t.config.terms for t in self.tiers.values()}, alone)
            if alone:
                dead = index.claims()
                found = Scan(
                    self._folder, index, self.model, self.fingerprint, self.tiers,
                    self._known_tiers,
                )  # fmt: skip
                found.run()
                self.repairs = found.repairs
                for claim in dead:
                    # `shrink` removes what a server did not remove now, or has of what a file has.
                    tier = self.tiers.get(claim.tier)
                    if tier is not None and tier.remote is not None:
                        index.claim(Claim(claim.key, NOBODY, claim.tier, 0))
            self._catalog = Catalog(self._folder, index, self.model, self.tiers, self._owners)
            self._reader = ChunkReader(
                self.shape, files, self._catalog, self.counters, self._devices,
                self._memory,
            )  # fmt: skip
            # It counts evictions, demotions and failed removals.
            self.room = Room(self._catalog, self._reader.to_ram)
            self._placement = Placement(self._catalog, self._reader, self.room)
            self.repairs["chunks_evicted"] = self.room.shrink(self.tiers.values())
        except BaseException:
            index.close()
            raise
        self.repairs["index_rebuilt"] = int(index.rebuilt)
        if any(self.repairs.values()):
            log.warning("repaired the chunk store %s: %s", self.root, self.repairs)

    # Writing

    def put(
        self, content_id: str, k: Tensor, v: Tensor, order: Tensor, *, order_name: str, tier: str,
        kind: Literal["isolated", "prefix"] = "isolated", chain: str = "", tenant: str = "",
    ) -> ChunkEntry:  # fmt: skip
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
        check_values(self.model, k, v, order)

        def blobs() -> np.ndarray:
            data = np.zeros(chunk_bytes(self.model, order.numel()), dtype=np.uint8)
            rows = k.detach().cpu(), v.detach().cpu(), order.to("cpu", torch.int64)
            fill_blobs(self.shape, torch.from_numpy(data), *rows)
            return data

        return self.put_blobs(
            content_id, order, blobs, order_name=order_name, tier=tier, kind=kind, chain=chain,
            tenant=tenant,
        )  # fmt: skip

    def put_blobs(
        self, content_id: str, order: Tensor, blobs: Callable[[], np.ndarray], *, order_name: str,
        tier: str, kind: Literal["isolated", "prefix"] = "isolated", chain: str = "",
        tenant: str = "",
    ) -> ChunkEntry:  # fmt: skip
        """See `put`; `blobs` gives rows in that order as `fill_blobs` writes them, uint8 [chunk
        bytes], once there is room for them. They are the store's from then on."""
        where = self._tier(tier)
        order = check_order(order)
        n_tokens = order.numel()
        key = chunk_key(
            content_id, model=self.fingerprint, order=order_name, dtype=self.model.stored_dtype,
            tenant=tenant, chain=chain,
        )  # fmt: skip
        catalog = self._catalog
        with catalog.claim(key):
            there = catalog.kept.get(key)
            if there is not None:
                catalog.touch(there)
                return there.entry
            with self.room.take(key, where, chunk_bytes(self.model, n_tokens)):
                meta = ChunkMeta(
                    key, content_id, n_tokens, self.fingerprint,
                    (self.model.n_layers, self.model.n_kv_heads, self.model.head_dim),
                    self.model.stored_dtype, kind, chain, order_name, _tenant_id(tenant), tier,
                )  # fmt: skip
                header = encode_header(meta, order.numpy())
                data = blobs()
                seed = chunk_seed(key, order.numpy())
                seal_blobs(self.shape, seed, data, n_tokens)
                copy = self._reader.new_copy(where, data)
                self._placement.write(where, key, header, data, blob_bytes(self.model, n_tokens))
                row = Row(
                    key, content_id, n_tokens, kind, chain, order_name, meta.tenant_id,
                    len(header), (tier,),
                )  # fmt: skip
                try:
                    with catalog.changed, catalog.shared():
                        kept = catalog.settle(row)
                        kept.seal = Seal(order, seed, kept.n_changes)
                        catalog.keep_copy(key, copy)
                        self.counters.puts += 1
                except BaseException:
                    self.room.remove_bytes(where, key)
                    raise
        return kept.entry

    def place(self, key: str, tier: str) -> ChunkEntry:
        """Serve a chunk from `tier` from now on, copying its bytes there if they are not.

        The tiers that hold it already go on doing so.

        Raises:
            StoreError: no such chunk or tier; a remote tier does not answer.
            CapacityError: the chunk is larger than the tier.
            ChunkCorrupt: its bytes are bad; nothing was changed.
        """
        return self._placement.place(key, self._tier(tier)).entry

    def place_if_sound(self, key: str, tier: str) -> bool:
        """`place`; False when the chunk is gone, or was discarded now as its bytes are bad.

        Raises:
            StoreError, CapacityError: as `place`.
        """
        return self._placement.place_if_sound(key, self._tier(tier))

    def forget_devices(self) -> None:
        """Let go of what lies on devices, as their layers are about to change.

        Device tiers hold the same chunks as before, and take each up again at its next use.
        """
        with self._catalog.changed:
            self._catalog.on_device.clear()

    def discard(self, key: str) -> None:
        """Forget a chunk everywhere; unknown keys are ignored."""
        self._placement.discard(key)

    # Looking up

    def check_fits(self, n_tokens: int, tier: str) -> None:
        """Raises CapacityError if a chunk of so many tokens is larger than the tier."""
        self._tier(tier).fits(chunk_bytes(self.model, n_tokens))

    def index(
        self, order_name: str, tenant: str = "", tier: str | None = None,
        into: ChunkIndex | None = None,
    ) -> ChunkIndex:  # fmt: skip
        """The tenant's chunks stored in that order, least recently used first, for a policy.

        With `tier`, every one of them is placed there first; those that do not fit into its
        capacity or whose bytes are bad are left out. With `into`, they are added to that index.
        """
        owner = _tenant_id(tenant)

        def listed() -> list[Kept]:
            with self._catalog.changed:
                self._catalog.refresh()
                found = [
                    kept
                    for kept in self._catalog.kept.values()
                    if kept.row.order_name == order_name and kept.row.tenant_id == owner
                ]
            return sorted(found, key=lambda kept: kept.tick)

        if tier is not None:
            for kept in listed():
                with suppress(CapacityError):
                    self.place_if_sound(kept.entry.key, tier)
        index = ChunkIndex() if into is None else into
        for kept in listed():
            if tier is None or tier in kept.tiers:
                index.add(kept.entry, tenant)
        return index

    def entries(self, keys: Iterable[str]) -> list[ChunkEntry]:
        """Those of the chunks called `keys` that are kept."""
        with self._catalog.changed:
            self._catalog.refresh()
            found = map(self._catalog.kept.get, keys)
            return [kept.entry for kept in found if kept is not None]

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
        return self._reader.sealed(self._catalog.find(key)).order

    # Reading

    def read(
        self, key: str, layer_start: int, layer_stop: int, n_rows_by_layer: Sequence[int],
        request_bytes: int, tier: str | None = None, order: Tensor | None = None,
    ) -> LayerRows:  # fmt: skip
        """The first rows of layers `layer_start` to `layer_stop - 1`, verified. Blocks.

        Several threads may read at once. Each layer is one run of requests.

        Args:
            n_rows_by_layer: rows of each of these layers, 0 to N.
            request_bytes: most bytes asked of the medium at once; a multiple of 4096.
            tier: to read from instead of the one that serves the chunk.
            order: as `order` gave it to the caller, who will use the rows with it.

        Raises:
            ChunkCorrupt: flipped, cut off, swapped or missing; says which layer.
            StoreError: not in the store, not in that tier's RAM, rows that are not there, or put
                anew meanwhile in another order.
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
        rows = tuple(n_rows_by_layer)
        return self._reader.read(kept, where, layer_start, rows, request_bytes, order)

    def is_unbuffered(self, tier: str) -> bool | None:
        """Whether reads of a file tier bypass the page cache; None for DRAM."""
        return self._tier(tier).unbuffered

    def close(self) -> None:
        """Let the folder go. Rows already read stay valid."""
        with self._catalog.changed:
            if self._catalog.closed:
                return
            self._catalog.close()
            self._index.close()
            self._owners.close()
        for tier in self.tiers.values():
            if tier.remote is not None:
                tier.remote.close()

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

        def in_memory(name: str) -> bool:
            return self.tiers[name].is_dram or self.tiers[name].is_device

        by_medium = sorted(self.tiers, key=in_memory)
        return tuple(name for name in names if name in self.tiers) or (by_medium[0],)


def _tenant_id(tenant: str) -> str:
    """What is written of a tenant's salt: it may be a secret, so not the salt."""
    return hashlib.sha256(f"tenant {tenant}".encode()).hexdigest()[:32] if tenant else ""
