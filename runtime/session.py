"""`Session`: one live request on the real executor: its tokens, rows, KV and hidden states."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..core.decision import ReuseDecision
from ..core.errors import InvariantViolation
from ..core.ops import Op
from .attention import Rows
from .chunk_store import LayerRows
from .device import Device
from .kv_buffer import KvBuffer


def token_tensor(parts: Iterable[Sequence[int]]) -> Tensor:
    """Token ids of a prompt's parts as one int64 tensor; `torch.tensor` takes ten times as long."""
    flat: list[int] = []
    for part in parts:
        flat += part
    return torch.frombuffer(array("q", flat), dtype=torch.int64)


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
        self.hidden: dict[int, tuple[Tensor, Rows | None]] = {}
        """By piece: hidden states on their way, and their rows; None where there are none."""
        self.selected: Tensor | None = None
        """Positions chosen by a check layer, where its device is."""
        self.new_tokens: list[int] = []
        self.n_begun = 0
        """Tokens made, or on their way on a device that is asked ahead."""
        self.last_token: Tensor | None = None
        """The newest token, int64 [1] on the device, where the host does not know it yet."""
        self.suffix_logits: Tensor | None = None
        self._passed = torch.empty(0)
        self._n_layers = n_layers
        self._read_order = read_order
        self._positions: dict[tuple[int, int], Tensor] = {}
        self._rows: dict[tuple[int, int, int], Rows] = {}

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
        """Prompt positions, ascending, that pass through the op's first layer. On the host.

        Not for layers behind a check layer: see `rows`.
        """
        band = self.decision.band_of(op.layer_start, self._n_layers)
        key = (op.piece, band)
        if key not in self._positions:
            parts = [self._part(s.part, band)[s.start : s.stop] for s in op.segments]
            # A piece may have no rows left in a deeper band.
            self._positions[key] = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
        positions = self._positions[key]
        if positions.numel() != op.n_tokens:
            raise InvariantViolation(
                f"op {op.op_id} names {op.n_tokens} rows at layer {op.layer_start}, positions give "
                f"{positions.numel()}"
            )
        return positions

    def rows(self, op: Op, device: Device) -> Rows | None:
        """The rows that pass through the op's layers, ready for `device`; None for none."""
        decision = self.decision
        if decision.selection == "deviation" and op.layer_start >= decision.check_layer:
            key = (-1, 0, device.index)
            if key not in self._rows:
                self._rows[key] = self._after_check(device)
            return self._rows[key]
        positions = self.positions(op)
        if not positions.numel():
            return None
        key = (op.piece, decision.band_of(op.layer_start, self._n_layers), device.index)
        if key not in self._rows:
            self._rows[key] = Rows.of(self.buffer, 0, positions, device)
        return self._rows[key]

    def enter(
        self, op: Op, device: Device, embed: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Rows | None]:
        """Hidden states `[1, n, hidden]` and rows for a prefill op, without rows that left."""
        rows = self.rows(op, device)
        if op.layer_start == 0:
            at = rows.host if rows is not None else None
            ids = self.token_ids[:0] if at is None else self.token_ids[at]
            return embed(device.upload(ids)), rows
        hidden, before = self.hidden.pop(op.piece)
        hidden = device.move(hidden)
        n_before, n = (0 if r is None else r.n for r in (before, rows))
        if n_before != n:
            hidden = hidden[:, self._kept(op, before, rows, device)]
        return hidden, rows

    def _kept(self, op: Op, before: Rows | None, rows: Rows | None, device: Device) -> Tensor:
        """Which of the rows of the layer before go on."""
        if rows is None:
            return device.upload(torch.empty(0, dtype=torch.int64))
        if rows.host is None:  # chosen on the device, from all rows of the prompt
            return rows.positions
        was = before.host if before is not None and before.host is not None else rows.host[:0]
        keep = torch.searchsorted(was, rows.host)
        found = was[keep.clamp(max=max(0, was.numel() - 1))]
        if not torch.equal(found, rows.host):
            raise InvariantViolation(
                f"rows of op {op.op_id} are not among those of the layer before: "
                f"{rows.n} of {was.numel()}"
            )
        return device.upload(keep)

    def candidates(self) -> list[int]:
        """Chunks among which a check layer chooses: loaded, and not exact already."""
        return [i for i, c in enumerate(self.decision.chunks) if c.is_loaded and not c.exact]

    def pass_on(self, hidden: Tensor) -> None:
        """Leave a decode step's row `[1, 1, hidden]` for the next stage."""
        self._passed = hidden

    def passed(self) -> Tensor:
        """What the stage before left."""
        return self._passed

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

    def _after_check(self, device: Device) -> Rows:
        if self.selected is None:
            raise InvariantViolation(f"request {self.request_id}: rows asked for before select")
        whole: Sequence[Tensor] = [
            torch.arange(c.offset, c.offset + c.n_tokens)
            for c in self.decision.chunks
            if not c.is_loaded
        ]
        suffix = torch.arange(self.n_prompt - self.decision.n_suffix, self.n_prompt)
        selected = device.move(self.selected)
        if device.kind == "cpu":
            positions = torch.cat([*whole, selected, suffix]).sort().values
            return Rows.of(self.buffer, 0, positions, device)
        # The choice stays on the device; the suffix is always computed, so the last row is known.
        known = device.upload(torch.cat([*whole, suffix]))
        positions = torch.cat([known, selected]).sort().values
        n = positions.numel()
        return Rows(self.buffer, 0, n, positions, self.n_prompt, is_run=n == self.n_prompt)
