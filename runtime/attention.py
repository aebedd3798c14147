"""How the library's layers read and write our KV buffers.

`Rows` (`PooledRows` for decode from one buffer of all requests) says which tokens are in the packed
batch. While it is entered, `Scatter.update` puts new K and V at their true positions, and the
registered attention lets each query at position p see all keys at positions <= p, whatever order
they came in. No mask is registered, so the library makes none.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .device import CPU, Device
from .kv_buffer import KvBuffer, Layers

ATTENTION_NAME = "cachetune"


class Packed(Protocol):
    """Rows [start, stop) of the packed batch, and where their K and V are."""

    @property
    def start(self) -> int:
        """First row."""

    @property
    def stop(self) -> int:
        """Behind the last row."""

    @property
    def positions(self) -> Tensor:
        """`[n]`, where the rows are."""

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Put the K and V, `[HK, n, D]` each, of these rows into their slots."""

    def attend(
        self, device: Device, layer: int, q: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """q: `[n, H, D]`. Returns the same shape."""


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
    host: Tensor | None = None
    """The positions in host memory, where they are known there."""
    plans: dict[int | None, Any] = field(default_factory=dict)
    """What a device worked out about the positions, by window; layers share it."""

    @staticmethod
    def of(buffer: KvBuffer, start: int, positions: Tensor, device: Device = CPU) -> Rows:
        """Rows from `start` of the batch on, one for each of at least one position."""
        n = positions.numel()
        n_keys = int(positions[-1]) + 1
        is_run = n_keys - int(positions[0]) == n
        here = device.upload(positions)
        return Rows(buffer, start, start + n, here, n_keys, is_run, positions)

    @property
    def n(self) -> int:
        """How many."""
        return self.stop - self.start

    def moved(self, start: int) -> Rows:
        """The same rows elsewhere in a batch."""
        return Rows(
            self.buffer, start, start + self.n, self.positions, self.n_keys, self.is_run,
            self.host, self.plans,
        )  # fmt: skip

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Put the batch's K and V, `[HK, n, D]` each, of these rows into their slots."""
        for out, new in ((self.buffer.k[layer], k), (self.buffer.v[layer], v)):
            if self.is_run:
                out[:, self.n_keys - self.positions.numel() : self.n_keys] = new
            else:
                out.index_copy_(1, self.positions, new)

    def attend(
        self, device: Device, layer: int, q: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """q: `[n, H, D]`. Returns the same shape."""
        return device.attention(self, q, self.buffer.k[layer], self.buffer.v[layer], scale, window)


@dataclass(frozen=True, slots=True)
class PooledRows:
    """One new token of each of several requests, whose K and V lie in one pooled buffer.

    Everything is on the device, all `[n]`, so that a captured graph can be given other values.
    """

    k: Layers
    v: Layers
    start: int
    stop: int
    positions: Tensor
    base: Tensor
    """First slot of each request."""
    slots: Tensor
    """Where each new token goes: `base + positions`."""
    n_keys: Tensor
    """int32: `positions + 1`."""

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """See `Packed`."""
        self.k[layer].index_copy_(1, self.slots, k)
        self.v[layer].index_copy_(1, self.slots, v)

    def attend(
        self, device: Device, layer: int, q: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """See `Packed`."""
        return device.decode_attention(
            q, self.k[layer], self.v[layer], self.base, self.n_keys, scale, window
        )


_batch = threading.local()


@contextmanager
def packed(rows: Sequence[Packed], device: Device = CPU) -> Iterator[None]:
    """Make `rows` the batch of the layers called in this thread."""
    _batch.rows, _batch.device = rows, device
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
    device = _batch.device
    outs = [
        row.attend(
            device, layer, q[0, :, row.start : row.stop].transpose(0, 1), scale, sliding_window
        )
        for row in _batch.rows
    ]
    return (outs[0] if len(outs) == 1 else torch.cat(outs))[None], None


def register_attention() -> None:
    """Make the attention known to the library by name; calling again does no harm."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, _attention)
