"""`KvBuffer`: K and V of one request, one slot per position. `KvPool` lends them out again."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from ..core.model_spec import ModelSpec
from ..core.units import round_up

_SLOTS_STEP = 512


class KvBuffer:
    """`k` and `v` are `[L, HK, n_slots, D]`; K is rotated. Uninitialised until written."""

    def __init__(self, spec: ModelSpec, n_slots: int) -> None:
        shape = (spec.n_layers, spec.n_kv_heads, n_slots, spec.head_dim)
        dtype = getattr(torch, spec.dtype)
        self.k: Tensor = torch.empty(shape, dtype=dtype)
        self.v: Tensor = torch.empty(shape, dtype=dtype)
        self.n_slots = n_slots


class KvPool:
    """Buffers that were given back, for the next request: fresh pages would fault on its path.

    Keeps at most `max_free_slots` slots; the buffers given back first go first.
    """

    def __init__(self, spec: ModelSpec, max_free_slots: int = 1 << 17) -> None:
        self._spec = spec
        self._max_free_slots = max_free_slots
        self._free: list[KvBuffer] = []
        self._lock = threading.Lock()

    def take(self, n_slots: int) -> KvBuffer:
        """The smallest free buffer with room, or a new one."""
        with self._lock:
            fits = [b for b in self._free if b.n_slots >= n_slots]
            if fits:
                best = min(fits, key=lambda b: b.n_slots)
                self._free.remove(best)
                return best
        return KvBuffer(self._spec, round_up(n_slots, _SLOTS_STEP))

    def give_back(self, buffer: KvBuffer) -> None:
        """The owner is done with it; a worker may say so."""
        with self._lock:
            self._free.append(buffer)
            while sum(b.n_slots for b in self._free) > self._max_free_slots:
                del self._free[0]
