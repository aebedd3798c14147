"""A queue whose capacity theory knows, to see how often an interval holds it.

One server, Poisson arrivals, exponential service, first come first served: the time in it is
exponential with rate mu - lambda (Kleinrock, Queueing Systems I, section 5.12).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from ..core.rng import rng
from .capacity import find_capacity
from .rate_search import Evaluate
from .trial import BATCHES, Estimate, Trial

SERVICE_S = 0.1
LIMIT_S = 1.0
"""What requests may take."""
N_REQUESTS = 2000
"""Of a run; the first fifth is not judged."""


def mm1(n: int = N_REQUESTS, limit_s: float = LIMIT_S, service_s: float = SERVICE_S) -> Evaluate:
    """Runs of `n` requests, by Lindley's recursion."""

    def evaluate(rate_rps: float, seed: int) -> Trial:
        gaps = rng(seed, "gaps").exponential(size=n) / rate_rps
        work = rng(seed, "work").exponential(size=n) * service_s
        walk = np.cumsum(np.concatenate([[0.0], work[:-1] - gaps[1:]]))
        sojourn = walk - np.minimum.accumulate(walk) + work
        parts = np.array_split(sojourn[n // 5 :] <= limit_s, BATCHES)
        good, judged = tuple(int(p.sum()) for p in parts), tuple(len(p) for p in parts)
        share, behind = sum(good) / sum(judged), rate_rps * service_s - 1
        return Trial(rate_rps, seed, share, behind, good, judged)

    return evaluate


def mm1_capacity_rps(share: float, limit_s: float = LIMIT_S, service_s: float = SERVICE_S) -> float:
    """Rate at which `share` of all requests take at most `limit_s`."""
    return 1 / service_s - math.log(1 / (1 - share)) / limit_s


def intervals(
    share: float, n_questions: int, n_seeds: int = 5, root: int = 0
) -> Iterator[Estimate]:
    """What `n_questions` searches of other seeds each find."""
    for k in range(n_questions):
        first = (root * n_questions + k) * n_seeds
        rate = find_capacity(mm1(), share, range(first, first + n_seeds)).rate
        yield rate or Estimate(0.0, 0.0, 0.0)
