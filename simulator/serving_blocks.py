"""`KvBlocks`: KV memory of one engine in extents, with prefix caching, as vLLM's block pool.

Blocks of a chunk live and die together, so that a long prompt costs a few steps, not one per
block. A freed extent keeps its content and queues; the oldest is taken first, a request's last
blocks before its first ones. With chunks of one block this is vLLM's order exactly.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import repeat

from ..core.errors import InvariantViolation
from .serving_lru import Lru

ENDLESS = 1 << 60


class KvBlocks:
    """Extents by key: a chunk's is not negative, others get a fresh negative one."""

    __slots__ = ("fresh", "idle", "n_blocks", "n_free", "next_key", "size_of", "users")

    def __init__(self, n_blocks: int | None) -> None:
        self.n_blocks = ENDLESS if n_blocks is None else n_blocks
        self.n_free = self.n_blocks
        """Blocks that may be taken: never used, or of a queued extent."""
        self.fresh = self.n_blocks
        """Blocks of no extent: taken first."""
        self.users: dict[int, int] = {}
        """Requests that hold a named extent, where they are several."""
        self.size_of: dict[int, int] = {}
        """Blocks of every extent that is named or queues: a chunk that is here is cached."""
        self.idle = Lru()
        self.next_key = -1

    def take(self, n: int) -> None:
        """Take `n` blocks, which the caller has checked to be free."""
        self.n_free -= n
        if n <= self.fresh:
            self.fresh -= n
            return
        n -= self.fresh
        self.fresh = 0
        sizes = self.size_of
        victims, freed = self.idle.pop(n, sizes)
        deque(map(sizes.pop, victims), 0)
        if freed > n:  # a chunk's extent has lost its name; one without may still be reclaimed
            last = victims[-1]
            if last < 0:
                sizes[last] = freed - n
                self.idle.put_first(last)
            else:
                self.fresh = freed - n

    def new_key(self) -> int:
        """A key for an extent without a name."""
        self.next_key -= 1
        return self.next_key

    def prefix(self, keys: Sequence[int]) -> int:
        """How many of the first `keys` are cached."""
        cached = self.size_of
        n = 0
        for key in keys:
            if key not in cached:
                break
            n += 1
        return n

    def n_idle(self, keys: Sequence[int]) -> int:
        """Blocks of cached `keys` that count as free, as nobody uses them."""
        queued, sizes = self.idle.held, self.size_of
        return sum([sizes[key] for key in keys if key in queued])

    def touch(self, keys: Sequence[int]) -> None:
        """One more user of each cached extent."""
        for key in keys:
            if key in self.idle.held:
                self.idle.remove(key)
                self.n_free -= self.size_of[key]
            else:
                self.users[key] = self.users.get(key, 1) + 1

    def name(self, keys: list[int], sizes: Sequence[int]) -> list[int]:
        """Name blocks that one request holds; the keys it holds them by.

        Where another extent has the name already, they get one that nobody looks for.
        """
        cached = self.size_of
        fresh = dict(zip(keys, sizes, strict=True))
        if len(fresh) < len(keys) or not cached.keys().isdisjoint(keys):
            fresh = {}
            for key, n in zip(keys, sizes, strict=True):
                fresh[self.new_key() if key in cached or key in fresh else key] = n
            keys = [*fresh]
        cached.update(fresh)
        return keys

    def give_back(self, keys: Sequence[int], n_private: int, private_key: int) -> None:
        """A request leaves `keys`, in the order of its prompt, and its own blocks behind them."""
        sizes, users = self.size_of, self.users
        if n_private:
            sizes[private_key] = n_private
            self.idle.add((private_key,))
            self.n_free += n_private
        gone = keys[::-1]
        if users and not users.keys().isdisjoint(gone):
            others = [*map(users.get, gone, repeat(1))]
            for key, n in zip(gone, others, strict=True):
                if n > 2:
                    users[key] = n - 1
                elif n == 2:
                    del users[key]
            gone = [key for key, n in zip(gone, others, strict=True) if n == 1]
        self.idle.add(gone)
        self.n_free += sum(map(sizes.__getitem__, gone))

    def reclaim(self, private_key: int, n_most: int) -> int:
        """Take up to `n_most` of what is left of a queued extent; how many there were."""
        left = self.size_of.get(private_key, 0)
        got = min(left, n_most)
        if got:
            self.n_free -= got
            if got < left:
                self.size_of[private_key] = left - got
            else:
                del self.size_of[private_key]
                self.idle.remove(private_key)
        return got

    def check(self) -> None:
        """Nobody holds a block any more, and all of them are free (INV-4).

        Raises:
            InvariantViolation: both sides.
        """
        queued = sum(map(self.size_of.__getitem__, self.idle.held))
        if self.n_free != self.n_blocks or self.fresh + queued != self.n_free:
            raise InvariantViolation(
                f"INV-4 blocks: {self.n_free} free, {self.fresh} fresh + {queued} queued, "
                f"of {self.n_blocks}"
            )
