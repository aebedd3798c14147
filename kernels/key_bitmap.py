"""Holes in the keys: a bit per key, 64 to a word, and what each block of keys needs.

Bit ``i`` of word ``w`` says whether key ``64 * w + i`` takes part. A kernel walks keys in blocks of
16, 32 or 64, each within one word. Blocks whose bits are all set need no look at them, blocks
without a set bit no visit at all: the walk goes through lists of block numbers, which keep its
loops free of branches.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

WORD_KEYS = 64


@dataclass(frozen=True)
class KeyBlocks:
    """Blocks of ``size`` keys in three ascending lists: *whole* (every key takes part), *part*
    (some do) and *any* (the two together).

    Attributes:
        lists: int32 ``[3, n_blocks]``; beyond its length a list holds the numbers left over.
        before: int32 ``[3, n_blocks + 1]``: how many of a list are below a block number.
        size: keys of a block.
    """

    lists: Tensor
    before: Tensor
    size: int

    @property
    def n_blocks(self) -> int:
        """Of all kinds."""
        return self.lists.shape[1]


@dataclass(frozen=True)
class KeyBitmap:
    """Which keys take part in attention.

    Attributes:
        words: int64 ``[ceil(n_slots / 64)]``; bits beyond ``n_slots`` are 0.
        n_slots: keys.
    """

    words: Tensor
    n_slots: int
    _blocks: dict[int, KeyBlocks] = field(default_factory=dict, repr=False)
    """By block size; layers share them."""

    @staticmethod
    def of(kept: Tensor) -> KeyBitmap:
        """From bool ``[n_slots]``, where False is a hole."""
        bits = F.pad(kept.to(torch.int64), (0, -kept.numel() % WORD_KEYS)).view(-1, WORD_KEYS)
        return KeyBitmap((bits << torch.arange(WORD_KEYS, device=kept.device)).sum(1), kept.numel())

    def kept(self) -> Tensor:
        """bool ``[n_slots]``."""
        bits = self.words[:, None] >> torch.arange(WORD_KEYS, device=self.words.device)
        return (bits & 1).bool().flatten()[: self.n_slots]

    def to(self, device: str | torch.device) -> KeyBitmap:
        """The same there."""
        return KeyBitmap(self.words.to(device), self.n_slots)

    def blocks(self, size: int) -> KeyBlocks:
        """The lists for blocks of ``size`` keys, made where the words are, nothing read back.

        Raises:
            ValueError: a block would not lie within one word.
        """
        if size < 1 or WORD_KEYS % size:
            raise ValueError(
                f"a block of keys must lie within a word of {WORD_KEYS}, got {size} keys: "
                f"use a tile with block_n 16, 32 or 64"
            )
        if size not in self._blocks:
            self._blocks[size] = _blocks(self.words, size)
        return self._blocks[size]


def _blocks(words: Tensor, size: int) -> KeyBlocks:
    every = -1 if size == WORD_KEYS else (1 << size) - 1
    shifts = torch.arange(0, WORD_KEYS, size, device=words.device)
    bits = ((words[:, None] >> shifts) & every).flatten()
    whole, found = bits == every, bits != 0
    kinds = torch.stack([whole, found & ~whole, found])
    lists = torch.argsort((~kinds).to(torch.int32), dim=1, stable=True)
    before = F.pad(kinds.cumsum(1), (1, 0))
    return KeyBlocks(lists.to(torch.int32), before.to(torch.int32), size)
