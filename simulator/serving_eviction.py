"""Order in which chunks leave a tier of the serving simulator: constant or logarithmic time.

The policies are those of `core/eviction.py`, whose victim is found by looking at every chunk; here
a tier holds hundreds of thousands. `belady` evicts what is needed last again: it reads the future
of the trace, and bounds what any policy can reach in a tier that all of it uses. Replicas whose
router does not look at chunks each have a tier that sees a part, which nobody knows beforehand.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from heapq import heappop, heappush
from itertools import accumulate, compress, repeat
from math import inf
from operator import eq
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .serving_lru import Lru, Sizes, check_enough

NEVER = 1 << 60


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
        check_enough(excess, freed)
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


Ranks = Callable[[Sequence[int], Sequence[int] | None, float], list[float]]
"""Ranks of (keys, uses of each or None for one each, floor)."""
_Use = tuple[float, int, int]
"""(rank, which use, key)."""


class _Uses:
    """Uses in columns, none of which is a Python object."""

    __slots__ = ("keys", "ranks", "ticks")

    def __init__(self) -> None:
        self.ranks = array("d")
        self.ticks = array("q")
        self.keys = array("q")

    def __len__(self) -> int:
        return len(self.keys)

    def add(self, ranks: list[float], ticks: Iterable[int], keys: Iterable[int]) -> None:
        """More of them."""
        self.ranks.fromlist(ranks)
        self.ticks.extend(ticks)
        self.keys.extend(keys)

    def at(self, rows: NDArray[np.intp]) -> _Uses:
        """Some of them."""
        found = _Uses()
        for name in self.__slots__:
            getattr(found, name).frombytes(np.asarray(getattr(self, name))[rows].tobytes())
        return found

    def live(self, held: dict[int, int]) -> _Uses:
        """Those that were the last of their chunk."""
        last = np.fromiter(map(held.get, self.keys, repeat(-1)), np.int64, len(self))
        return self.at(np.flatnonzero(last == np.asarray(self.ticks)))

    def coldest_first(self) -> NDArray[np.intp]:
        """Rows by rank, then by use, in which order they are."""
        return np.argsort(np.asarray(self.ranks), kind="stable")


class Ranked:
    """Smallest rank first, ties to the least recently used; ranks change when a chunk is used.

    A heap of all chunks would cost a walk through it per victim. Uses below a limit are sorted once
    and taken from the front; those few that come below it later have a small heap; the others
    wait as they came, until it is their turn. A use that was not the last of its chunk is passed
    over. Ranks that are `steady` (of the key, its uses and the floor alone) are worked out only
    once room has to be made: many tiers never fill.
    """

    __slots__ = ("_at", "_far", "_gain", "_is_ranked", "_late", "_limit", "_near", "_tick",
                 "_uses", "floor", "held", "ranks")  # fmt: skip

    def __init__(self, ranks: Ranks, steady: bool) -> None:
        self.ranks = ranks
        self._is_ranked = not steady
        self.floor = 0.0
        """Rank of what was evicted last, rising only."""
        self.held: dict[int, int] = {}
        """Which use was the last of a chunk."""
        self._uses: dict[int, int] = {}
        """Of chunks that were used since they came, that time included."""
        self._near: tuple[list[float], list[int], list[int]] = [], [], []
        """Ranks, uses, keys; the coldest first."""
        self._at = 0
        """Rows of them that are over."""
        self._late: list[_Use] = []
        self._far = _Uses()
        """In the order of uses."""
        self._limit = -inf
        """Ranks that are smaller are not in `_far`."""
        self._tick = 0
        self._gain = 1.0
        """What a victim freed on average when room was made last."""

    def __len__(self) -> int:
        return len(self.held)

    def add(self, keys: Sequence[int]) -> None:
        """Chunks that are not there have come, each used once."""
        if keys:
            self._use(keys, None)

    def touch(self, keys: Sequence[int]) -> None:
        """Chunks were used."""
        if len(set(keys)) < len(keys):
            for key in keys:
                self.touch((key,))
            return
        uses = [n + 1 for n in map(self._uses.get, keys, repeat(1))]
        self._uses.update(zip(keys, uses, strict=True))
        self._use(keys, uses)

    def _use(self, keys: Sequence[int], uses: Sequence[int] | None) -> None:
        ticks = range(self._tick, self._tick + len(keys))
        self._tick += len(keys)
        self.held.update(zip(keys, ticks, strict=True))
        if not self._is_ranked:
            return
        ranks = self.ranks(keys, uses, self.floor)
        if min(ranks) >= self._limit:
            self._far.add(ranks, ticks, keys)
        else:
            far = []
            for use in zip(ranks, ticks, keys, strict=True):
                if use[0] < self._limit:
                    heappush(self._late, use)
                else:
                    far.append(use)
            if far:
                found, when, which = zip(*far, strict=True)
                self._far.add([*found], when, which)
        if len(self._far) > 64 + 4 * len(self.held):
            self._far = self._far.live(self.held)

    def _rank_all(self) -> None:
        """What has come so far, while the floor was 0."""
        self._is_ranked = True
        uses = sorted(zip(self.held.values(), self.held, strict=True))
        keys = [key for _, key in uses]
        ranks = self.ranks(keys, [*map(self._uses.get, keys, repeat(1))], self.floor)
        self._far.add(ranks, [tick for tick, _ in uses], keys)

    def remove(self, key: int) -> None:
        """A chunk has left of itself."""
        del self.held[key]
        self._uses.pop(key, None)

    def pop(self, excess: int, sizes: Sizes) -> tuple[list[int], int]:
        """Evict; see `Order`."""
        if not self._is_ranked:
            self._rank_all()
        held, late = self.held, self._late
        victims: list[int] = []
        freed, last = 0, self.floor
        while freed < excess:
            at = self._at
            ranks, ticks, keys = self._near
            if late and (at == len(keys) or late[0] < (ranks[at], ticks[at])):
                rank, tick, key = heappop(late)
                if held.get(key) == tick:
                    last = rank
                    freed += sizes[key]
                    victims.append(key)
            elif at < len(keys):
                stop = min(len(keys), at + 1 + int((excess - freed) / self._gain))
                if late:
                    stop = max(at + 1, bisect_left(ranks, late[0][0], at, stop))
                found, gain, row = self._take(excess - freed, sizes, stop)
                if found:
                    last = ranks[row]
                    freed += gain
                    victims += found
            else:
                self._come_near()
                if not self._near[2]:
                    check_enough(excess, freed)
        self.floor = max(self.floor, last)
        self._gain = max(1.0, freed / max(1, len(victims)))
        deque(map(held.__delitem__, victims), 0)
        deque(map(self._uses.pop, victims, repeat(None)), 0)
        return victims, freed

    def _take(self, excess: int, sizes: Sizes, stop: int) -> tuple[list[int], int, int]:
        """Victims from the front, none at `stop` or behind; what they free; row of the last."""
        at = self._at
        _, ticks, keys = self._near
        found, when = keys[at:stop], ticks[at:stop]
        rows: Sequence[int] = range(at, stop)
        last = [*map(self.held.get, found)]
        if last != when:
            alive = [*map(eq, last, when)]
            found, rows = [*compress(found, alive)], [*compress(rows, alive)]
        self._at = stop
        if not found:
            return found, 0, at
        got = [*map(sizes.__getitem__, found)]
        gain = sum(got)
        if gain - got[-1] >= excess:
            ends = [*accumulate(got)]
            n = bisect_left(ends, excess) + 1
            found, gain = found[:n], ends[n - 1]
            self._at = rows[n - 1] + 1
        return found, gain, rows[len(found) - 1]

    def _come_near(self) -> None:
        """The coldest of the others: so few that the limit stays low, and few uses are late."""
        far = self._far
        if len(far) > 2 * len(self.held):
            far = far.live(self.held)
        order = far.coldest_first()
        n = 1 + len(far) // 8
        near = far.at(order[:n])
        self._near = near.ranks.tolist(), near.ticks.tolist(), near.keys.tolist()
        self._at = 0
        self._limit = far.ranks[order[n]] if n < len(far) else inf
        self._far = far.at(np.sort(order[n:]))

    def coldest_first(self) -> list[int]:
        """All keys, next victim first."""
        if not self._is_ranked:
            self._rank_all()
        ranks, ticks, keys = self._near
        late = [use for use in self._late if self.held.get(use[2]) == use[1]]
        near = _Uses()
        near.add(ranks[self._at :], ticks[self._at :], keys[self._at :])
        near.add([use[0] for use in late], (use[1] for use in late), (use[2] for use in late))
        far = self._far.live(self.held)
        near = near.live(self.held)
        all_ranks, all_ticks, all_keys = (
            np.concatenate([getattr(near, name), getattr(far, name)])
            for name in ("ranks", "ticks", "keys")
        )
        found: list[int] = all_keys[np.lexsort((all_ticks, all_ranks))].tolist()
        return found


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

        def worth(keys: Sequence[int], uses: Sequence[int] | None, floor: float) -> list[float]:
            if uses is None:
                return [floor + v for v in values(keys)]
            return [floor + n * v for n, v in zip(uses, values(keys), strict=True)]

        return Ranked(worth, steady=True)
    return Ranked(lambda keys, *_: [-float(next_use(key)) for key in keys], steady=False)
