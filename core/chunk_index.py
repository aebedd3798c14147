"""`ChunkIndex`: which chunks are kept, in which tier, and whether they are exact.

Pure bookkeeping: ids, sizes and a logical tick. The simulator fills one from a workload, the
runtime from its store; a policy sees only this.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from .errors import InvariantViolation
from .eviction import EvictionName, Evictor


def content_id_of(token_ids: Sequence[int]) -> str:
    """Content id of a chunk: 32 hex digits of SHA-256 over its token ids, 4 bytes each."""
    ids = array("I", [*token_ids])
    if sys.byteorder == "big":
        ids.byteswap()
    return hashlib.sha256(ids).hexdigest()[:32]


def chain_id(previous: str, content_id: str) -> str:
    """Key of a `prefix` entry: chains everything before it. The first chunk chains ''."""
    return hashlib.sha256(f"{previous}>{content_id}".encode()).hexdigest()[:32]


def chunk_key(
    content_id: str, *, model: str, order: str, dtype: str, tenant: str = "", chain: str = ""
) -> str:
    """Store key of one entry: everything that makes its bytes what they are.

    A tenant's salt is part of the key, so no tenant can find another's chunk. `chain` is set
    for `prefix` entries only.
    """
    text = "\0".join(("v1", content_id, chain, model, order, dtype, tenant))
    return hashlib.sha256(text.encode()).hexdigest()[:40]


@dataclass(frozen=True, slots=True)
class ChunkEntry:
    """One kept chunk.

    `isolated` was encoded alone (exact only at position 0); `prefix` behind its true prefix.
    """

    key: str
    content_id: str
    n_tokens: int
    n_bytes: int
    tier: str
    kind: Literal["isolated", "prefix"] = "isolated"
    chain: str = ""
    recompute_flops: float = 0.0
    """What it saves when it is loaded whole; read by the eviction policy `cost`."""


class ChunkIndex:
    """Kept chunks by content, and by chain for exact ones.

    A tier of limited capacity evicts by the policy `eviction`.
    """

    def __init__(
        self,
        capacity_bytes: dict[str, int | None] | None = None,
        eviction: EvictionName = "lru",
    ) -> None:
        self._capacity = dict(capacity_bytes or {})
        self._eviction: EvictionName = eviction
        self._evictors: dict[str, Evictor] = {}
        self._used: dict[str, int] = {}
        self._isolated: dict[tuple[str, str], ChunkEntry] = {}
        self._prefix: dict[tuple[str, str], ChunkEntry] = {}
        self._entries: dict[str, tuple[ChunkEntry, str]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def entry(self, key: str) -> ChunkEntry | None:
        """The entry called `key`, if it is kept."""
        found = self._entries.get(key)
        return None if found is None else found[0]

    def used_bytes(self, tier: str) -> int:
        """Bytes kept in `tier`."""
        return self._used.get(tier, 0)

    def add(self, entry: ChunkEntry, tenant: str = "") -> list[ChunkEntry]:
        """Keep `entry`; returns what was evicted to make room.

        An entry larger than its tier is not kept: it comes back as the one evicted.
        """
        if entry.key in self._entries:
            self.discard(entry.key)
        capacity = self._capacity.get(entry.tier)
        if capacity is not None and entry.n_bytes > capacity:
            return [entry]
        evicted = []
        while capacity is not None and self.used_bytes(entry.tier) + entry.n_bytes > capacity:
            key = self._evictor(entry.tier).victim(
                e.key for e, _ in self._entries.values() if e.tier == entry.tier
            )
            assert key is not None  # the tier holds bytes, hence entries
            evicted.append(self._entries[key][0])
            self._evictor(entry.tier).remove(key, evicted=True)
            self.discard(key)
        self._entries[entry.key] = (entry, tenant)
        self._used[entry.tier] = self.used_bytes(entry.tier) + entry.n_bytes
        if entry.kind == "prefix":
            self._prefix[tenant, entry.chain] = entry
        else:
            self._isolated[tenant, entry.content_id] = entry
        self._evictor(entry.tier).add(entry.key, entry.n_bytes, entry.recompute_flops)
        return evicted

    def discard(self, key: str) -> None:
        """Forget an entry; unknown keys are ignored."""
        found = self._entries.pop(key, None)
        if found is None:
            return
        entry, tenant = found
        self._used[entry.tier] -= entry.n_bytes
        self._evictor(entry.tier).remove(key)
        is_prefix = entry.kind == "prefix"
        table = self._prefix if is_prefix else self._isolated
        name = tenant, entry.chain if is_prefix else entry.content_id
        if table.get(name) is entry:  # a later entry of the same content stays
            del table[name]

    def lookup(self, content_ids: Iterable[str], tenant: str = "") -> list[ChunkEntry | None]:
        """The best entry for each chunk of a prompt, in order: `prefix` before `isolated`."""
        found: list[ChunkEntry | None] = []
        chain = ""
        for content_id in content_ids:
            chain = chain_id(chain, content_id)
            entry = self._prefix.get((tenant, chain)) or self._isolated.get((tenant, content_id))
            if entry is not None:
                self._evictor(entry.tier).use(entry.key)
            found.append(entry)
        return found

    def check_integrity(self) -> None:
        """Used bytes equal the sum over entries, tier by tier (INV-4)."""
        total: dict[str, int] = {}
        for entry, _ in self._entries.values():
            total[entry.tier] = total.get(entry.tier, 0) + entry.n_bytes
        used = {t: n for t, n in self._used.items() if n}
        if total != used:
            raise InvariantViolation(f"INV-4 used bytes: index says {used}, entries sum to {total}")
        for tier, capacity in self._capacity.items():
            if capacity is not None and self.used_bytes(tier) > capacity:
                raise InvariantViolation(
                    f"INV-4 tier {tier} holds {self.used_bytes(tier)} of {capacity} bytes"
                )

    def _evictor(self, tier: str) -> Evictor:
        found = self._evictors.get(tier)
        if found is None:
            found = self._evictors[tier] = Evictor(self._eviction)
        return found
