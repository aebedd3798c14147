"""`Run`: selected rows spread over a stretch of a prompt, and the (query, key) pairs they see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .ops import QUERY_BLOCK


class Run(NamedTuple):
    """Rows [start, stop) of the `total` that are spread over `n` tokens from `offset` on."""

    part: int
    offset: int
    n: int
    total: int
    start: int
    stop: int

    @property
    def n_rows(self) -> int:
        """How many."""
        return self.stop - self.start

    @property
    def pairs(self) -> int:
        """Keys that the rows see, in all."""
        squares = self.stop * self.stop - self.start * self.start
        spread = self.n * squares + self.n_rows * self.total
        return self.n_rows * self.offset + spread // (2 * self.total)

    def visible(self, row: int) -> int:
        """Keys that one row sees, itself included."""
        return self.offset + (2 * row + 1) * self.n // (2 * self.total) + 1


def scored_pairs(runs: Sequence[Run]) -> int:
    """Pairs scored by queries in blocks, each block over the keys up to its last query."""
    scored = in_block = last = 0
    for run in runs:
        at = run.start
        while at < run.stop:
            step = min(QUERY_BLOCK - in_block, run.stop - at)
            at += step
            in_block += step
            last = run.visible(at - 1)
            if in_block == QUERY_BLOCK:
                scored += in_block * last
                in_block = 0
    return scored + in_block * last
