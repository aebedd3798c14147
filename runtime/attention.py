"""How the library's layers read and write our KV buffers.

`Rows` says which tokens are in the packed batch. While it is entered, `Scatter.update` puts new K
and V at their true positions, and the registered attention lets each query at position p see all
keys at positions <= p, whatever order they came in. No mask is registered, so the library makes
none.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.reference import sparse_attention
from .kv_buffer import KvBuffer

ATTENTION_NAME = "cachetune"


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows [start, stop) of the packed batch: one request's tokens, ascending positions."""

    buffer: KvBuffer
    start: int
    stop: int
    positions: Tensor
    n_keys: int
    """One more than the largest position."""
    is_run: bool
    """Whether the positions have no gap."""

    @staticmethod
    def of(buffer: KvBuffer, start: int, positions: Tensor) -> Rows:
        """Rows from `start` of the batch on, one for each of at least one position."""
        n = positions.numel()
        n_keys = int(positions[-1]) + 1
        return Rows(buffer, start, start + n, positions, n_keys, n_keys - int(positions[0]) == n)

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Put the batch's K and V, `[HK, n, D]` each, of these rows into their slots."""
        for out, new in ((self.buffer.k[layer], k), (self.buffer.v[layer], v)):
            if self.is_run:
                out[:, self.n_keys - self.positions.numel() : self.n_keys] = new
            else:
                out.index_copy_(1, self.positions, new)

    def attend(self, layer: int, q: Tensor, scale: float, window: int | None) -> Tensor:
        """q: `[n, H, D]`. Returns the same shape."""
        k, v = self.buffer.k[layer], self.buffer.v[layer]
        n = self.n_keys
        if n == q.shape[0] > 1 and (window is None or n <= window):
            # A whole prompt from its start: the library's own causal kernel needs no mask.
            heads = q.transpose(0, 1)[None]
            k, v = k[None, :, :n], v[None, :, :n]
            out = F.scaled_dot_product_attention(
                heads, k, v, is_causal=True, scale=scale, enable_gqa=True
            )
            return out[0].transpose(0, 1)
        return sparse_attention(q, k, v, self.positions, n, scale, window)


_batch = threading.local()


@contextmanager
def packed(rows: Sequence[Rows]) -> Iterator[None]:
    """Make `rows` the batch of the layers called in this thread."""
    _batch.rows = rows
    try:
        yield
    finally:
        _batch.rows = None


class Scatter:
    """Stands where the library expects a cache: writes K and V to their slots."""

    def update(self, k: Tensor, v: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """k, v: `[1, HK, n, D]`, K rotated. Returned as they are; attention reads the buffers."""
        for row in _batch.rows:
            row.write(layer, k[0, :, row.start : row.stop], v[0, :, row.start : row.stop])
        return k, v

    def get_seq_length(self, layer: int = 0) -> int:
        """Unused by the layers; the library's interface asks for it."""
        return 0


def _attention(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """q: `[1, H, n, D]`. Returns `[1, n, H, D]`."""
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    scale = scaling if scaling is not None else q.shape[-1] ** -0.5
    outs = [
        row.attend(layer, q[0, :, row.start : row.stop].transpose(0, 1), scale, sliding_window)
        for row in _batch.rows
    ]
    return (outs[0] if len(outs) == 1 else torch.cat(outs))[None], None


def register_attention() -> None:
    """Make the attention known to the library by name; calling again does no harm."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, _attention)
