"""Tiers of the serving simulator: contents, eviction downwards, writes that take time.

A replica's own tiers are exclusive: a chunk lies in one of them. What is loaded from a lower one
moves to the first (its bytes pass host memory anyway); what a tier evicts is written to the next.
A shared tier gets a copy of every new chunk. A chunk larger than a tier is not kept there. Writes
queue in order at the tier's write rate, beside its reads; a chunk can be read once its write is
done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from itertools import combinations

from ..core.errors import InvariantViolation
from ..core.units import NS_PER_S
from .serving_eviction import Order
from .serving_fleet import TierSpec
from .serving_links import Link


class TierState:
    """One tier, of one replica or of all."""

    __slots__ = ("capacity", "dropped_bytes", "link", "n_evicted", "order", "read_bytes",
                 "spec", "used", "write_buffer_ns", "write_free_ns", "write_ns_per_byte",
                 "writes", "written_bytes")  # fmt: skip

    def __init__(self, spec: TierSpec, order: Order) -> None:
        self.spec = spec
        self.order = order
        self.link = Link()
        self.capacity = spec.capacity_bytes if spec.capacity_bytes is not None else 1 << 62
        self.used = 0
        self.writes: deque[tuple[int, Sequence[int], int]] = deque()
        """(when done, keys, bytes), in order."""
        self.write_free_ns = 0
        self.write_ns_per_byte = NS_PER_S / spec.write_bytes_per_s
        buffer = spec.write_buffer_bytes
        self.write_buffer_ns = 1 << 62 if buffer is None else round(buffer * self.write_ns_per_byte)
        self.read_bytes = self.written_bytes = self.dropped_bytes = self.n_evicted = 0

    def write(self, keys: Sequence[int], n_bytes: int, now_ns: int) -> None:
        """Queue a write; dropped if what waits would not fit into the buffer."""
        start = max(now_ns, self.write_free_ns)
        took = n_bytes * self.write_ns_per_byte
        if start - now_ns + took > self.write_buffer_ns:
            self.dropped_bytes += n_bytes
            return
        self.write_free_ns = start + round(took)
        self.written_bytes += n_bytes
        self.writes.append((self.write_free_ns, keys, n_bytes))

    def take(self, keys: Iterable[int], bytes_of: Sequence[int]) -> None:
        """Chunks leave for another tier."""
        for key in keys:
            self.order.remove(key)
            self.used -= bytes_of[key]

    def check(self, bytes_of: Sequence[int]) -> None:
        """Used bytes are those of the chunks that are there, and fit (INV-4).

        Raises:
            InvariantViolation: both sides.
        """
        held = sum(map(bytes_of.__getitem__, self.order.held))
        if held != self.used or held > self.capacity:
            raise InvariantViolation(
                f"INV-4 tier {self.spec.name}: {self.used} used, chunks of {held} bytes, "
                f"capacity {self.capacity}"
            )


class ChunkTiers:
    """The tiers that one replica sees, fastest first; the shared ones are last."""

    def __init__(
        self,
        own: Sequence[TierState],
        shared: Sequence[TierState],
        bytes_of: Sequence[int],
        largest_bytes: int,
    ) -> None:
        self.own = list(own)
        self.tiers = [*own, *shared]
        self.bytes_of = bytes_of
        self.largest_bytes = largest_bytes
        held = [tier.order.held.keys() for tier in self.tiers]
        lower = range(1, len(own))
        self._rivals = [held[: len(own)] if i in lower else [held[i]] for i in range(len(held))]
        """By tier: what may hold a chunk already that is written to it."""

    def settle(self, now_ns: int) -> None:
        """Writes that are done become readable."""
        for i, tier in enumerate(self.tiers):
            writes = tier.writes
            while writes and writes[0][0] <= now_ns:
                done_ns, keys, n_bytes = writes.popleft()
                self._insert(i, keys, n_bytes, done_ns)

    def find(self, keys: Sequence[int]) -> list[int]:
        """The tier each chunk is best read from, -1 for none."""
        found = [-1] * len(keys)
        for i, tier in enumerate(self.tiers):
            held = tier.order.held
            if not held.keys().isdisjoint(keys):
                found = [
                    i if at < 0 and key in held else at for at, key in zip(found, keys, strict=True)
                ]
                if -1 not in found:
                    break
        return found

    def use(self, keys: Sequence[int], found: Sequence[int], now_ns: int) -> None:
        """Chunks are loaded from where `find` saw them: used now, and moved up."""
        n_own = len(self.own)
        for i in set(found):
            if i == 0 or i >= n_own:
                used = [k for k, at in zip(keys, found, strict=True) if at == i]
                self.tiers[i].order.touch(used)
        if n_own:
            rising = [*dict.fromkeys([k for k, at in zip(keys, found, strict=True) if at > 0])]
            if rising:
                n_bytes = sum(map(self.bytes_of.__getitem__, rising))
                self._insert(0, rising, n_bytes, now_ns)

    def add_new(self, keys: list[int], now_ns: int, unloaded: Collection[int] = ()) -> None:
        """Chunks were computed: each is written to the first own tier and to every shared one.

        Args:
            unloaded: of them, those that a tier held: they are not written where they lie.
        """
        keys = [*dict.fromkeys(keys)]
        n_bytes = sum(map(self.bytes_of.__getitem__, keys))
        for i, tier in enumerate(self.tiers):
            if i == 0 or i >= len(self.own):
                there = tier.order.held.keys() & unloaded
                if not there:
                    tier.write(keys, n_bytes, now_ns)
                elif missing := [key for key in keys if key not in there]:
                    tier.write(missing, sum(map(self.bytes_of.__getitem__, missing)), now_ns)

    def fill(self, tier: int, keys: Sequence[int]) -> None:
        """Contents from before the run, coldest first; what does not fit leaves."""
        keys = [*dict.fromkeys(keys)]
        self._insert(tier, keys, sum(map(self.bytes_of.__getitem__, keys)), 0, demote=False)

    def _insert(
        self, at: int, keys: Sequence[int], n_bytes: int, now_ns: int, demote: bool = True
    ) -> None:
        """Chunks (none twice) are there now; the coldest make room, and are written one down.

        What comes to the first own tier leaves those below it.
        """
        tier = self.tiers[at]
        order, capacity, bytes_of = tier.order, tier.capacity, self.bytes_of
        is_new = capacity >= self.largest_bytes
        for held in self._rivals[at]:
            is_new = is_new and held.isdisjoint(keys)
        if not is_new:
            known = {key for held in self._rivals[at] for key in held & keys}
            keys = [k for k in keys if bytes_of[k] <= capacity and k not in known]
            n_bytes = sum(map(bytes_of.__getitem__, keys))
        if not at:
            for lower in self.own[1:]:
                lower.take(lower.order.held.keys() & keys, bytes_of)
        order.add(keys)
        tier.used += n_bytes
        if tier.used > capacity:
            victims, n_bytes = order.pop(tier.used - capacity, bytes_of)
            tier.used -= n_bytes
            tier.n_evicted += len(victims)
            if demote and at + 1 < len(self.own):
                self.own[at + 1].write(victims, n_bytes, now_ns)

    def check(self) -> None:
        """Its own tiers hold what they should, and no chunk lies in two of them (INV-4).

        Raises:
            InvariantViolation: both sides.
        """
        for tier in self.own:
            tier.check(self.bytes_of)
        held = [tier.order.held.keys() for tier in self.own]
        if not all(a.isdisjoint(b) for a, b in combinations(held, 2)):
            raise InvariantViolation("INV-4 tiers: a chunk lies in two of them")
