"""What an engine needs to know of a machine: seconds of a step, and of many alike in a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class StepCost(Protocol):
    """Seconds of one forward step of a continuously batched engine, host overhead included."""

    def step_s(
        self,
        pieces: Sequence[tuple[int, int]],
        n_decode: int,
        kv_decode_tokens: int,
        kv_decode_max: int | None = None,
    ) -> float:
        """One step.

        Args:
            pieces: (new tokens, tokens before them) of every prompt piece.
            n_decode: requests that decode.
            kv_decode_tokens: tokens they read, all together.
            kv_decode_max: the longest of them, where the kernel waits for it.
        """
        ...

    def decode_run_s(self, n_decode: int, kv_decode_tokens: int, n_steps: int) -> float:
        """`n_steps` decode steps in a row, nobody joining or leaving; KV grows by one token per
        request and step. Equal to the sum of `step_s` within 1e-3 (closed form, not a loop)."""
        ...
