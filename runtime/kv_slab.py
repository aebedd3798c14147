"""`KvSlab`: K and V of all requests in one pooled buffer; `SlabPool` lends ranges of its slots.

A request's slots are one run, so that a decode step needs no more than its first slot and length,
and a captured graph finds every request at the same address.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from ..core.model_spec import ModelSpec
from ..core.units import round_up
from .kv_buffer import KvBuffer, Layers, Place, empty_layers

SLOTS_STEP = 64
SCRATCH_SLOTS = 64
"""Slots at the end, written by rows that only fill up a batch."""


class KvSlab:
    """`k` and `v`, layer by layer `[HK, n_slots + scratch, D]`; K is rotated."""

    def __init__(self, spec: ModelSpec, n_slots: int, places: Sequence[Place]) -> None:
        self.n_slots = round_up(n_slots, SLOTS_STEP)
        self.scratch = self.n_slots
        """First of the scratch slots."""
        total = self.n_slots + SCRATCH_SLOTS
        self.k: Layers = empty_layers(spec, total, places)
        self.v: Layers = empty_layers(spec, total, places)
        for layer in (*self.k, *self.v):  # of rows that fill up, one key is read before it is set
            layer[:, self.scratch :].zero_()

    def view(self, base: int, n_slots: int) -> KvBuffer:
        """The buffer of one request: slots [base, base + n_slots)."""
        cut = [_cut(layers, base, base + n_slots) for layers in (self.k, self.v)]
        return KvBuffer.of(cut[0], cut[1], n_slots, base)


def _cut(layers: Layers, start: int, stop: int) -> Layers:
    if isinstance(layers, list):
        return [layer[:, start:stop] for layer in layers]
    return layers[:, :, start:stop]


class SlabPool:
    """Lends runs of slots, first fit; beyond the slab, buffers of their own."""

    def __init__(self, spec: ModelSpec, n_slots: int, places: Sequence[Place]) -> None:
        self._spec = spec
        self._places = places
        self.slab = KvSlab(spec, n_slots, places)
        self._free: list[tuple[int, int]] = [(0, self.slab.n_slots)]
        """(first slot, slots), ascending; no two touch."""
        self._lock = threading.Lock()
        self.n_outside = 0
        """Buffers that did not fit."""

    @property
    def n_free_slots(self) -> int:
        """Slots that nobody has."""
        return sum(n for _, n in self._free)

    def take(self, n_slots: int) -> KvBuffer:
        """A buffer with room for `n_slots`."""
        wanted = round_up(n_slots, SLOTS_STEP)
        with self._lock:
            for i, (base, n) in enumerate(self._free):
                if n >= wanted:
                    rest = [(base + wanted, n - wanted)] if n > wanted else []
                    self._free[i : i + 1] = rest
                    return self.slab.view(base, wanted)
            self.n_outside += 1
        return KvBuffer(self._spec, wanted, self._places)

    def give_back(self, buffer: KvBuffer) -> None:
        """The owner is done with it; a worker may say so."""
        if buffer.base is None:
            return
        with self._lock:
            self._free.append((buffer.base, buffer.n_slots))
            self._free.sort()
            merged: list[tuple[int, int]] = []
            for base, n in self._free:
                if merged and sum(merged[-1]) == base:
                    merged[-1] = (merged[-1][0], merged[-1][1] + n)
                else:
                    merged.append((base, n))
            self._free = merged
