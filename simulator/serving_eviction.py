"""Order in which chunks leave a tier of the serving simulator: constant or logarithmic time.

The policies are those of `core/eviction.py`, whose victim is found by looking at every chunk; here
a tier holds hundreds of thousands. `belady` evicts what is needed last again: it reads the future
of the trace, and bounds what any policy can reach.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Collection, Sequence
from heapq import heapify, heappop, heappush
from itertools import accumulate, islice
from typing import Any, Protocol

from ..core.errors import InvariantViolation

NEVER = 1 << 60
BATCH = 16
"""Chunks that are looked at together when room is made."""

Sizes = Sequence[int] | dict[int, int]
"""By key."""


class Order(Protocol):
    """Chunks of one tier by key; whatever is given as several keys is taken in that order."""

    held: dict[int, Any]
    """Has every key that is there."""

    def __len__(self) -> int: ...
    def add(self, keys: Collection[int]) -> None: ...
    def touch(self, keys: Collection[int]) -> None: ...
    def remove(self, key: int) -> None: ...
    def pop(self, excess: int, sizes: Sizes) -> tuple[list[int], int]:
        """Evict chunks of `excess` in all, or just above: which, and what they add up to."""
        ...

    def coldest_first(self) -> list[int]: ...


class Lru:
    """Least recently used first.

    A log of uses, of which the last of each chunk counts. Many chunks come and go at a time: a list
    and a dict take them whole, at half the cost of an `OrderedDict`.
    """

    __slots__ = ("_base", "_head", "_log", "held")

    def __init__(self) -> None:
        self._log: list[int] = []
        self._head = 0
        """All before it in the log is over."""
        self._base = 0
        """Uses before those of the log."""
        self.held: dict[int, int] = {}
        """Which use was the last of a chunk."""

    def __len__(self) -> int:
        return len(self.held)

    def add(self, keys: Collection[int]) -> None:
        """Chunks that are not there have come."""
        log = self._log
        n = self._base + len(log)
        log.extend(keys)
        self.held.update(zip(keys, range(n, n + len(keys)), strict=True))
        if len(log) > 64 + 4 * len(self.held):
            self._shorten()

    touch = add

    def remove(self, key: int) -> None:
        """A chunk has left of itself."""
        del self.held[key]

    def pop(self, excess: int, sizes: Sizes) -> tuple[list[int], int]:
        """Evict; see `Order`."""
        victims, freed = self.pop_some(excess, sizes)
        _check_enough(excess, freed)
        return victims, freed

    def pop_some(self, excess: int, sizes: Sizes) -> tuple[list[int], int]:
        """`pop`, or all there is if that is not enough."""
        log, held, head, base = self._log, self.held, self._head, self._base
        victims: list[int] = []
        freed, n = 0, 1
        while freed < excess:
            keys = log[head : head + n]
            if not keys:
                break
            uses = list(range(base + head, base + head + len(keys)))
            head += len(keys)
            n = BATCH
            last = list(map(held.get, keys))
            if last != uses:
                live = [
                    (k, use) for k, use, mine in zip(keys, uses, last, strict=True) if use == mine
                ]
                if not live:
                    continue
                keys, uses = map(list, zip(*live, strict=True))
            ends = list(accumulate(map(sizes.__getitem__, keys)))
            n_needed = bisect_left(ends, excess - freed) + 1
            if n_needed < len(keys):
                head = uses[n_needed] - base
                del keys[n_needed:], ends[n_needed:]
            deque(map(held.__delitem__, keys), 0)
            freed += ends[-1]
            victims += keys
        self._head = head
        return victims, freed

    def put_first(self, key: int) -> None:
        """A chunk comes in the place of the last victim."""
        self._head -= 1
        self._log[self._head] = key
        self.held[key] = self._base + self._head

    def coldest_first(self) -> list[int]:
        """All keys, next victim first."""
        uses = enumerate(islice(self._log, self._head, None), self._base + self._head)
        return [key for use, key in uses if self.held.get(key) == use]

    def _shorten(self) -> None:
        if self._head > len(self._log) // 2:
            self._base += self._head
            del self._log[: self._head]
        else:
            self._log = self.coldest_first()
            self._base = 0
            self.held.update(zip(self._log, range(len(self._log)), strict=True))
        self._head = 0


class Lfu:
    """Least often used first, ties to the least recently used: an `Lru` for each number of uses."""

    __slots__ = ("_by_uses", "held")

    def __init__(self) -> None:
        self.held: dict[int, int] = {}
        """Uses of a chunk since it came, that one included."""
        self._by_uses: dict[int, Lru] = {}

    def __len__(self) -> int:
        return len(self.held)

    def add(self, keys: Collection[int]) -> None:
        """Chunks that are not there have come, each used once."""
        self.held.update(dict.fromkeys(keys, 1))
        self._used(1).add(keys)

    def touch(self, keys: Collection[int]) -> None:
        """Chunks were used."""
        for key in keys:
            uses = self.held[key]
            self._by_uses[uses].remove(key)
            self.held[key] = uses + 1
            self._used(uses + 1).add((key,))

    def remove(self, key: int) -> None:
        """A chunk has left of itself."""
        self._by_uses[self.held.pop(key)].remove(key)

    def pop(self, excess: int, sizes: Sizes) -> tuple[list[int], int]:
        """Evict; see `Order`."""
        victims: list[int] = []
        freed = 0
        for uses in sorted(self._by_uses):
            keys, n = self._by_uses[uses].pop_some(excess - freed, sizes)
            victims += keys
            freed += n
            if freed >= excess:
                break
            del self._by_uses[uses]
        _check_enough(excess, freed)
        deque(map(self.held.__delitem__, victims), 0)
        return victims, freed

    def coldest_first(self) -> list[int]:
        """All keys, next victim first."""
        return [k for uses in sorted(self._by_uses) for k in self._by_uses[uses].coldest_first()]

    def _used(self, uses: int) -> Lru:
        found = self._by_uses.get(uses)
        if found is None:
            found = self._by_uses[uses] = Lru()
        return found


class Ranked:
    """Smallest rank first, ties to the least recently used; ranks change when a chunk is used."""

    __slots__ = ("_heap", "_tick", "_uses", "floor", "held", "rank")

    def __init__(self, rank: Callable[[int, int, float], float]) -> None:
        self.rank = rank
        """Of (key, uses, floor)."""
        self.floor = 0.0
        """Rank of what was evicted last, rising only."""
        self.held: dict[int, tuple[float, int]] = {}
        """(rank, time of the last use)."""
        self._uses: dict[int, int] = {}
        self._heap: list[tuple[float, int, int]] = []
        self._tick = 0

    def __len__(self) -> int:
        return len(self.held)

    def add(self, keys: Collection[int]) -> None:
        """Chunks that are not there have come, each used once."""
        for key in keys:
            self._uses[key] = 0
        self.touch(keys)

    def touch(self, keys: Collection[int]) -> None:
        """Chunks were used."""
        held, uses_of, heap, rank_of, floor = (
            self.held, self._uses, self._heap, self.rank, self.floor
        )  # fmt: skip
        tick = self._tick
        for key in keys:
            tick += 1
            uses = uses_of[key] = uses_of[key] + 1
            rank = rank_of(key, uses, floor)
            held[key] = rank, tick
            heappush(heap, (rank, tick, key))
        self._tick = tick
        if len(self._heap) > 64 + 4 * len(self.held):
            self._heap = [(r, t, k) for k, (r, t) in self.held.items()]
            heapify(self._heap)

    def remove(self, key: int) -> None:
        """A chunk has left of itself."""
        del self.held[key], self._uses[key]

    def pop(self, excess: int, sizes: Sizes) -> tuple[list[int], int]:
        """Evict; see `Order`."""
        victims = []
        freed = 0
        while freed < excess:
            rank, tick, key = heappop(self._heap)
            if self.held.get(key) == (rank, tick):
                self.floor = max(self.floor, rank)
                self.remove(key)
                freed += sizes[key]
                victims.append(key)
        return victims, freed

    def coldest_first(self) -> list[int]:
        """All keys, next victim first."""
        return sorted(self.held, key=self.held.__getitem__)


def _check_enough(excess: int, freed: int) -> None:
    if freed < excess:
        raise InvariantViolation(f"INV-4 {excess - freed} more to evict than there is")


def order_of(name: str, value: Callable[[int], float], next_use: Callable[[int], int]) -> Order:
    """The order called `name`.

    Args:
        value: seconds of recompute that a chunk saves per byte (`cost`).
        next_use: row that asks for a chunk next, `NEVER` if none does (`belady`).
    """
    if name == "lru":
        return Lru()
    if name == "lfu":
        return Lfu()
    if name == "cost":
        return Ranked(lambda key, uses, floor: floor + uses * value(key))
    return Ranked(lambda key, uses, floor: -float(next_use(key)))
