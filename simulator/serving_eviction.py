"""Order in which chunks leave a tier of the serving simulator: constant or logarithmic time.

The policies are those of `core/eviction.py`, whose victim is found by looking at every chunk; here
a tier holds hundreds of thousands. `belady` evicts what is needed last again: it reads the future
of the trace, and bounds what any policy can reach.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from itertools import accumulate, repeat
from math import inf
from typing import Any, Protocol

from ..core.errors import InvariantViolation

NEVER = 1 << 60
Sizes = Sequence[int] | dict[int, int]
"""By key."""


class Order(Protocol):
    """Chunks of one tier by key; whatever is given as several keys is taken in that order."""

    held: dict[int, Any]
    """Has every key that is there."""

    def __len__(self) -> int: ...
    def add(self, keys: Sequence[int]) -> None: ...
    def touch(self, keys: Sequence[int]) -> None: ...
    def remove(self, key: int) -> None: ...
    def pop(self, excess: int, sizes: Sizes) -> tuple[list[int], int]:
        """Evict chunks of `excess` in all, or just above: which, and what they add up to."""
        ...

    def coldest_first(self) -> list[int]: ...


class Lru:
    """Least recently used first.

    A log of uses, of which the last of each chunk counts. Chunks that are used together are one
    entry and taken whole, at a third of the cost of an `OrderedDict`.
    """

    __slots__ = ("_at", "_gain", "_log", "_n", "_tick", "held")

    def __init__(self) -> None:
        self._log: deque[tuple[int, Sequence[int]]] = deque()
        """(use, keys), the oldest first."""
        self._at = 0
        """Keys of the first entry that are over."""
        self._n = 0
        """Keys in the log."""
        self._tick = 0
        self._gain = 1.0
        """What a victim freed on average when room was made last."""
        self.held: dict[int, int] = {}
        """Which use was the last of a chunk."""

    def __len__(self) -> int:
        return len(self.held)

    def add(self, keys: Sequence[int]) -> None:
        """Chunks that are not there have come."""
        if not keys:
            return
        self._tick += 1
        self._n += len(keys)
        self._log.append((self._tick, keys))
        self.held.update(dict.fromkeys(keys, self._tick))
        if self._n > 64 + 4 * len(self.held):
            live = self.coldest_first()
            self._log.clear()
            self._at = self._n = 0
            self.add(live)

    def touch(self, keys: Sequence[int]) -> None:
        """Chunks were used."""
        if len(set(keys)) < len(keys):  # the last time counts
            keys = [*dict.fromkeys(keys[::-1])][::-1]
        self.add(keys)

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
        log, held = self._log, self.held
        victims: list[int] = []
        freed = 0
        while freed < excess and log:
            use, entry = log[0]
            stop = self._at + 1 + int((excess - freed) / self._gain)
            keys = entry[self._at : stop]
            last = [*map(held.get, keys)]
            if last.count(use) < len(last):
                keys = [key for key, mine in zip(keys, last, strict=True) if mine == use]
            got = [*map(sizes.__getitem__, keys)]
            gain = sum(got)
            if got and freed + gain - got[-1] >= excess:
                ends = [*accumulate(got)]
                n = bisect_left(ends, excess - freed) + 1
                keys, gain = keys[:n], ends[n - 1]
                stop = entry.index(keys[-1], self._at) + 1
            self._at = stop
            if stop >= len(entry):
                self._n -= len(entry)
                self._at = 0
                log.popleft()
            deque(map(held.__delitem__, keys), 0)
            freed += gain
            victims += keys
        self._gain = max(1.0, freed / max(1, len(victims)))
        return victims, freed

    def put_first(self, key: int) -> None:
        """A chunk comes in the place of the last victim."""
        if self._at:
            use, entry = self._log.popleft()
            self._log.appendleft((use, entry[self._at :]))
            self._n -= self._at
            self._at = 0
        self._tick += 1
        self._n += 1
        self._log.appendleft((self._tick, (key,)))
        self.held[key] = self._tick

    def coldest_first(self) -> list[int]:
        """All keys, next victim first."""
        held = self.held
        found: list[int] = []
        for use, keys in self._log:
            last = [*map(held.get, keys)]
            if last.count(use) == len(last):
                found += keys
            else:
                found += [key for key, mine in zip(keys, last, strict=True) if mine == use]
        return found


class Lfu:
    """Least often used first, ties to the least recently used: an `Lru` for each number of uses."""

    __slots__ = ("_by_uses", "held")

    def __init__(self) -> None:
        self.held: dict[int, int] = {}
        """Uses of a chunk since it came, that one included."""
        self._by_uses: dict[int, Lru] = {}

    def __len__(self) -> int:
        return len(self.held)

    def add(self, keys: Sequence[int]) -> None:
        """Chunks that are not there have come, each used once."""
        self.held.update(dict.fromkeys(keys, 1))
        self._used(1).add(keys)

    def touch(self, keys: Sequence[int]) -> None:
        """Chunks were used."""
        if len(set(keys)) < len(keys):
            for key in keys:
                self.touch((key,))
            return
        by_uses: dict[int, list[int]] = {}
        for key, uses in zip(keys, map(self.held.__getitem__, keys), strict=True):
            by_uses.setdefault(uses, []).append(key)
        for uses, same in by_uses.items():
            deque(map(self._by_uses[uses].remove, same), 0)
            self.held.update(dict.fromkeys(same, uses + 1))
            self._used(uses + 1).add(same)

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


Ranks = Callable[[Sequence[int], Sequence[int], float], list[float]]
"""Ranks of (keys, uses of each, floor)."""
_Use = tuple[float, int, int]
"""(rank, which use, key)."""


class Ranked:
    """Smallest rank first, ties to the least recently used; ranks change when a chunk is used.

    A heap of all chunks would cost a walk through it per victim. Uses below a limit are sorted once
    and taken from the end of a list; those that come below it later have a small heap; the others
    wait in no order, until it is their turn. A use that was not the last of its chunk is passed
    over.
    """

    __slots__ = ("_far", "_late", "_limit", "_near", "_tick", "_uses", "floor", "held", "ranks")

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.floor = 0.0
        """Rank of what was evicted last, rising only."""
        self.held: dict[int, int] = {}
        """Which use was the last of a chunk."""
        self._uses: dict[int, int] = {}
        """Of chunks that were used since they came, that time included."""
        self._near: list[_Use] = []
        """Coldest last."""
        self._late: list[_Use] = []
        self._far: list[_Use] = []
        self._limit = -inf
        """Ranks that are smaller are not in `_far`."""
        self._tick = 0

    def __len__(self) -> int:
        return len(self.held)

    def add(self, keys: Sequence[int]) -> None:
        """Chunks that are not there have come, each used once."""
        if keys:
            self._use(keys, [1] * len(keys))

    def touch(self, keys: Sequence[int]) -> None:
        """Chunks were used."""
        if len(set(keys)) < len(keys):
            for key in keys:
                self.touch((key,))
            return
        uses = [self._uses.get(key, 1) + 1 for key in keys]
        self._uses.update(zip(keys, uses, strict=True))
        self._use(keys, uses)

    def _use(self, keys: Sequence[int], uses: Sequence[int]) -> None:
        ticks = range(self._tick, self._tick + len(keys))
        self._tick += len(keys)
        self.held.update(zip(keys, ticks, strict=True))
        ranks = self.ranks(keys, uses, self.floor)
        found = zip(ranks, ticks, keys, strict=True)
        if min(ranks) >= self._limit:
            self._far += found
        else:
            for use in found:
                if use[0] < self._limit:
                    heappush(self._late, use)
                else:
                    self._far.append(use)
        if len(self._far) > 64 + 4 * len(self.held):
            self._far = self._live(self._far)

    def _live(self, uses: list[_Use]) -> list[_Use]:
        held = self.held
        return [use for use in uses if held.get(use[2]) == use[1]]

    def remove(self, key: int) -> None:
        """A chunk has left of itself."""
        del self.held[key]
        self._uses.pop(key, None)

    def pop(self, excess: int, sizes: Sizes) -> tuple[list[int], int]:
        """Evict; see `Order`."""
        held, near, late = self.held, self._near, self._late
        victims: list[int] = []
        freed, last = 0, self.floor
        while freed < excess:
            if late and (not near or late[0] < near[-1]):
                rank, tick, key = heappop(late)
            elif near:
                rank, tick, key = near.pop()
            else:
                self._come_near()
                near = self._near
                if not near:
                    _check_enough(excess, freed)
                continue
            if held.get(key) == tick:
                last = rank
                freed += sizes[key]
                victims.append(key)
        self.floor = max(self.floor, last)
        deque(map(held.__delitem__, victims), 0)
        deque(map(self._uses.pop, victims, repeat(None)), 0)
        return victims, freed

    def _come_near(self) -> None:
        """The coldest half of the others."""
        far = self._far
        if len(far) > 2 * len(self.held):
            far = self._live(far)
        far.sort()
        n = 1 + len(far) // 2
        self._near, self._far = far[:n][::-1], far[n:]
        self._limit = far[n][0] if n < len(far) else inf

    def coldest_first(self) -> list[int]:
        """All keys, next victim first."""
        live = self._live([*self._near, *self._late, *self._far])
        return [key for _, _, key in sorted(live)]


def _check_enough(excess: int, freed: int) -> None:
    if freed < excess:
        raise InvariantViolation(f"INV-4 {excess - freed} more to evict than there is")


def order_of(
    name: str,
    values: Callable[[Sequence[int]], Sequence[float]],
    next_use: Callable[[int], int],
) -> Order:
    """The order called `name`.

    Args:
        values: seconds of recompute that each chunk saves per byte (`cost`).
        next_use: row that asks for a chunk next, `NEVER` if none does (`belady`).
    """
    if name == "lru":
        return Lru()
    if name == "lfu":
        return Lfu()
    if name == "cost":  # GreedyDual-Size with frequency
        return Ranked(
            lambda keys, uses, floor: [
                floor + n * v for n, v in zip(uses, values(keys), strict=True)
            ]
        )
    return Ranked(lambda keys, uses, floor: [-float(next_use(key)) for key in keys])
