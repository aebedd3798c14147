"""Order in which chunks leave a tier of the serving simulator: constant or logarithmic time.

The policies are those of `core/eviction.py`, whose victim is found by looking at every chunk; here
a tier holds hundreds of thousands. `belady` evicts what is needed last again: it reads the future
of the trace, and bounds what any policy can reach.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush
from typing import Protocol

NEVER = 1 << 60


class Order(Protocol):
    """Chunks of one tier by key."""

    def __contains__(self, key: int) -> bool: ...
    def __len__(self) -> int: ...
    def add(self, keys: Iterable[int]) -> None: ...
    def touch(self, key: int) -> None: ...
    def remove(self, key: int) -> None: ...
    def pop(self) -> int: ...
    def coldest_first(self) -> list[int]: ...


class Lru:
    """Least recently used first."""

    __slots__ = ("_chunks", "remove", "touch")

    def __init__(self) -> None:
        self._chunks: OrderedDict[int, None] = OrderedDict()
        self.touch = self._chunks.move_to_end
        self.remove = self._chunks.__delitem__

    def __contains__(self, key: int) -> bool:
        return key in self._chunks

    def __len__(self) -> int:
        return len(self._chunks)

    def add(self, keys: Iterable[int]) -> None:
        """Chunks that are not there have come, in this order."""
        self._chunks.update(dict.fromkeys(keys))

    def pop(self) -> int:
        """Evict."""
        return self._chunks.popitem(last=False)[0]

    def coldest_first(self) -> list[int]:
        """All keys, next victim first."""
        return list(self._chunks)


class Ranked:
    """Smallest rank first, ties to the least recently used; ranks change when a chunk is used."""

    __slots__ = ("_heap", "_rank_of", "_tick", "_uses", "floor", "rank")

    def __init__(self, rank: Callable[[int, int, float], float]) -> None:
        self.rank = rank
        """Of (key, uses, floor)."""
        self.floor = 0.0
        """Rank of what was evicted last, rising only."""
        self._rank_of: dict[int, tuple[float, int]] = {}
        self._uses: dict[int, int] = {}
        self._heap: list[tuple[float, int, int]] = []
        self._tick = 0

    def __contains__(self, key: int) -> bool:
        return key in self._rank_of

    def __len__(self) -> int:
        return len(self._rank_of)

    def add(self, keys: Iterable[int]) -> None:
        """Chunks that are not there have come, in this order, each used once."""
        for key in keys:
            self._uses[key] = 0
            self.touch(key)

    def touch(self, key: int) -> None:
        """A chunk was used."""
        self._tick += 1
        uses = self._uses[key] = self._uses[key] + 1
        rank = self.rank(key, uses, self.floor)
        self._rank_of[key] = rank, self._tick
        heappush(self._heap, (rank, self._tick, key))
        if len(self._heap) > 64 + 4 * len(self._rank_of):
            self._heap = [(r, t, k) for k, (r, t) in self._rank_of.items()]
            heapify(self._heap)

    def remove(self, key: int) -> None:
        """A chunk has left of itself."""
        del self._rank_of[key], self._uses[key]

    def pop(self) -> int:
        """Evict."""
        while True:
            rank, tick, key = heappop(self._heap)
            if self._rank_of.get(key) == (rank, tick):
                self.floor = max(self.floor, rank)
                self.remove(key)
                return key

    def coldest_first(self) -> list[int]:
        """All keys, next victim first."""
        return sorted(self._rank_of, key=self._rank_of.__getitem__)


def order_of(name: str, value: Callable[[int], float], next_use: Callable[[int], int]) -> Order:
    """The order called `name`.

    Args:
        value: seconds of recompute that a chunk saves per byte (`cost`).
        next_use: row that asks for a chunk next, `NEVER` if none does (`belady`).
    """
    if name == "lru":
        return Lru()
    if name == "lfu":
        return Ranked(lambda key, uses, floor: float(uses))
    if name == "cost":
        return Ranked(lambda key, uses, floor: floor + uses * value(key))
    return Ranked(lambda key, uses, floor: -float(next_use(key)))
