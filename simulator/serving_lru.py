"""`Lru`: least recently used first, chunks that are used together as one entry."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from itertools import accumulate

from ..core.errors import InvariantViolation

Sizes = Sequence[int] | dict[int, int]
"""By key."""


class Lru:
    """Least recently used first.

    A log of uses, of which the last of each chunk counts. Chunks that are used together are one
    entry and taken whole, at a third of the cost of an `OrderedDict`.
    """

    __slots__ = ("_at", "_gain", "_log", "_n", "_tick", "_worn", "held")

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
        self._worn: set[int] = set()
        """Uses in the log that are not the last of all their chunks."""
        self.held: dict[int, int] = {}
        """Which use was the last of a chunk."""

    def __len__(self) -> int:
        return len(self.held)

    def add(self, keys: Sequence[int]) -> None:
        """Chunks that are not there have come."""
        if not keys:
            return
        self._tick = tick = self._tick + 1
        self._n += len(keys)
        self._log.append((tick, keys))
        held = self.held
        for key in keys:
            held[key] = tick
        if self._n > 64 + 4 * len(self.held):
            live = self.coldest_first()
            self._log.clear()
            self._worn.clear()
            self._at = self._n = 0
            self.add(live)

    def touch(self, keys: Sequence[int]) -> None:
        """Chunks were used."""
        if len(set(keys)) < len(keys):  # the last time counts
            keys = [*dict.fromkeys(keys[::-1])][::-1]
        self._worn.update(map(self.held.__getitem__, keys))
        self.add(keys)

    def remove(self, key: int) -> None:
        """A chunk has left of itself."""
        self._worn.add(self.held.pop(key))

    def pop(self, excess: int, sizes: Sizes) -> tuple[list[int], int]:
        """Evict; see `Order`."""
        victims, freed = self.pop_some(excess, sizes)
        check_enough(excess, freed)
        return victims, freed

    def pop_some(self, excess: int, sizes: Sizes) -> tuple[list[int], int]:
        """`pop`, or all there is if that is not enough."""
        log, held, worn = self._log, self.held, self._worn
        victims: list[int] = []
        freed = 0
        while freed < excess and log:
            use, entry = log[0]
            stop = self._at + 1 + int((excess - freed) / self._gain)
            keys = entry[self._at : stop]
            if use in worn:
                last = [*map(held.get, keys)]
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
                worn.discard(use)
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


def check_enough(excess: int, freed: int) -> None:
    """That so much was freed.

    Raises:
        InvariantViolation: both sides.
    """
    if freed < excess:
        raise InvariantViolation(f"INV-4 {excess - freed} more to evict than there is")
