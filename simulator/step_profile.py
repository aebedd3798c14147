"""Time of one engine step from measured operator tables, as LLMServingSim's profiler writes them.

A step runs the dense operators over all its tokens, one attention kernel per layer over prefill
pieces and decodes together, and the head over its sequences. Each is a table; between points the
physics says what is linear. Tables: casys-kaist/LLMServingSim, profiler/perf (MIT).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

ATTENTION_AXES = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")

TILE_ROWS = 16
"""Rows that a tensor core multiplies at once: a matrix product works on whole tiles of its rows."""

Floats = NDArray[np.float64]
Piece = tuple[int, int]


@dataclass(frozen=True)
class Curve:
    """Microseconds over one axis: linear between points, slope of the last stretch beyond them."""

    x: tuple[int, ...]
    us: tuple[float, ...]

    def at(self, x: float) -> float:
        """Microseconds at `x` (> 0)."""
        if len(self.x) == 1:
            return self.us[0]
        i = min(max(bisect_right(self.x, x) - 1, 0), len(self.x) - 2)
        share = (x - self.x[i]) / (self.x[i + 1] - self.x[i])
        if i == 0 and share < 0:
            return self.us[0]
        return self.us[i] + share * (self.us[i + 1] - self.us[i])

    def at_tile(self, rows: int) -> float:
        """The same for matrix products: measured there, or at the end of the tile they begin.

        Their time is a staircase: a line between two points cuts off the foot of the next stair.
        """
        i = bisect_right(self.x, rows) - 1
        if i >= 0 and self.x[i] == rows:
            return self.us[i]
        return self.at(-(-rows // TILE_ROWS) * TILE_ROWS)


class Step(NamedTuple):
    """What one engine does in a step: prefill pieces (n_query, n_context), and decodes."""

    pieces: Sequence[Piece]
    n_decode: int
    kv_decode_tokens: int
    """Contexts of the decodes, summed."""
    kv_decode_max: int | None = None
    """The longest of them; None: all alike."""

    @property
    def n_tokens(self) -> int:
        """Rows through the layers."""
        return sum(q for q, _ in self.pieces) + self.n_decode

    @property
    def n_logits(self) -> int:
        """Rows through the head: one for every sequence."""
        return len(self.pieces) + self.n_decode


class Collective(NamedTuple):
    """Microseconds of one exchange between the GPUs of a group, by the rows of its tensor."""

    fixed_us: float = 0.0
    us_per_row: float = 0.0

    def at(self, n_rows: int) -> float:
        """Microseconds for `n_rows` rows."""
        return self.fixed_us + self.us_per_row * n_rows


ALONE = Collective()
"""One GPU has nobody to exchange with."""


@dataclass
class StepProfile:
    """`StepCost` of one model on one GPU (or one rank of a tensor-parallel group).

    Args:
        n_layers: of the model; the tables hold one layer.
        grid: sorted points of each attention axis; `us[i, j, k, l]` microseconds there. Index 0 of
            each axis is "none of it".
        capture_sizes: token counts a step is padded to, as CUDA graphs need it; a step with more
            tokens than the last is not padded. Empty: no padding.
        all_reduce: of one row per token, between GPUs that share every layer: behind the embedding,
            in each layer behind attention and behind the MLP.
        gather: of the logits, one row per sequence, each GPU holding its part of the vocabulary.
        overhead_s: seconds per step that no table holds, fitted.
        skew: by prefill chunk (0: none), over the number of decodes: how far the longest context
            draws the time from that of the mean, times the decodes. The kernel ends when its
            longest sequence does, and that tail is about as long whatever else runs.
    """

    n_layers: int
    dense_us: Curve
    once_us: Curve
    head_us: Curve
    grid: tuple[tuple[int, ...], ...]
    us: Floats
    capture_sizes: tuple[int, ...] = ()
    all_reduce: Collective = ALONE
    gather: Collective = ALONE
    overhead_s: float = 0.0
    skew: dict[int, Curve] = field(default_factory=dict)
    beyond_grid: dict[str, int] = field(default_factory=dict)

    def step_s(
        self,
        pieces: Sequence[Piece],
        n_decode: int,
        kv_decode_tokens: int,
        kv_decode_max: int | None = None,
    ) -> float:
        """Seconds of a step of prefill `pieces` (n_query, n_context) and `n_decode` decodes.

        Args:
            kv_decode_tokens: contexts of the decodes, summed.
            kv_decode_max: the longest of them; None: all alike.
        """
        return self.steps_s([Step(pieces, n_decode, kv_decode_tokens, kv_decode_max)])

    def steps_s(self, steps: Sequence[Step]) -> float:
        """The same for the one `Step` in `steps`."""
        (step,) = steps
        if not step.n_tokens:
            return 0.0
        padded = self.padded(step.n_tokens)
        reduce_us = (2 * self.n_layers + 1) * self.all_reduce.at(padded)
        us = self.n_layers * self.layer_us(step, padded) + self.once_a_step_us(step, padded)
        return (us + reduce_us) * 1e-6 + self.overhead_s

    def layer_us(self, step: Step, padded: int) -> float:
        """Microseconds of one layer's matrices over `padded` rows, and of its attention."""
        if not step.n_tokens:
            return self.dense_us.at_tile(padded)
        return self.dense_us.at_tile(padded) + self.attention_us(
            step.pieces, step.n_decode, step.kv_decode_tokens, step.kv_decode_max
        )

    def once_a_step_us(self, step: Step, padded: int) -> float:
        """Microseconds of what no layer does: embedding, last norm, head, gathering its logits."""
        us = self.once_us.at(padded)
        if step.n_logits:
            us += self.head_us.at(step.n_logits) + self.gather.at(step.n_logits)
        return us

    @property
    def has_skew(self) -> bool:
        """Whether the longest context matters beside their sum."""
        return bool(self.skew)

    def decode_run_s(
        self,
        n_decode: int,
        kv_decode_tokens: int,
        n_steps: int,
        kv_decode_max: int | None = None,
    ) -> float:
        """Seconds of `n_steps` decode steps in a row, every context one longer each time.

        Attention is piecewise linear in the mean context and in the longest, so each stretch
        between grid points is the sum of an arithmetic series. Equal to the sum of `step_s`.
        """
        if n_steps <= 0 or n_decode <= 0:
            return 0.0
        knots = self.grid[3][1:]
        contexts = [kv_decode_tokens / n_decode]
        if kv_decode_max is not None:
            contexts.append(kv_decode_max)
        total, done = 0.0, 0
        while done < n_steps:
            ahead = [k - x - done for x in contexts for k in knots if k - x - done > 0]
            n = min(n_steps - done, int(min(ahead)) + 1) if ahead else n_steps - done
            ends = [
                self.step_s(
                    (),
                    n_decode,
                    kv_decode_tokens + at * n_decode,
                    None if kv_decode_max is None else kv_decode_max + at,
                )
                for at in (done, done + n - 1)
            ]
            total += n * sum(ends) / 2
            done += n
        return total

    def attention_us(
        self, pieces: Sequence[Piece], n_decode: int, kv_decode_tokens: int, kv_max: int | None
    ) -> float:
        """Microseconds of one layer's attention kernel.

        The tables hold one prefill chunk. Several are one chunk of as many queries that sees as
        many (query, key) pairs; when their triangles hold fewer pairs than one chunk's
        would, the prefill part is scaled by the pairs.
        """
        n_query = sum(q for q, _ in pieces)
        if n_query > self.grid[0][-1]:
            return self._in_parts(pieces, n_decode, kv_decode_tokens, kv_max)
        context, scale = merged_context(pieces)
        mean = kv_decode_tokens / n_decode if n_decode else 0.0
        us = self._at(n_query, context, n_decode, mean)
        if n_decode > 1 and kv_max is not None and kv_max > mean:
            share = self._skew_share(n_query, n_decode)
            if share:
                us += share * (self._at(n_query, context, n_decode, kv_max) - us)
        if scale < 1:
            alone = self._at(n_query, context, 0, 0)
            floor = self._at(min(n_query, self.grid[0][1]), 0, 0, 0)
            us -= (1 - scale) * max(alone - floor, 0.0)
        return us

    def _in_parts(
        self, pieces: Sequence[Piece], n_decode: int, kv_decode_tokens: int, kv_max: int | None
    ) -> float:
        """A chunk longer than any measured: parts of the longest measured, one behind the other.

        Pairs add up exactly, and so does what they cost; the first part carries the decodes.
        """
        self.beyond_grid["prefill_chunk"] = self.beyond_grid.get("prefill_chunk", 0) + 1
        room, us = self.grid[0][-1], 0.0
        part: list[Piece] = []
        left = deque(pieces)
        while left or part:
            used = sum(q for q, _ in part)
            if left and used < room:
                q, context = left.popleft()
                n = min(q, room - used)
                part.append((n, context))
                if n < q:
                    left.appendleft((q - n, context + n))
                continue
            us += self.attention_us(part, n_decode, kv_decode_tokens, kv_max)
            part, n_decode, kv_decode_tokens, kv_max = [], 0, 0, None
        return us

    def _skew_share(self, n_query: int, n_decode: int) -> float:
        if not self.skew:
            return 0.0
        chunks = [c for c in self.skew if c > 0] if n_query else [c for c in self.skew if c == 0]
        if not chunks:
            return 0.0
        i = min(max(bisect_right(chunks, n_query) - 1, 0), max(len(chunks) - 2, 0))
        low = self.skew[chunks[i]].at(n_decode)
        if i + 1 < len(chunks):
            share = (n_query - chunks[i]) / (chunks[i + 1] - chunks[i])
            low += min(max(share, 0.0), 1.0) * (self.skew[chunks[i + 1]].at(n_decode) - low)
        return min(max(low / n_decode, 0.0), 1.0)

    def padded(self, tokens: int) -> int:
        """Rows that a step of `tokens` runs with."""
        if not self.capture_sizes or tokens > self.capture_sizes[-1]:
            return tokens
        return self.capture_sizes[bisect_right(self.capture_sizes, tokens - 1)]

    def _at(self, *point: float) -> float:
        """Multilinear between grid points; linear beyond the last, counted in `beyond_grid`."""
        low: list[int] = []
        share: list[float] = []
        for name, axis, x in zip(ATTENTION_AXES, self.grid, point, strict=True):
            if x > axis[-1]:
                self.beyond_grid[name] = self.beyond_grid.get(name, 0) + 1
            i = min(max(bisect_right(axis, x) - 1, 0), len(axis) - 2)
            if i == 0 and x > 0 and name != "kv_prefill":
                i = (
                    1 if len(axis) > 2 else 0
                )  # between "none" and the smallest: the smallest's line
            low.append(i)
            share.append((x - axis[i]) / (axis[i + 1] - axis[i]))
        total = 0.0
        for corner in product((0, 1), repeat=4):
            weight = math.prod(s if c else 1 - s for s, c in zip(share, corner, strict=True))
            if weight:
                total += weight * float(
                    self.us[tuple(i + c for i, c in zip(low, corner, strict=True))]
                )
        return max(total, 0.0)


def merged_context(pieces: Sequence[Piece]) -> tuple[float, float]:
    """(context of one chunk that sees as many pairs, share of its pairs that there are)."""
    n_query = sum(q for q, _ in pieces)
    if not n_query:
        return 0.0, 1.0
    pairs = sum(q * (c + q / 2) for q, c in pieces)
    context = pairs / n_query - n_query / 2
    if context >= 0:
        return context, 1.0
    return 0.0, pairs / (n_query * n_query / 2)
