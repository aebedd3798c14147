"""`StepTables`: a `ModelCost` as the `StepCost` of an engine, fast enough for long traces.

Attention of a prefill piece is interpolated over new tokens inside a tile of output rows and, in
logarithms, over cached tokens; matrices and norms over the rows of a step. Knots are computed when
they are first needed. Decode runs are the closed form of `ModelCost`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from math import exp, log

from .model_cost import ModelCost

ROW_STEPS = ((8, 1), (64, 8), (512, 32), (4096, 128), (65536, 1024))
"""(up to, step): knots of the rows of a step, close where tiles of a matmul matter."""
TILE = 128
"""Rows of a block of attention: times jump where one more block begins."""
QUERY_KNOTS = (
    *(1 << i for i in range(8)),
    *(edge for k in range(1, 16) for edge in (TILE * k + 1, TILE * (k + 1))),
    *range(2560, 65537, 512),
)
CACHED_OFFSET = 128
"""Added to cached tokens, so that none has a logarithm."""


class StepTables:
    """Seconds of steps of one model on one machine.

    Args:
        cost: kernels composed to a model; no host time in it.
        overhead_s: of the engine's host per step, added to each.
    """

    def __init__(self, cost: ModelCost, overhead_s: float = 0.0) -> None:
        self.cost = cost
        self.overhead_s = overhead_s
        self._layers = cost.model.n_layers
        self._row_knots = [1]
        for until, step in ROW_STEPS:
            self._row_knots += range(self._row_knots[-1] + step, until + 1, step)
        self._row_values: dict[int, float] = {}
        self._cells: dict[tuple[int, int], float] = {}
        self._pieces: dict[tuple[int, int], float] = {}
        model, tp = cost.model, cost.tp
        self._logits_s = lru_cache(maxsize=1 << 14)(cost.logits_s)
        self._heads = (model.n_heads // tp, max(1, model.n_kv_heads // tp), model.head_dim)

    def step_s(
        self,
        pieces: Sequence[tuple[int, int]],
        n_decode: int,
        kv_decode_tokens: int,
        kv_decode_max: int | None = None,
    ) -> float:
        """One step; a prompt piece is (new tokens, tokens before them). See `StepCost`."""
        cost = self.cost
        if not pieces:
            return cost.decode_s(n_decode, kv_decode_tokens) + self.overhead_s
        rows = n_decode
        attention_s = 0.0
        for n_query, n_cached in pieces:
            rows += n_query
            attention_s += self._attention_s(n_query, n_cached)
        seconds = self._layers * attention_s + self._rows_s(rows) + self.overhead_s
        seconds += self._logits_s(n_decode + len(pieces))
        if n_decode:
            alone_s = cost.rows_s(n_decode) + self._logits_s(n_decode)
            seconds += cost.decode_s(n_decode, kv_decode_tokens) - alone_s
        return seconds

    def decode_run_s(self, n_decode: int, kv_decode_tokens: int, n_steps: int) -> float:
        """`n_steps` decode steps in a row; see `StepCost`."""
        steps_s = self.cost.decode_steps_s(n_decode, kv_decode_tokens, n_steps)
        return steps_s + n_steps * self.overhead_s

    def _rows_s(self, rows: int) -> float:
        knots = self._row_knots
        i = bisect_right(knots, rows) - 1
        if knots[i] == rows:
            return self._row_knot_s(rows)
        if i == len(knots) - 1:
            return self.cost.rows_s(rows)
        low, high = knots[i], knots[i + 1]
        share = (rows - low) / (high - low)
        return self._row_knot_s(low) * (1 - share) + self._row_knot_s(high) * share

    def _row_knot_s(self, rows: int) -> float:
        found = self._row_values.get(rows)
        if found is None:
            found = self._row_values[rows] = self.cost.rows_s(rows)
        return found

    def _attention_s(self, n_query: int, n_cached: int) -> float:
        """One layer of one piece."""
        found = self._pieces.get((n_query, n_cached))
        if found is not None:
            return found
        knots = QUERY_KNOTS
        i = bisect_right(knots, n_query) - 1
        value = exp(self._along_cached(knots[i], n_cached))
        if knots[i] != n_query and i + 1 < len(knots):
            share = (n_query - knots[i]) / (knots[i + 1] - knots[i])
            value += share * (exp(self._along_cached(knots[i + 1], n_cached)) - value)
        if len(self._pieces) < 1 << 16:
            self._pieces[n_query, n_cached] = value
        return value

    def _along_cached(self, n_query: int, n_cached: int) -> float:
        y = log((n_cached + CACHED_OFFSET) / CACHED_OFFSET) / log(2)
        j = int(y)
        v = y - j
        low = self._cell(n_query, j)
        return low + v * (self._cell(n_query, j + 1) - low) if v else low

    def _cell(self, n_query: int, j: int) -> float:
        """Logarithm of the seconds of `n_query` new tokens behind 128 (2 ** j - 1)."""
        found = self._cells.get((n_query, j))
        if found is None:
            n_cached = CACHED_OFFSET * ((1 << j) - 1)
            seconds = self.cost.kernels.prefill_attention_s(n_query, n_cached, *self._heads)
            found = self._cells[n_query, j] = log(seconds)
        return found
