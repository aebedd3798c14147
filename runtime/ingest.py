"""Preparing chunks off the request path: encode alone, score, order, store.

The time of each part is kept: it is the preparation that other reports leave out.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..core import selectors
from ..core.chunk_index import ChunkEntry, chain_id, chunk_key, content_id_of
from ..core.errors import CapacityError, StoreError, WorkloadError
from ..core.rng import rng
from .chunk_store import ChunkStore
from .encoded_kv import EncodedKv
from .stages import Stages
from .transformer import Transformer
from .write_back import WriteBack

log = logging.getLogger(__name__)

LayersScore = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Of K and V `[L, N, HK, D]`: `[N]`, the mean over the layers."""

OF_LAYERS: dict[str, LayersScore] = {
    "low_pass": selectors.low_pass_score,
    "high_pass": selectors.high_pass_score,
}

NEIGHBOURS_TOKENS = 256
"""Text put before a chunk to see which of its tokens depend on what stands there."""


@dataclass
class PreparationLedger:
    """Seconds spent preparing, by part."""

    encode_s: float = 0.0
    score_s: float = 0.0
    write_s: float = 0.0
    n_chunks: int = 0
    n_tokens: int = 0
    by_content: dict[str, float] = field(default_factory=dict)


class Ingestor:
    """Puts chunks into a store in the order a selector asks for."""

    def __init__(
        self, transformer: Transformer | Stages, store: ChunkStore, *, seed: int = 0
    ) -> None:
        self.transformer = transformer
        self.store = store
        self.seed = seed
        self.ledger = PreparationLedger()

    def ingest(
        self,
        token_ids: Sequence[int],
        *,
        selector: str,
        tier: str,
        neighbours: Sequence[Sequence[int]] = (),
        tenant: str = "",
    ) -> ChunkEntry:
        """Encode a chunk alone, rank its tokens and store it; a chunk already kept is left.

        Raises:
            StoreError, CapacityError: it cannot be written or is larger than the tier.
            WorkloadError: the selector compares more neighbours than there are.
        """
        there = self.kept(content_id_of(token_ids), selector, tenant)
        if there is not None:
            return there
        write, _ = self._prepared(token_ids, selector, tier, neighbours, tenant)
        return write()

    def ingest_behind(
        self,
        queue: WriteBack,
        token_ids: Sequence[int],
        *,
        selector: str,
        tier: str,
        neighbours: Sequence[Sequence[int]] = (),
        tenant: str = "",
    ) -> bool:
        """`ingest`, its writing left to a queue; False when the queue had no room for it."""
        write, n_bytes = self._prepared(token_ids, selector, tier, neighbours, tenant)
        return queue.add(write, n_bytes)

    @torch.inference_mode()
    def _prepared(
        self,
        token_ids: Sequence[int],
        selector: str,
        tier: str,
        neighbours: Sequence[Sequence[int]],
        tenant: str,
    ) -> tuple[Callable[[], ChunkEntry], int]:
        """A chunk encoded and ranked: what writes it, and the bytes that this holds."""
        self.store.check_fits(len(token_ids), tier)  # before it is encoded for nothing
        content_id = content_id_of(token_ids)
        started = time.perf_counter()
        ids = torch.tensor(list(token_ids))
        kv = self.transformer.encode(ids)
        kv.wait()
        encoded = time.perf_counter()
        order = self._order(selector, content_id, ids, kv, neighbours)
        scored = time.perf_counter()
        put, n_bytes = self._putting(content_id, kv, order)
        packing_s = time.perf_counter() - scored

        def write() -> ChunkEntry:
            begun = time.perf_counter()
            entry = put(order_name=selector, tier=tier, tenant=tenant)
            took = packing_s + time.perf_counter() - begun
            self._note(content_id, len(token_ids), encoded - started, scored - encoded, took)
            return entry

        return write, n_bytes

    def _putting(
        self, content_id: str, kv: EncodedKv, order: Tensor
    ) -> tuple[Callable[..., ChunkEntry], int]:
        """What puts a chunk into the store, and the bytes of host memory that this holds.

        Values on the host are packed when they are written; those of a GPU are now, there.
        """
        if kv.on_host:
            k, v = kv.host_k, kv.host_v
            return partial(self.store.put, content_id, k, v, order), k.nbytes + v.nbytes
        blobs = kv.blobs(self.store.shape, order)
        return partial(self.store.put_blobs, content_id, order, lambda: blobs), blobs.nbytes

    def fits(self, n_tokens: int, tier: str) -> bool:
        """Whether the tier, were it empty, could hold a chunk of so many tokens; tells if not."""
        try:
            self.store.check_fits(n_tokens, tier)
        except CapacityError as e:
            log.warning("a chunk was not kept: %s", e)
            return False
        return True

    def kept(self, content_id: str, selector: str, tenant: str = "") -> ChunkEntry | None:
        """The entry of a chunk that was encoded alone, None if the store has none."""
        loaded = self.transformer.loaded
        key = chunk_key(
            content_id,
            model=loaded.fingerprint,
            order=selector,
            dtype=loaded.spec.stored_dtype,
            tenant=tenant,
        )
        try:
            return self.store.entry(key)
        except StoreError:
            return None

    @torch.inference_mode()
    def ingest_prefix(
        self,
        chunks: Sequence[Sequence[int]],
        *,
        selector: str,
        tier: str,
        tenant: str = "",
    ) -> list[ChunkEntry]:
        """Store chunks as they are behind one another: exact `prefix` entries of that chain."""
        flat = torch.tensor([t for chunk in chunks for t in chunk])
        kv = self.transformer.encode(flat)
        entries = []
        chain = ""
        start = 0
        for chunk in chunks:
            content_id = content_id_of(chunk)
            chain = chain_id(chain, content_id)
            stop = start + len(chunk)
            order = torch.arange(stop - start)
            put, _ = self._putting(content_id, kv.tokens(start, stop), order)
            entry = put(order_name=selector, tier=tier, kind="prefix", chain=chain, tenant=tenant)
            entries.append(entry)
            start = stop
        return entries

    def _order(
        self,
        selector: str,
        content_id: str,
        ids: Tensor,
        kv: EncodedKv,
        neighbours: Sequence[Sequence[int]],
    ) -> Tensor:
        """int64 `[N]`; K and V come to the host only for a selector that looks at them."""
        if selector == "chunk_start":
            score = selectors.chunk_start_score(len(ids))
        elif selector == "random":
            score = selectors.random_score(len(ids), content_id, self.seed)
        elif selector in OF_LAYERS:
            score = self._layers_score(OF_LAYERS[selector], kv)
        else:
            k, v = kv.host_k.float().numpy(), kv.host_v.float().numpy()
            behind = self._behind(content_id, ids, neighbours)
            score = selectors.spread_high_pass_score(k, v, behind)
        return torch.from_numpy(selectors.stored_order(score))

    def _layers_score(self, score: LayersScore, kv: EncodedKv) -> np.ndarray:
        """A score that is a mean over layers; beside a GPU by all cores, a layer at a time.

        One core takes seconds for the layers of a chunk of a large model, far longer than the GPU
        takes to encode it. The mean of the layers' own scores is the score, to the bit.
        """
        k, v = kv.host_k, kv.host_v
        if kv.on_host:  # its cores are for computing
            return score(k.float().numpy(), v.float().numpy())

        def of(layer: int) -> np.ndarray:
            one = slice(layer, layer + 1)
            return score(k[one].float().numpy(), v[one].float().numpy())

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            by_layer = list(pool.map(of, range(k.shape[0])))
        mean: np.ndarray = np.stack(by_layer).mean(axis=0)
        return mean

    def _behind(
        self, content_id: str, ids: Tensor, neighbours: Sequence[Sequence[int]]
    ) -> list[np.ndarray]:
        """V of the chunk behind several other texts of the library."""
        others = [n for n in neighbours if content_id_of(n) != content_id]
        count = min(selectors.SPREAD_NEIGHBOURS, len(others))
        if count < 2:
            raise WorkloadError(
                "the selector spread_high_pass compares a chunk behind two other chunks or more",
                values=f"{len(others)} others",
                remedy="ingest more chunks at once, or choose another selector",
            )
        pick = rng(self.seed, "neighbours", content_id).permutation(len(others))[:count]
        out = []
        for i in pick:
            text = torch.tensor(list(others[i])[-NEIGHBOURS_TOKENS:])
            out.append(self.transformer.encode(ids, behind=text).host_v.float().numpy())
        return out

    def _note(self, content_id: str, n: int, encode: float, score: float, write: float) -> None:
        ledger = self.ledger
        ledger.encode_s += encode
        ledger.score_s += score
        ledger.write_s += write
        ledger.n_chunks += 1
        ledger.n_tokens += n
        ledger.by_content[content_id] = encode + score + write
