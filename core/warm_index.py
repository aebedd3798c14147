"""A warm cache to simulate with: every content of a workload, kept before the first request."""

from __future__ import annotations

from collections.abc import Sequence

from .chunk_index import ChunkEntry, ChunkIndex
from .eviction import EvictionName
from .hardware import HardwareProfile
from .layout import chunk_bytes
from .workload import Workload


def warm_index(
    workload: Workload,
    profile: HardwareProfile,
    tiers: Sequence[str],
    eviction: EvictionName = "lru",
) -> ChunkIndex:
    """Every content encoded alone and kept, in `tiers` by turns, for each tenant that asks.

    Raises:
        ProfileError: no such tier.
    """
    index = ChunkIndex({name: profile.tier(name).capacity_bytes for name in tiers}, eviction)
    asked = sorted({(r.tenant, c) for r in workload.requests for c in r.chunks})
    for number, (tenant, content_id) in enumerate(asked):
        n_tokens = workload.contents[content_id].n_tokens
        n_bytes = chunk_bytes(profile.model, n_tokens)
        tier = tiers[number % len(tiers)]
        key = f"{tenant}/{content_id}"
        flops = float(profile.model.prefill_flops(n_tokens, 0))
        entry = ChunkEntry(key, content_id, n_tokens, n_bytes, tier, recompute_flops=flops)
        index.add(entry, tenant)
    return index
