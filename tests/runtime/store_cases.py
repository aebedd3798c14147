"""Small models and chunks for the tests of the chunk store."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from cachetune.core.model_spec import Dtype, ModelSpec
from cachetune.runtime.chunk_store import ChunkStore, TierConfig
from torch import Tensor

TIERS = (TierConfig("disk", "file"), TierConfig("dram", "dram"), TierConfig("hbm", "device"))
REQUEST = 1 << 16


def make_model(dtype: Dtype = "float32", n_layers: int = 3) -> ModelSpec:
    """2 KV heads of 8: one row group is 4 KiB + 8 bytes in float32, half of that in 16 bits."""
    return ModelSpec(
        name="tiny", family="llama", n_layers=n_layers, hidden_size=32, intermediate_size=64,
        n_heads=4, n_kv_heads=2, head_dim=8, vocab_size=64, max_position=512, dtype=dtype,
    )  # fmt: skip


@dataclass
class Chunk:
    """Random K and V [L, N, HK, D] with a random order [N]."""

    k: Tensor
    v: Tensor
    order: Tensor


def make_chunk(model: ModelSpec, n_tokens: int, seed: int = 0) -> Chunk:
    """A chunk of `n_tokens`."""
    g = torch.Generator().manual_seed(seed)
    shape = (model.n_layers, n_tokens, model.n_kv_heads, model.head_dim)
    k, v = (torch.randn(shape, generator=g).to(getattr(torch, model.dtype)) for _ in range(2))
    return Chunk(k, v, torch.randperm(n_tokens, generator=g))


def open_store(
    root: Path, model: ModelSpec | None = None, tiers: tuple[TierConfig, ...] = TIERS
) -> ChunkStore:
    """A store of `make_model()`, or of `model`."""
    return ChunkStore(root, model or make_model(), "weights-1", tiers)


def put(
    store: ChunkStore,
    content_id: str,
    chunk: Chunk,
    tier: str = "disk",
    order_name: str = "rank",
    tenant: str = "",
) -> str:
    """Keep a chunk; returns its key."""
    entry = store.put(
        content_id, chunk.k, chunk.v, chunk.order, order_name=order_name, tier=tier, tenant=tenant
    )
    return entry.key


def read_all(store: ChunkStore, key: str, tier: str | None = None) -> tuple[Tensor, Tensor]:
    """K and V of all layers, [L, N, HK, D] in stored order."""
    n_layers, n = store.model.n_layers, store.entry(key).n_tokens
    rows = store.read(key, 0, n_layers, [n] * n_layers, REQUEST, tier)
    layers = range(n_layers)
    return torch.stack([rows.k(i) for i in layers]), torch.stack([rows.v(i) for i in layers])


def holds(store: ChunkStore, key: str, chunk: Chunk, tier: str | None = None) -> bool:
    """Whether reading gives back what was put."""
    k, v = read_all(store, key, tier)
    return torch.equal(k, chunk.k[:, chunk.order]) and torch.equal(v, chunk.v[:, chunk.order])


def chunk_file(store: ChunkStore, key: str) -> Path:
    """Where a chunk lies."""
    return store.root / "chunks" / f"{key}.chunk"
