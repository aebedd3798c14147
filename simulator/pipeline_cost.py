"""`PipelineCost`: a pipeline-parallel group as one engine, whose stages are never idle.

A batch is cut into as many parts as there are stages, and the parts follow each other through them
(vLLM keeps one batch per stage under way). With equal stages a part is back at the first one when
it has passed all, which no other part delays: a step of the whole batch lasts as long as the
largest part takes through the whole model, and the hops between stages.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..core.step_cost import StepCost


class PipelineCost:
    """`StepCost` of `n_stages` equal shares of a model's layers.

    Args:
        cost: of the whole model on one stage's GPUs, host overhead per step included.
        n_stages: at least 1; with 1 the cost is that of `cost`.
        hop_s: from a stage to the next, for no rows.
        hop_s_per_row: what a row adds: its hidden state over the link.
    """

    def __init__(
        self, cost: StepCost, n_stages: int, hop_s: float = 0.0, hop_s_per_row: float = 0.0
    ) -> None:
        self.cost = cost
        self.n_stages = n_stages
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
        """One step; see `StepCost`. A prompt piece is cut too: its last part sees the most."""
        parts = [(-(-n // self.n_stages), n, context) for n, context in pieces]
        largest = [(part, context + n - part) for part, n, context in parts]
        n, kv = self._decodes(n_decode, kv_decode_tokens)
        rows = n + sum([part for part, _ in largest])
        return self.cost.step_s(largest, n, kv, kv_decode_max) + self._hops_s(rows)

    def decode_run_s(
        self, n_decode: int, kv_decode_tokens: int, n_steps: int, *kv_decode_max: int | None
    ) -> float:
        """`n_steps` decode steps in a row; see `StepCost`."""
        n, kv = self._decodes(n_decode, kv_decode_tokens)
        return self.cost.decode_run_s(n, kv, n_steps, *kv_decode_max) + n_steps * self._hops_s(n)

    def _decodes(self, n_decode: int, kv_tokens: int) -> tuple[int, int]:
        """Decodes of the largest part, and their contexts."""
        n = -(-n_decode // self.n_stages)
        return n, -(-kv_tokens * n // n_decode) if n_decode else 0

    def _hops_s(self, n_rows: int) -> float:
        """The way to the other stages; the sampled token's way back is too short to count."""
        return (self.n_stages - 1) * (self._hop_s + n_rows * self._hop_s_per_row)
