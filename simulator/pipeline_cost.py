"""`PipelineCost`: a pipeline-parallel group as one engine.

As many batches are under way as there are stages, each of up to the engine's token budget, and a
prompt's rows stay together as long as they fit in one (vLLM): a lone prompt passes the stages one
after the other and gains nothing. With equal stages a batch is back at the first one when it has
passed all, which no other delays: a step of the group lasts as long as the largest batch takes
through the whole model, and the hops between stages. Batches begin together here, in a real group
one after the other: a prompt of several batches ends up to (stages - 1) / stages of a batch later.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..core.step_cost import StepCost


class PipelineCost:
    """`StepCost` of `n_stages` equal shares of a model's layers.

    Args:
        cost: of the whole model on one stage's GPUs, host overhead per step included.
        n_stages: at least 1; with 1 the cost is that of `cost`.
        batch_tokens: prompt rows of a batch, at most; those of a step are `n_stages` times as many.
        hop_s: from a stage to the next, for no rows.
        hop_s_per_row: what a row adds: its hidden state over the link.
    """

    def __init__(
        self,
        cost: StepCost,
        n_stages: int,
        batch_tokens: int,
        hop_s: float = 0.0,
        hop_s_per_row: float = 0.0,
    ) -> None:
        self.cost = cost
        self.n_stages = n_stages
        self._batch_tokens = batch_tokens
        self._hop_s = hop_s
        self._hop_s_per_row = hop_s_per_row
        self.has_skew = bool(getattr(cost, "has_skew", False))

    def step_s(
        self,
        pieces: Sequence[tuple[int, int]],
        n_decode: int,
        kv_decode_tokens: int,
        kv_decode_max: int | None = None,
    ) -> float:
        """One step; see `StepCost`."""
        largest = self._largest_batch(pieces)
        n, kv = self._decodes(n_decode, kv_decode_tokens)
        rows = n + sum([n_rows for n_rows, _ in largest])
        return self.cost.step_s(largest, n, kv, kv_decode_max) + self._hops_s(rows)

    def decode_run_s(
        self, n_decode: int, kv_decode_tokens: int, n_steps: int, *kv_decode_max: int | None
    ) -> float:
        """`n_steps` decode steps in a row; see `StepCost`."""
        n, kv = self._decodes(n_decode, kv_decode_tokens)
        return self.cost.decode_run_s(n, kv, n_steps, *kv_decode_max) + n_steps * self._hops_s(n)

    def _largest_batch(self, pieces: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
        """The batch with most rows, after every piece in turn went to the one with fewest."""
        if self.n_stages == 1:
            return pieces
        cut = [
            (min(n - begin, self._batch_tokens), context + begin)
            for n, context in pieces
            for begin in range(0, n, self._batch_tokens)
        ]
        batches: list[list[tuple[int, int]]] = [[] for _ in range(self.n_stages)]
        rows = [0] * self.n_stages
        for piece in sorted(cut, reverse=True):
            i = rows.index(min(rows))
            batches[i].append(piece)
            rows[i] += piece[0]
        return batches[rows.index(max(rows))]

    def _decodes(self, n_decode: int, kv_tokens: int) -> tuple[int, int]:
        """Decodes of the largest batch, and their contexts."""
        n = -(-n_decode // self.n_stages)
        return n, -(-kv_tokens * n // n_decode) if n_decode else 0

    def _hops_s(self, n_rows: int) -> float:
        """The way to the other stages; the sampled token's way back is too short to count."""
        return (self.n_stages - 1) * (self._hop_s + n_rows * self._hop_s_per_row)
