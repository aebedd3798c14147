"""`DecodeGraphs`: decode steps captured once per batch size, replayed with new values.

A step of a few rows is dozens of short kernels, whose launches would take longer than their work.
So everything that changes from step to step lies in buffers at fixed addresses: token, position,
first slot and length of each row. Batches are filled up to the next bucket with rows that nobody
reads. What cannot be replayed runs as it is, and the reason is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .attention import PooledRows

if TYPE_CHECKING:
    from ..core.ops import Op
    from .device import Device, Graph
    from .kv_slab import KvSlab
    from .session import Session
    from .transformer import Transformer

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Batch sizes that are captured; a plan's `max_num_seqs` bounds them."""
WARM_UPS = 2
"""Runs before a capture: libraries set themselves up and kernels are compiled in the first."""


@dataclass(frozen=True)
class _Batch:
    """Buffers of one bucket, all `[bucket]`, int64 but for `n_keys`."""

    ids: Tensor
    places: Tensor
    """`[3, bucket]`: position in the prompt, first slot of the request, slot of the new token."""
    n_keys: Tensor
    """int32: keys that the row sees, its own included."""
    tokens: Tensor
    """What the step makes."""

    @staticmethod
    def of(size: int, device: Device, scratch: int) -> _Batch:
        """Rows that write to the scratch slot and see nothing else."""
        ids, tokens = (device.empty((size,), torch.int64).zero_() for _ in range(2))
        places = device.empty((3, size), torch.int64).zero_()
        places[1:].fill_(scratch)
        return _Batch(ids, places, device.empty((size,), torch.int32).fill_(1), tokens)


class DecodeGraphs:
    """Decode steps of requests whose K and V lie in one pooled buffer."""

    def __init__(self, transformer: Transformer, slab: KvSlab, *, enabled: bool = True) -> None:
        self._transformer = transformer
        self._device = transformer.device
        self._slab = slab
        self._enabled = enabled
        self._batches: dict[int, _Batch] = {}
        self._graphs: dict[int, Graph] = {}
        self.fallbacks: Counter[str] = Counter()
        """Steps that were not replayed, by reason."""
        self.replays: Counter[int] = Counter()
        """Steps that were, by bucket."""

    def prepare(self, most: int) -> None:
        """Capture every bucket that batches of up to `most` rows need; nothing else may run."""
        for size in BUCKETS:
            if self._enabled and size not in self._graphs:
                self._graphs[size] = self._capture(size)
            if size >= most:
                return

    def takes(self, sessions: Sequence[Session], op: Op) -> bool:
        """Whether the step can run on the pooled buffer; counts why not."""
        spec = self._transformer.spec
        if op.n_layers < spec.n_layers:
            self.fallbacks["a stage of several"] += 1
        elif any(s.buffer.base is None for s in sessions):
            self.fallbacks["KV outside the pooled buffer"] += 1
        elif len(sessions) > BUCKETS[-1]:
            self.fallbacks[f"more than {BUCKETS[-1]} rows"] += 1
        else:
            return True
        return False

    def step(self, sessions: Sequence[Session]) -> Tensor:
        """Queue one token of each session; returns them, int64 `[n]` on the device."""
        n = len(sessions)
        size = next(b for b in BUCKETS if b >= n)
        batch = self._batch(size)
        self._fill(batch, sessions)
        counts = self._transformer.rows_by_layer
        graph = self._graphs.get(size)
        if graph is not None:
            graph.replay()
            self.replays[size] += 1
        else:
            self.fallbacks["not captured" if self._enabled else "off"] += 1
            self._run(batch)
        self._transformer.rows_by_layer = [count + n for count in counts]
        return batch.tokens[:n].clone()

    def _batch(self, size: int) -> _Batch:
        if size not in self._batches:
            self._batches[size] = _Batch.of(size, self._device, self._slab.scratch)
        return self._batches[size]

    def _fill(self, batch: _Batch, sessions: Sequence[Session]) -> None:
        """New values at the same addresses; rows beyond the sessions write to the scratch slot."""
        n, size = len(sessions), batch.ids.numel()
        at = [s.n_prompt + s.n_begun - 1 for s in sessions]
        base = [self._base(s) for s in sessions]
        rest, scratch = size - n, self._slab.scratch
        places = torch.tensor(
            [
                at + [0] * rest,
                base + [scratch] * rest,
                [b + p for b, p in zip(base, at, strict=True)] + [scratch] * rest,
            ]
        )
        batch.places.copy_(self._device.upload(places), non_blocking=True)
        torch.add(batch.places[0], 1, out=batch.n_keys)
        batch.ids[:n].copy_(self._newest(sessions), non_blocking=True)

    def _newest(self, sessions: Sequence[Session]) -> Tensor:
        """int64 `[n]`: the last token of each session, which the host may not know yet."""
        known = [s.last_token for s in sessions]
        if all(token is not None for token in known):
            return torch.cat([token for token in known if token is not None])
        return self._device.upload(torch.tensor([s.new_tokens[-1] for s in sessions]))

    @staticmethod
    def _base(session: Session) -> int:
        base = session.buffer.base
        assert base is not None  # `takes` looked
        return base

    def _run(self, batch: _Batch) -> None:
        """Launch the step: the same work at the same addresses each time."""
        transformer = self._transformer
        # Sliced anew: the rope of a tensor that is still the same would be taken from before.
        rows = PooledRows(
            self._slab.k, self._slab.v, 0, batch.ids.numel(), batch.places[0],
            batch.places[1], batch.places[2], batch.n_keys,
        )  # fmt: skip
        hidden = transformer.embed(batch.ids)
        hidden = transformer.run_layers(hidden, [rows], 0, transformer.spec.n_layers)
        batch.tokens.copy_(transformer.logits(hidden).argmax(dim=-1))

    def _capture(self, size: int) -> Graph:
        batch = self._batch(size)
        counts = self._transformer.rows_by_layer
        with torch.inference_mode():
            for _ in range(WARM_UPS):
                self._run(batch)
            self._device.synchronise("warm-up of a graph")
            graph = self._device.capture(lambda: self._run(batch))
        self._transformer.rows_by_layer = counts
        return graph
