"""`Session`: one live request on the real executor: its tokens, rows, KV and hidden states."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..core.decision import ReuseDecision
from ..core.errors import InvariantViolation
from ..core.ops import Op
from .chunk_store import LayerRows
from .kv_buffer import KvBuffer


def token_tensor(parts: Iterable[Sequence[int]]) -> Tensor:
    """Token ids of a prompt's parts as one int64 tensor; `torch.tensor` takes ten times as long."""
    flat = array("q")
    for part in parts:
        flat.extend(part)
    return torch.frombuffer(flat, dtype=torch.int64)


class Session:
    """Owned by the executor from the first op of an attempt until the request ends.

    Args:
        request_id, attempt: which ops belong to it.
        token_ids: int64 `[n_prompt]`.
        decision: the fates; rows follow from it and from `orders`.
        read_order: stored order of the chunk with that key; row i holds token order[i].
        buffer: at least `n_prompt + n_output` slots.
        n_output: tokens to make.
        stop_tokens: ids that end the output early.
    """

    def __init__(
        self,
        request_id: int,
        attempt: int,
        token_ids: Tensor,
        decision: ReuseDecision,
        read_order: Callable[[str], Tensor],
        buffer: KvBuffer,
        n_output: int,
        n_layers: int,
        *,
        stop_tokens: frozenset[int] = frozenset(),
        keep_suffix_logits: bool = False,
    ) -> None:
        self.request_id = request_id
        self.attempt = attempt
        self.token_ids = token_ids
        self.decision = decision
        self.orders: dict[int, Tensor] = {}
        self.buffer = buffer
        self.n_output = n_output
        self.stop_tokens = stop_tokens
        self.keep_suffix_logits = keep_suffix_logits
        self.failed = False
        self.staged: dict[tuple[int, int], LayerRows] = {}
        self.hidden: dict[int, tuple[Tensor, Tensor]] = {}
        self.selected: Tensor | None = None
        self.new_tokens: list[int] = []
        self.suffix_logits: Tensor | None = None
        self._n_layers = n_layers
        self._read_order = read_order
        self._rows: dict[tuple[int, int], Tensor] = {}

    @property
    def n_prompt(self) -> int:
        """Tokens of the prompt."""
        return int(self.token_ids.numel())

    def order(self, ordinal: int) -> Tensor:
        """Stored order of a loaded chunk. Read once, by the chunk's first load.

        Raises:
            StoreError: the chunk is gone or its header is bad.
        """
        found = self.orders.get(ordinal)
        if found is None:
            found = self.orders[ordinal] = self._read_order(self.decision.chunks[ordinal].key)
        return found

    def loaded_positions(self, ordinal: int, n_rows: int) -> Tensor:
        """Prompt positions of the first `n_rows` stored rows of a chunk."""
        return self.order(ordinal)[:n_rows] + self.decision.chunks[ordinal].offset

    def positions(self, op: Op) -> Tensor:
        """Prompt positions, ascending, that pass through the op's first layer."""
        decision = self.decision
        layer = op.layer_start
        if decision.selection == "deviation" and layer >= decision.check_layer:
            return self._after_check()
        band = decision.band_of(layer, self._n_layers)
        key = (op.piece, band)
        if key not in self._rows:
            parts = [self._part(s.part, band)[s.start : s.stop] for s in op.segments]
            # A piece may have no rows left in a deeper band.
            self._rows[key] = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
        rows = self._rows[key]
        if rows.numel() != op.n_tokens:
            raise InvariantViolation(
                f"op {op.op_id} names {op.n_tokens} rows at layer {layer}, positions give "
                f"{rows.numel()}"
            )
        return rows

    def enter(self, op: Op, embed: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Hidden states `[1, n, hidden]` and positions for a prefill op, without rows that left."""
        positions = self.positions(op)
        if op.layer_start == 0:
            return embed(self.token_ids[positions]), positions
        hidden, before = self.hidden.pop(op.piece)
        if before.numel() != positions.numel():
            keep = torch.searchsorted(before, positions)
            if not torch.equal(before[keep], positions):
                raise InvariantViolation(
                    f"rows of op {op.op_id} are not among those of the layer before: "
                    f"{positions.numel()} of {before.numel()}"
                )
            hidden = hidden[:, keep]
        return hidden, positions

    def candidates(self) -> list[int]:
        """Chunks among which a check layer chooses: loaded, and not exact already."""
        return [i for i, c in enumerate(self.decision.chunks) if c.is_loaded and not c.exact]

    def finished(self) -> bool:
        """Whether the output is complete."""
        return len(self.new_tokens) >= self.n_output or self.new_tokens[-1] in self.stop_tokens

    def _part(self, part: int, band: int) -> Tensor:
        """Recomputed positions of a chunk or the suffix, ascending."""
        decision = self.decision
        if part == len(decision.chunks):
            return torch.arange(self.n_prompt - decision.n_suffix, self.n_prompt)
        fate = decision.chunks[part]
        n_loaded = fate.n_tokens - fate.n_recompute[band]
        if not fate.is_loaded or not n_loaded or decision.selection == "deviation":
            # No order is needed, and in a band that loads nothing none has been read yet.
            return torch.arange(fate.offset, fate.offset + fate.n_tokens)
        return self.order(part)[n_loaded:].sort().values + fate.offset

    def _after_check(self) -> Tensor:
        if self.selected is None:
            raise InvariantViolation(f"request {self.request_id}: rows asked for before select")
        key = (-1, 0)
        if key not in self._rows:
            whole: Sequence[Tensor] = [
                torch.arange(c.offset, c.offset + c.n_tokens)
                for c in self.decision.chunks
                if not c.is_loaded
            ]
            suffix = torch.arange(self.n_prompt - self.decision.n_suffix, self.n_prompt)
            self._rows[key] = torch.cat([*whole, self.selected, suffix]).sort().values
        return self._rows[key]
