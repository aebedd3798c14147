"""`LayerRows`: what a read of a chunk hands out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from ..core.errors import StoreError
from ..core.layout import GROUP_TOKENS
from ..core.units import ceil_div
from ..kernels.packing import Packed, unpack
from .chunk_file import Geometry
from .device import Device


class LayerRows:
    """Verified rows of some layers of one chunk, in a staging buffer that it keeps alive.

    The buffer goes back to its pool when the last view of it is gone. `n_bytes` are what the rows
    take, `n_requests` what was asked of the medium for them: nothing where they lie on a device.
    """

    __slots__ = (
        "_at_byte", "_shape", "device", "elements", "layer_start", "n_bytes", "n_requests",
        "n_rows", "tier",
    )  # fmt: skip

    def __init__(
        self,
        shape: Geometry,
        staging: np.ndarray | Tensor,
        layer_start: int,
        n_rows: tuple[int, ...],
        at_byte: list[int],
        device: Device | None = None,
    ) -> None:
        self._shape = shape
        self.device = device
        """Where they are; None in host memory."""
        pages = staging if isinstance(staging, Tensor) else torch.from_numpy(staging)
        self.elements = pages.view(shape.element_dtype)
        self._at_byte = at_byte
        self.layer_start = layer_start
        self.n_rows = n_rows
        self.n_bytes = 0
        self.n_requests = 0
        self.tier = ""

    def is_on(self, device: Device) -> bool:
        """Whether there is nothing to copy to that device."""
        return self.device is device

    def on(self, device: Device) -> LayerRows:
        """The same rows on a device: as they are if they are there, else without gaps.

        Those of the host must not change before that is done.
        """
        if self.is_on(device):
            return self
        if self.device is not None:
            return self._over(device.move(self.elements), self._at_byte, device)
        sizes = [self._shape.read_bytes(n) for n in self.n_rows]
        ranges = list(zip(self._at_byte, sizes, strict=True))
        pages = device.upload_pages(self.elements.view(torch.uint8), ranges)
        at_byte = [0, *accumulate(sizes)][:-1]
        return self._over(pages, at_byte, device)

    def _over(self, pages: Tensor, at_byte: list[int], device: Device) -> LayerRows:
        moved = LayerRows(self._shape, pages, self.layer_start, self.n_rows, at_byte, device)
        moved.n_bytes, moved.n_requests, moved.tier = self.n_bytes, self.n_requests, self.tier
        return moved

    @property
    def is_packed(self) -> bool:
        """Whether codes were read, not values."""
        return self._shape.packed is not None

    def packed(self, layer: int) -> tuple[Packed, Packed]:
        """K before RoPE and V of the rows read of `layer`, as they are stored."""
        assert self._shape.packed is not None
        i = self._position(layer)
        return self._shape.packed.read(self.elements, self._at_byte[i], self.n_rows[i])

    @staticmethod
    def joined(reads: Sequence[LayerRows], layer: int) -> tuple[Packed, Packed]:
        """The whole groups that several reads have of `layer`, K and V as they are stored.

        The rows of each are filled up to a multiple of 32.
        """
        packed = reads[0]._shape.packed
        assert packed is not None
        pieces = []
        for rows in reads:
            i = rows._position(layer)
            n_groups = ceil_div(rows.n_rows[i], GROUP_TOKENS)
            pieces.append((rows.elements, rows._at_byte[i], n_groups))
        return packed.joined(pieces)

    @staticmethod
    def joined_values(reads: Sequence[LayerRows], layer: int) -> tuple[Tensor, Tensor]:
        """As `joined`, of a store that keeps values: K before RoPE and V, [32 * groups, HK, D]
        each. Two launches for all reads, which on a device cost more than the bytes."""
        groups = [rows.groups(layer) for rows in reads]
        shape = groups[0].shape[-2:]
        k, v = (torch.cat([g[:, half].flatten(1) for g in groups]) for half in (0, 1))
        return k.view(-1, *shape), v.view(-1, *shape)

    def groups(self, layer: int) -> Tensor:
        """View [G, 2, 32, HK, D] of the groups read of `layer`, K then V, nothing copied.

        Rows from `n_rows` on are other tokens of the last group, or its filling.
        """
        i = self._position(layer)
        return self._shape.groups(
            self.elements, self._at_byte[i], ceil_div(self.n_rows[i], GROUP_TOKENS)
        )

    def k(self, layer: int) -> Tensor:
        """Keys before RoPE, [n_rows, HK, D]: row i is token `order[i]`. Do not write to it."""
        return self._half(layer, 0)

    def v(self, layer: int) -> Tensor:
        """Values, [n_rows, HK, D]. Do not write to it."""
        return self._half(layer, 1)

    def kept(self, layer: int) -> tuple[Tensor, Tensor]:
        """K before RoPE and V, [n_rows, HK, D] each, as a store that keeps values has them."""
        # One group is a view; several lie apart (V and checksum between), so they are joined.
        n_rows, groups = self.n_rows[self._position(layer)], self.groups(layer)
        return groups[:, 0].flatten(0, 1)[:n_rows], groups[:, 1].flatten(0, 1)[:n_rows]

    def _half(self, layer: int, half: int) -> Tensor:
        if self.is_packed:
            return unpack(self.packed(layer)[half], self._shape.dtype)
        return self.kept(layer)[half].to(self._shape.dtype)

    def _position(self, layer: int) -> int:
        i = layer - self.layer_start
        if not 0 <= i < len(self.n_rows):
            stop = self.layer_start + len(self.n_rows)
            raise StoreError(
                "the layer must be one that was read",
                values=f"layer {layer}, read {self.layer_start}..{stop - 1}",
                remedy="read it first",
            )
        return i
