"""Tiers of the serving simulator: contents, eviction downwards, writes that take time.

A replica's own tiers are exclusive: a chunk lies in one of them. What is loaded from a lower one
moves to the first (its bytes pass host memory anyway); what a tier evicts is written to the next.
A shared tier gets a copy of every new chunk. A chunk larger than a tier is not kept there. Writes
queue in order at the tier's write rate, beside its reads; a chunk can be read once its write is
done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from ..core.errors import InvariantViolation
from ..core.units import NS_PER_S
from .serving_eviction import Order
from .serving_fleet import TierSpec
from .serving_links import Link

Forget = Callable[[int], None]


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
        self.writes: deque[tuple[int, list[int]]] = deque()
        """(when done, keys), in order."""
        self.write_free_ns = 0
        self.write_ns_per_byte = NS_PER_S / spec.write_bytes_per_s
        buffer = spec.write_buffer_bytes
        self.write_buffer_ns = 1 << 62 if buffer is None else round(buffer * self.write_ns_per_byte)
        self.read_bytes = self.written_bytes = self.dropped_bytes = self.n_evicted = 0

    def write(self, keys: list[int], n_bytes: int, now_ns: int) -> None:
        """Queue a write; dropped if what waits would not fit into the buffer."""
        start = max(now_ns, self.write_free_ns)
        took = n_bytes * self.write_ns_per_byte
        if start - now_ns + took > self.write_buffer_ns:
            self.dropped_bytes += n_bytes
            return
        self.write_free_ns = start + round(took)
        self.written_bytes += n_bytes
        self.writes.append((self.write_free_ns, keys))


class ChunkTiers:
    """The tiers that one replica sees, fastest first; the shared ones are last."""

    def __init__(
        self, own: Sequence[TierState], shared: Sequence[TierState], bytes_of: Sequence[int]
    ) -> None:
        self.own = list(own)
        self.shared = list(shared)
        self.tiers = [*own, *shared]
        self.bytes_of = bytes_of
        self.where: dict[int, int] = {}
        """Which of its own tiers holds a chunk."""

    def settle(self, now_ns: int) -> None:
        """Writes that are done become readable."""
        for i, tier in enumerate(self.tiers):
            writes = tier.writes
            while writes and writes[0][0] <= now_ns:
                done_ns, keys = writes.popleft()
                self._insert(i, keys, done_ns)

    def find(self, keys: Sequence[int]) -> list[int]:
        """The tier each chunk is best read from, -1 for none."""
        where = self.where
        found = [where.get(key, -1) for key in keys]
        for i in range(len(self.own), len(self.tiers)):
            if -1 in found:
                order = self.tiers[i].order
                found = [
                    i if at < 0 and key in order else at
                    for at, key in zip(found, keys, strict=True)
                ]
        return found

    def use(self, keys: Sequence[int], found: Sequence[int], now_ns: int) -> None:
        """Chunks are loaded from where `find` saw them: used now, and moved up."""
        rising: list[int] = []
        touch = [tier.order.touch for tier in self.tiers]
        n_own = len(self.own)
        for key, at in zip(keys, found, strict=True):
            if at < 0:
                continue
            if at == 0 or at >= n_own:
                touch[at](key)
            if at > 0 and n_own:
                rising.append(key)
        if rising:
            self._rise(rising, now_ns)

    def add_new(self, keys: list[int], now_ns: int) -> None:
        """Chunks were computed: written to the first own tier and to every shared one."""
        for i in range(len(self.tiers)):
            if i == 0 or i >= len(self.own):
                self._write(i, keys, now_ns)

    def fill(self, tier: int, keys: Sequence[int]) -> None:
        """Contents from before the run, coldest first; what does not fit leaves."""
        self._insert(tier, list(keys), 0, demote=False)

    def _rise(self, keys: list[int], now_ns: int) -> None:
        where, bytes_of = self.where, self.bytes_of
        for key in keys:
            at = where.pop(key, -1)
            if at >= 0:
                tier = self.own[at]
                tier.order.remove(key)
                tier.used -= bytes_of[key]
        self._insert(0, keys, now_ns)

    def _write(self, at: int, keys: list[int], now_ns: int) -> None:
        bytes_of = self.bytes_of
        self.tiers[at].write(keys, sum(map(bytes_of.__getitem__, keys)), now_ns)

    def _insert(self, at: int, keys: list[int], now_ns: int, demote: bool = True) -> None:
        """Chunks are there now; the coldest make room, and are written one tier down."""
        tier = self.tiers[at]
        order, capacity, bytes_of, where = tier.order, tier.capacity, self.bytes_of, self.where
        own = at < len(self.own)
        known = where if own else order
        fresh = dict.fromkeys([k for k in keys if k not in known and bytes_of[k] <= capacity], at)
        order.add(fresh)
        if own:
            where.update(fresh)
        used = tier.used + sum(map(bytes_of.__getitem__, fresh))
        victims: list[int] = []
        while used > capacity:
            key = order.pop()
            used -= bytes_of[key]
            victims.append(key)
        if own:
            for key in victims:
                del where[key]
        tier.used = used
        if victims:
            tier.n_evicted += len(victims)
            if demote and at + 1 < len(self.own):
                self._write(at + 1, victims, now_ns)

    def check(self) -> None:
        """Used bytes are those of the chunks that are there, and fit (INV-4).

        Raises:
            InvariantViolation: both sides.
        """
        for i, tier in enumerate(self.tiers):
            keys = tier.order.coldest_first()
            held = sum([self.bytes_of[key] for key in keys])
            if held != tier.used or held > tier.capacity:
                raise InvariantViolation(
                    f"INV-4 tier {tier.spec.name}: {tier.used} used, chunks of {held} bytes, "
                    f"capacity {tier.capacity}"
                )
            if i < len(self.own) and any(self.where.get(key) != i for key in keys):
                raise InvariantViolation(f"INV-4 tier {tier.spec.name}: a chunk is lost")
        if len(self.where) != sum(len(tier.order) for tier in self.own):
            raise InvariantViolation("INV-4 tiers: a chunk lies in two of them")
