"""`ReuseDecision`: the fate of every token of a prompt. Policies make it, the lowering reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class ChunkFate:
    """What happens to one chunk: its tokens [offset, offset + n_tokens) of the prompt.

    `n_recompute[b]` tokens are computed in band b, the rest is loaded from `tier`; with an empty
    `tier` nothing is loaded and `n_recompute` equals `n_tokens` in every band.
    """

    offset: int
    n_tokens: int
    tier: str
    key: str
    exact: bool
    n_recompute: tuple[int, ...]

    @property
    def is_loaded(self) -> bool:
        """Whether any of it is loaded."""
        return bool(self.tier)


@dataclass(frozen=True, slots=True)
class ReuseDecision:
    """Fates of a prompt's chunks and how the recomputed tokens are chosen.

    `selection`: `rank` takes the tail of the stored order; `deviation` computes all tokens below
    `check_layer`, then keeps the `n_selected` that deviate most at it (CacheBlend).
    """

    chunks: tuple[ChunkFate, ...]
    n_suffix: int
    n_bands: int = 1
    selection: Literal["rank", "deviation"] = "rank"
    check_layer: int = 0
    n_selected: int = 0

    @property
    def n_prompt(self) -> int:
        """Tokens of the whole prompt."""
        return sum(c.n_tokens for c in self.chunks) + self.n_suffix

    def band_of(self, layer: int, n_layers: int) -> int:
        """The band a layer belongs to; bands cut the layers into equal parts."""
        return layer * self.n_bands // n_layers

    def band_start(self, band: int, n_layers: int) -> int:
        """First layer of `band`."""
        return -(-band * n_layers // self.n_bands)

    def n_computed(self, layer: int, n_layers: int) -> int:
        """Rows that pass through `layer`, the suffix included."""
        if self.selection == "deviation":
            if layer < self.check_layer:
                return self.n_prompt
            whole = sum(c.n_tokens for c in self.chunks if not c.is_loaded)
            return whole + self.n_selected + self.n_suffix
        band = self.band_of(layer, n_layers)
        return sum(c.n_recompute[band] for c in self.chunks) + self.n_suffix

    def n_loaded(self, ordinal: int, layer: int, n_layers: int) -> int:
        """Tokens of one chunk that are loaded in `layer`."""
        chunk = self.chunks[ordinal]
        if not chunk.is_loaded:
            return 0
        if self.selection == "deviation":
            return 0 if layer < self.check_layer else chunk.n_tokens
        return chunk.n_tokens - chunk.n_recompute[self.band_of(layer, n_layers)]
