"""Row groups of packed codes: where the parts of a group lie, written and read without arithmetic.

    group    K codes [32, HK, D*b/8] | K scale, zero [HK, D]
             V codes [32, HK, D*b/8] | V scale, zero [32, HK, ceil(D/32)]        (scales fp16)

A row group is one quantisation group of `kernels/packing.py` for each channel of K, so a prefix of
whole row groups is unpacked like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, float16

from ..core.layout import GROUP_TOKENS, SCALE_CHANNELS, group_bytes, packed_parts
from ..core.model_spec import PACKED_BITS, ModelSpec
from ..core.units import ceil_div
from ..kernels.packing import Packed, Per

Pack = Callable[[Tensor, int, Per], Packed]
"""`kernels.packing.pack` of some device."""


def fill_groups(groups: Tensor, rows: Tensor) -> None:
    """Rows `[N, ...]` into groups `[G, 32, ...]`; what the last group lacks stays as it is."""
    n_full = rows.shape[0] // GROUP_TOKENS
    full, rest = rows[: n_full * GROUP_TOKENS], rows[n_full * GROUP_TOKENS :]
    groups[:n_full] = full.view(n_full, GROUP_TOKENS, *rows.shape[1:])
    if rest.shape[0]:
        groups[n_full, : rest.shape[0]] = rest


@dataclass(frozen=True, slots=True)
class PackedGroups:
    """Places of the six parts of a group, K then V: codes, scales, zeros."""

    bits: int
    n_kv_heads: int
    head_dim: int
    group_bytes: int
    starts: tuple[int, ...]
    """First byte of each part."""

    @staticmethod
    def of(model: ModelSpec) -> PackedGroups:
        """For a model that is stored packed."""
        starts = (0, *accumulate(packed_parts(model)))[:6]
        bits = PACKED_BITS[model.stored]
        return PackedGroups(bits, model.n_kv_heads, model.head_dim, group_bytes(model), starts)

    def fill(self, data: Tensor, at_byte: int, k: Tensor, v: Tensor, pack: Pack) -> None:
        """Pack K before RoPE and V, `[N, HK, D]` each, into the groups at `at_byte` of uint8."""
        n_groups = ceil_div(k.shape[0], GROUP_TOKENS)
        views = self._views(data, at_byte, n_groups)
        packed_k, packed_v = pack(k, self.bits, "channel"), pack(v, self.bits, "token")
        fill_groups(views[0], packed_k.codes)
        views[1][:], views[2][:] = packed_k.scale, packed_k.zero
        for view, rows in zip(views[3:], _rows(packed_v), strict=True):
            fill_groups(view, rows)

    def read(self, data: Tensor, at_byte: int, n_rows: int) -> tuple[Packed, Packed]:
        """K and V of the first rows of the groups at `at_byte`, on the device of `data`."""
        k, v = self.joined([(data, at_byte, ceil_div(n_rows, GROUP_TOKENS))])
        return k.tokens(0, n_rows), v.tokens(0, n_rows)

    def joined(self, pieces: Sequence[tuple[Tensor, int, int]]) -> tuple[Packed, Packed]:
        """K and V of whole groups, (where, first byte, groups) of each chunk, one after another.

        The parts of a group lie in memory as they do on disk, where its checksum keeps the next
        one from beginning at a multiple of 16 bytes: put together, they can be read in full words.
        """
        views = [self._views(*piece) for piece in pieces]
        parts = [torch.cat(part) for part in zip(*views, strict=True)]
        k_codes, codes, scale, zero = (part.flatten(0, 1) for part in (parts[0], *parts[3:]))
        k = Packed(k_codes, parts[1], parts[2], self.bits, "channel", self.head_dim)
        return k, Packed(codes, scale, zero, self.bits, "token", self.head_dim)

    def _views(self, data: Tensor, at_byte: int, n_groups: int) -> list[Tensor]:
        """Each part of all groups: codes `[G, 32, HK, bytes]`, of K `[G, HK, D]`, of V
        `[G, 32, HK, ceil(D/32)]`."""
        heads, lanes = self.n_kv_heads, ceil_div(self.head_dim, SCALE_CHANNELS)
        codes = (GROUP_TOKENS, heads, self.head_dim * self.bits // 8)
        of_k, of_v = (heads, self.head_dim), (GROUP_TOKENS, heads, lanes)
        halves = data[: data.numel() // 2 * 2].view(float16)
        return [
            self._part(data if shape is codes else halves, at_byte + start, n_groups, shape)
            for start, shape in zip(
                self.starts, (codes, of_k, of_k, codes, of_v, of_v), strict=True
            )
        ]

    def _part(self, x: Tensor, at_byte: int, n_groups: int, shape: tuple[int, ...]) -> Tensor:
        item = x.element_size()
        strides = [1]
        for size in reversed(shape[1:]):
            strides.insert(0, strides[0] * size)
        return x.as_strided(
            (n_groups, *shape),
            (self.group_bytes // item, *strides),
            x.storage_offset() + at_byte // item,
        )


def _rows(packed: Packed) -> tuple[Tensor, Tensor, Tensor]:
    return packed.codes, packed.scale, packed.zero
