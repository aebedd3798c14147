"""`ModelCost`: time of a transformer's prefill pieces and decode steps, composed from kernels.

For a machine and a model that nobody profiled together: every layer is its matrices, attention,
the norms, rotation and activation between them and, with tensor parallelism, two all-reduces; there
the embedding adds one, and logits are gathered. Host overhead of an engine is not in it: add one
scalar per step.

    cost = ModelCost(model, KernelCost.load("H100-SXM"))
    cost.prefill_s(512, 8192)
    cost.decode_s(16, 16 * 4096)
    cost.decode_steps_s(16, 16 * 4096, n_steps=100)
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from functools import lru_cache
from operator import attrgetter
from typing import NamedTuple

from ..core.errors import ModelError
from ..core.model_spec import DTYPE_BYTES, ModelSpec
from .allreduce import allreduce_s, gather_s
from .kernel_cost import KernelCost

ACTIVATION_BYTES = 2
FIRST_CONTEXT = 16
"""Tokens: the first knot of the decode line; below it attention costs what it costs there."""
N_KNOTS = 18
"""Knots at 16 x 2^j tokens of context per sequence, to 2 Mi tokens."""


class DecodeLine(NamedTuple):
    """A decode step of a fixed batch: `fixed_s + s_per_token * total context`, in a range of it."""

    fixed_s: float
    s_per_token: float
    until_tokens: float
    """Total context up to which this line holds."""


_END = attrgetter("until_tokens")


class ModelCost:
    """Times of one model on `tp` GPUs of one kind, in seconds; one pipeline stage.

    Raises:
        ModelError: `tp` does not divide the heads or the intermediate size.
    """

    def __init__(
        self,
        model: ModelSpec,
        kernels: KernelCost,
        tp: int = 1,
        dtype: str | None = None,
        kv_dtype: str = "bfloat16",
    ) -> None:
        """`dtype` is that of the matrices, the model's own unless given (fp8); `kv_dtype` that of
        the K and V that decode reads. Prefill is timed as with bfloat16."""
        for name, count in (("n_heads", model.n_heads), ("intermediate", model.intermediate_size)):
            if tp < 1 or count % tp:
                raise ModelError(
                    f"the tensor-parallel degree must divide {name} = {count}", values=str(tp)
                )
        self.model, self.kernels, self.tp, self.kv_dtype = model, kernels, tp, kv_dtype
        self.dtype = dtype or ("bfloat16" if DTYPE_BYTES[model.dtype] == 2 else model.dtype)
        self._heads = (model.n_heads // tp, max(1, model.n_kv_heads // tp), model.head_dim)
        self.rows_s = lru_cache(maxsize=1 << 14)(self._rows_s)
        self.decode_lines = lru_cache(maxsize=1 << 12)(self._decode_lines)

    def prefill_s(self, n_query: int, n_cached: int, head: bool = True) -> float:
        """A prefill piece: `n_query` rows through all layers behind `n_cached` tokens.

        `head` adds the logits of the last row, which only the last piece of a prompt computes.
        """
        return self.step_s([(n_query, n_cached)], n_logits=int(head))

    def decode_s(self, batch: int, context_tokens_total: float) -> float:
        """One decode step of `batch` sequences whose contexts sum to `context_tokens_total`."""
        line = self.decode_line(batch, context_tokens_total)
        return line.fixed_s + line.s_per_token * context_tokens_total

    def step_s(
        self,
        pieces: Iterable[tuple[int, int]],
        batch: int = 0,
        context_tokens_total: float = 0.0,
        n_logits: int | None = None,
    ) -> float:
        """A mixed step: prefill pieces (n_query, n_cached) beside `batch` decoding sequences.

        Matrices see all rows at once; attention runs piece by piece, then decode. `n_logits` counts
        rows of the head: one per decoding sequence, and one for each piece unless given.
        """
        pieces = list(pieces)
        rows = batch + sum(n_query for n_query, _ in pieces)
        logits = batch + (len(pieces) if n_logits is None else n_logits)
        attention_s = sum(
            self.kernels.prefill_attention_s(n_query, n_cached, *self._heads)
            for n_query, n_cached in pieces
        )
        decode_s = self._attention_line(batch, context_tokens_total) if batch else 0.0
        layers_s = self.model.n_layers * attention_s + decode_s
        return layers_s + self.rows_s(rows) + self.logits_s(logits)

    def decode_line(self, batch: int, context_tokens_total: float) -> DecodeLine:
        """The line that holds at this total context (knots belong to the line on their right)."""
        lines = self.decode_lines(batch)
        return lines[bisect_right(lines, context_tokens_total, 0, len(lines) - 1, key=_END)]

    def decode_steps_s(self, batch: int, context_tokens_total: int, n_steps: int) -> float:
        """`n_steps` decode steps that all of `batch` take; each lengthens every context by one.

        Exact sum of `decode_s`, one term per line that the contexts cross.
        """
        seconds, total, left = 0.0, context_tokens_total, n_steps
        lines = self.decode_lines(batch)
        at = bisect_right(lines, total, 0, len(lines) - 1, key=_END)
        while left:
            line = lines[at]
            at += 1
            inside = left
            if line.until_tokens != float("inf"):
                inside = min(left, max(1, -int(-(line.until_tokens - total) // batch)))
            tokens = inside * total + batch * (inside * (inside - 1) // 2)
            seconds += inside * line.fixed_s + line.s_per_token * tokens
            total += inside * batch
            left -= inside
        return seconds

    def logits_s(self, n_rows: int) -> float:
        """The head for `n_rows` rows, its vocabulary split over the GPUs and gathered from them."""
        if not n_rows:
            return 0.0
        m = self.model
        vocab = -(-m.vocab_size // self.tp)
        n_bytes = ACTIVATION_BYTES * n_rows * m.vocab_size
        gathered_s = gather_s(self.kernels.sheet, self.tp, n_bytes)
        return self.kernels.gemm_s(n_rows, vocab, m.hidden_size) + gathered_s

    def _rows_s(self, n_rows: int) -> float:
        """What depends on the number of rows only: matrices, norms, all-reduces of all layers."""
        m, gemm = self.model, self.kernels.gemm_s
        heads, kv_heads, head_dim = self._heads
        inter, dtype = m.intermediate_size // self.tp, self.dtype
        matrices_s = (
            gemm(n_rows, (heads + 2 * kv_heads) * head_dim, m.hidden_size, dtype)
            + gemm(n_rows, m.hidden_size, heads * head_dim, dtype)
            + gemm(n_rows, 2 * inter, m.hidden_size, dtype)
            + gemm(n_rows, m.hidden_size, inter, dtype)
        )
        row_bytes = ACTIVATION_BYTES * n_rows
        moved = (
            4 * m.hidden_size,  # norm: the row and the residual, in and out
            4 * m.hidden_size,
            2 * (heads + kv_heads) * head_dim,
            3 * inter,  # gate and up in, product out
        )
        elementwise_s = sum(self.kernels.elementwise_s(n * row_bytes) for n in moved)
        reduce_s = allreduce_s(self.kernels.sheet, self.tp, m.hidden_size * row_bytes)
        return m.n_layers * (matrices_s + elementwise_s) + (2 * m.n_layers + 1) * reduce_s

    def _attention_line(self, batch: int, context_tokens_total: float) -> float:
        """Attention of all layers in a decode step, on the decode line."""
        return (
            self.decode_s(batch, context_tokens_total) - self.rows_s(batch) - self.logits_s(batch)
        )

    def _decode_lines(self, batch: int) -> tuple[DecodeLine, ...]:
        """Lines between knots of the mean context; time never falls as context grows."""
        knots = [FIRST_CONTEXT << j for j in range(N_KNOTS)]
        layers, at = self.model.n_layers, self.kernels.decode_attention_s
        values: list[float] = []
        for knot in knots:
            seconds = layers * at(batch, knot * batch, *self._heads, self.kv_dtype)
            values.append(max([seconds, *values[-1:]]))
        rest_s = self.rows_s(batch) + self.logits_s(batch)
        lines = [DecodeLine(rest_s + values[0], 0.0, float(knots[0] * batch))]
        for i in range(1, N_KNOTS):
            slope = (values[i] - values[i - 1]) / ((knots[i] - knots[i - 1]) * batch)
            fixed = rest_s + values[i] - slope * knots[i] * batch
            lines.append(DecodeLine(fixed, slope, float(knots[i] * batch)))
        return (*lines[:-1], lines[-1]._replace(until_tokens=float("inf")))
