"""Where the queue begins to grow: the slope of TTFT over all runs together, and its scatter.

One window of a trace may hold its busy hours and another its quiet ones, so that no run alone says
what the traffic as a whole does: the mean of the slopes of all seeds at a rate does, and how far
they lie apart says how sure it is (Student's t over seeds).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

BEHIND_MAX = 0.05
"""Seconds that first tokens may fall behind per second of traffic; more is an overload."""


def begins(rates: Floats, slopes: Floats) -> float | None:
    """Rate where, going up, `slopes` first exceed `BEHIND_MAX`; None where they never do.

    Args:
        rates: [k], ascending.
        slopes: [k] seconds per second; between rates they are taken as straight.
    """
    found = begins_each(rates, slopes[None])[0]
    return None if np.isinf(found) else float(found)


def begins_each(rates: Floats, slopes: Floats) -> Floats:
    """[n] rates as of `begins` for [n, k] slopes; infinite where they never exceed it."""
    over = slopes > BEHIND_MAX
    at = over.argmax(axis=1)
    below, n = np.maximum(at - 1, 0), np.arange(len(slopes))
    rise = slopes[n, at] - slopes[n, below]
    part = (BEHIND_MAX - slopes[n, below]) / np.where(rise > 0, rise, 1.0)
    found = rates[below] + np.where(at > 0, part, 0.0) * (rates[at] - rates[below])
    return np.where(over.any(axis=1), found, np.inf)


def margin(slopes: Floats, n_apart: float, confidence: float) -> Floats:
    """[k] half widths of the interval of the mean of [k, seeds] slopes; 0 for a single seed.

    Args:
        n_apart: of the seeds, as many as do not tell the same again.
    """
    from scipy.stats import t

    n_seeds = slopes.shape[1]
    if n_seeds < 2:
        return np.zeros(len(slopes))
    scatter = slopes.std(axis=1, ddof=1) / np.sqrt(n_apart)
    return np.asarray(scatter * t.ppf((1 + confidence) / 2, n_seeds - 1))
