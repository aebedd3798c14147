"""`KvBuffer`: K and V of one request, one slot per position. `KvPool` lends them out again."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.model_spec import ModelSpec
from ..core.units import round_up
from .device import Device

_SLOTS_STEP = 512

Layers = Tensor | list[Tensor]
"""`[L, HK, n_slots, D]`, or a list of L `[HK, n_slots, D]`: layers may lie on several devices."""


class KvBuffer:
    """K (rotated) and V of one request, layer by layer; uninitialised until written.

    `base` is the first slot where the buffer is part of a pooled one (kv_slab.py), else None.
    """

    def __init__(
        self, spec: ModelSpec, n_slots: int, places: Sequence[Place] | None = None
    ) -> None:
        self.k, self.v = (empty_layers(spec, n_slots, places) for _ in range(2))
        self.n_slots = n_slots
        self.base: int | None = None

    @classmethod
    def of(cls, k: Layers, v: Layers, n_slots: int, base: int) -> KvBuffer:
        """A buffer over slots that are there."""
        made = cls.__new__(cls)
        made.k, made.v, made.n_slots, made.base = k, v, n_slots, base
        return made


Place = tuple[int, Device]
"""Layers, and the device that holds them."""


def empty_layers(spec: ModelSpec, n_slots: int, places: Sequence[Place] | None) -> Layers:
    """Room for K or V, on the devices of `places`; on the CPU without."""
    shape = (spec.n_kv_heads, n_slots, spec.head_dim)
    dtype = getattr(torch, spec.dtype)
    if places is None:
        return torch.empty((spec.n_layers, *shape), dtype=dtype)
    parts = [where.empty((n, *shape), dtype) for n, where in places]
    return parts[0] if len(parts) == 1 else [layer for part in parts for layer in part.unbind(0)]


class KvPool:
    """Buffers that were given back, for the next request: fresh pages would fault on its path.

    Keeps at most `max_free_slots` slots; the buffers given back first go first.
    """

    def __init__(
        self,
        spec: ModelSpec,
        max_free_slots: int = 1 << 17,
        places: Sequence[Place] | None = None,
    ) -> None:
        self._spec = spec
        self._places = places
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
        return KvBuffer(self._spec, round_up(n_slots, _SLOTS_STEP), self._places)

    def give_back(self, buffer: KvBuffer) -> None:
        """The owner is done with it; a worker may say so."""
        with self._lock:
            self._free.append(buffer)
            while sum(b.n_slots for b in self._free) > self._max_free_slots:
                del self._free[0]
