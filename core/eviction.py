"""`Evictor`: which chunk leaves a full tier. The simulator's index and the store use this one.

`lru` takes the least recently used; `lfu` the least often used; `cost` the one that saves the
least recompute time per byte, by GreedyDual-Size with frequency (Cherkasova, HPL-98-69R1): a
chunk's rank is `floor + uses * saved / bytes`, and the floor rises to the rank of what is evicted,
so that what was popular once does not stay for ever. Ties go to the least recently used.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from .errors import StoreError

EvictionName = Literal["lru", "lfu", "cost"]


@dataclass(slots=True)
class _Use:
    tick: int
    uses: int
    value: float
    priority: float


class Evictor:
    """Uses of the chunks in one tier.

    Raises:
        StoreError: no such policy.
    """

    def __init__(self, name: EvictionName = "lru") -> None:
        if name not in get_args(EvictionName):
            raise StoreError(
                f"eviction must be one of {', '.join(get_args(EvictionName))}",
                values=repr(name),
                remedy="name one of them",
            )
        self.name = name
        self._uses: dict[str, _Use] = {}
        self._tick = 0
        self._floor = 0.0

    def add(self, key: str, n_bytes: int, recompute_flops: float) -> None:
        """A chunk has come, used once; at a fixed rate its flops are seconds."""
        value = recompute_flops / max(1, n_bytes)
        self._uses[key] = _Use(0, 0, value, 0.0)
        self.use(key)

    def use(self, key: str) -> None:
        """A chunk was used; one that is not kept is ignored."""
        use = self._uses.get(key)
        if use is not None:
            self._tick += 1
            use.tick = self._tick
            use.uses += 1
            use.priority = self._floor + use.uses * use.value

    def remove(self, key: str, *, evicted: bool = False) -> None:
        """A chunk has left, of itself or to make room."""
        use = self._uses.pop(key, None)
        if use is not None and evicted:
            self._floor = max(self._floor, use.priority)

    def victim(self, keys: Iterable[str]) -> str | None:
        """The one of `keys` to evict first, None if there is none."""
        known = (key for key in keys if key in self._uses)
        return min(known, key=self._rank, default=None)

    def _rank(self, key: str) -> tuple[float, int]:
        use = self._uses[key]
        if self.name == "lru":
            return 0.0, use.tick
        return (float(use.uses) if self.name == "lfu" else use.priority), use.tick
