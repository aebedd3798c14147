"""Traces whose clock is coarse: many requests carry one time, Mooncake's every three seconds.

Nobody asked them all at once. Replayed as written they are bursts, which no rate makes smaller:
slowed down as much as one likes, they still come together.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .request_table import RequestTable
from .rng import rng
from .units import NS_PER_S

MOST = 0.5
"""Share of requests that share their time with others, from which the clock is called coarse."""
FEWEST = 3
"""Times that there are, at least: fewer are no clock."""


def tick_s(table: RequestTable) -> float | None:
    """Median seconds from one time to the next where the clock is coarse, else None."""
    times, n_at = np.unique(table.arrival_ns[table.after < 0], return_counts=True)
    if len(times) < FEWEST or n_at[n_at > 1].sum() < MOST * n_at.sum():
        return None
    return float(np.median(np.diff(times))) / NS_PER_S


def without_ticks(table: RequestTable, seed: int) -> RequestTable:
    """The same requests in the same order, those of one time spread evenly at random until the
    next time, or over one tick if that is sooner. A clock that is not coarse stays as it is.

    Args:
        table: requests; those that follow another one keep their pause.
        seed: root of the stream `ticks`.
    """
    tick = tick_s(table)
    if tick is None:
        return table
    free = table.after < 0
    times, at = np.unique(table.arrival_ns[free], return_inverse=True)
    tick_ns = round(tick * NS_PER_S)
    lasts = np.minimum(np.diff(times, append=times[-1] + tick_ns), tick_ns)
    shares = rng(seed, "ticks").random(len(at))
    shares = shares[np.lexsort((shares, at))]  # in order within each tick; `at` ascends
    moved = table.arrival_ns.copy()
    moved[free] = times[at] + np.floor(shares * lasts[at]).astype(np.int64)
    said = {"without_ticks_of_s": f"{tick:g}", "seed": str(seed)}
    return replace(table, arrival_ns=moved, provenance={**table.provenance, **said})
