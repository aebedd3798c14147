"""What the tiers hold after long traffic: a start for runs that are too short to fill a disk.

Requests that came before are taken in order; the last used chunks fill the first tier, those before
them the next. A store that replicas share has a copy of all. It is LRU without its delays.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.request_table import RequestTable
from ..simulator.serving_fleet import Fleet

Ints = NDArray[np.int64]


def warm_snapshot(before: RequestTable, fleet: Fleet) -> dict[str, list[Ints]]:
    """Tier -> chunks per replica (once for a shared tier), coldest first, for `serve_trace`.

    Args:
        before: requests of the past, oldest first; ids as in the table that will be served.
        fleet: its tiers; each replica has seen every n-th request.
    """
    tiers = fleet.replica.tiers
    names, n_tenants = before.chunk_ids.astype(np.int64), len(before.tenants)
    found: dict[str, list[Ints]] = {tier.name: [] for tier in tiers}
    rows = before.rows_of_chunks()
    if n_tenants > 1:  # tenants share nothing: as `JobFeed.names`
        names = names * n_tenants + before.tenant[rows]

    def ends_of(recent: Ints) -> Ints:
        tokens = before.chunk_tokens[recent // n_tenants].astype(np.int64)
        return np.cumsum(tokens * fleet.policy.kv_bytes_per_token)

    for replica in range(fleet.n_replicas):
        recent = latest_first(names[rows % fleet.n_replicas == replica])
        ends = ends_of(recent)
        begin = 0
        for tier in tiers:
            if tier.shared:
                continue
            room = tier.capacity_bytes if tier.capacity_bytes is not None else 1 << 62
            already = int(ends[begin - 1]) if begin else 0
            end = int(np.searchsorted(ends, already + room, side="right"))
            found[tier.name].append(recent[begin:end][::-1])
            begin = end
    for tier in tiers:
        if tier.shared:
            recent = latest_first(names)
            room = tier.capacity_bytes if tier.capacity_bytes is not None else 1 << 62
            kept = int(np.searchsorted(ends_of(recent), room, side="right"))
            found[tier.name] = [recent[:kept][::-1]]
    return found


def latest_first(ids: NDArray[Any]) -> Ints:
    """Different ids by their last use, the latest first."""
    chunks, back = np.unique(ids[::-1], return_index=True)
    return chunks[np.argsort(back, kind="stable")].astype(np.int64)
