"""Gradient boosting with symmetric trees, in numpy: fits `simulator.residual.Residual`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..core.rng import rng
from ..simulator.residual import LEAF_UNIT, Residual

N_BINS = 128


@dataclass(frozen=True)
class Boosting:
    """Knobs of the fit; the defaults were chosen once, on random hold-outs of one GPU."""

    n_trees: int = 500
    depth: int = 6
    rate: float = 0.15
    smoothing: float = 3.0
    """Rows of zero residual that are added to each leaf."""
    clip: float = 0.3
    """Residuals beyond this pull with this strength only: outliers of a table do not lead."""
    row_share: float = 0.8
    column_share: float = 1.0
    """Features that one tree may ask about."""


def fit_residual(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    names: Sequence[str],
    seed: int,
    how: Boosting | None = None,
) -> Residual:
    """Trees for `y` (ln measured minus ln physical), from features `x` (n_rows, n_features)."""
    how = how or Boosting()
    edges = [_edges(column) for column in x.T]
    low = x.astype(np.float32)  # as `Trees.predict` compares
    binned = np.stack([np.searchsorted(e, c) for e, c in zip(edges, low.T, strict=True)])
    draws = rng(seed, "boosting", *names)
    left = y.astype(float).copy()
    columns: list[int] = []
    thresholds: list[float] = []
    leaves: list[int] = []
    for _ in range(how.n_trees):
        rows = np.flatnonzero(draws.random(len(y)) < how.row_share)
        pull = np.clip(left, -how.clip, how.clip)
        asked: Sequence[int] = range(len(edges))
        if how.column_share < 1:
            n_asked = max(1, round(how.column_share * len(edges)))
            asked = sorted(draws.choice(len(edges), n_asked, replace=False).tolist())
        found = _grow(binned[:, rows], pull[rows], edges, asked, how)
        leaf = np.zeros(len(y), dtype=np.intp)
        for level, (column, cut) in enumerate(found):
            leaf += (binned[column] > cut).astype(np.intp) << level
        value = _leaf_values(leaf[rows], pull[rows], how) * how.rate
        units = np.round(value / LEAF_UNIT).astype(int)
        left -= units[leaf] * LEAF_UNIT
        columns += [column for column, _ in found]
        thresholds += [float(edges[column][cut]) for column, cut in found]
        leaves += units.tolist()
    return Residual.of(
        tuple(names),
        np.array(columns).reshape(-1, how.depth),
        np.array(thresholds).reshape(-1, how.depth),
        np.array(leaves).reshape(-1, 1 << how.depth),
    )


def _edges(column: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cuts between the values of a feature, as the file holds them."""
    values = np.unique(column)
    middles = (values[1:] + values[:-1]) / 2
    if len(middles) >= N_BINS:
        pick = np.unique(np.linspace(0, len(middles) - 1, N_BINS - 1).astype(int))
        middles = middles[pick]
    return np.unique(middles.astype(np.float32)) if len(middles) else np.array([np.inf])


def _grow(
    binned: NDArray[np.intp],
    pull: NDArray[np.float64],
    edges: Sequence[NDArray[np.float64]],
    asked: Sequence[int],
    how: Boosting,
) -> list[tuple[int, int]]:
    """(feature, bin) of every level: each the cut that explains most over all leaves so far."""
    leaf = np.zeros(len(pull), dtype=np.intp)
    found: list[tuple[int, int]] = []
    for level in range(how.depth):
        best, chosen = -1.0, (0, 0)
        base = leaf * N_BINS
        size = N_BINS << level
        for column in asked:
            cuts = edges[column]
            key = base + binned[column]
            count = np.bincount(key, minlength=size).reshape(-1, N_BINS).cumsum(axis=1)
            total = np.bincount(key, pull, minlength=size).reshape(-1, N_BINS).cumsum(axis=1)
            n_right, right = count[:, -1:] - count, total[:, -1:] - total
            gain = total**2 / (count + how.smoothing) + right**2 / (n_right + how.smoothing)
            gains = gain.sum(axis=0)[: len(cuts)]
            at = int(np.argmax(gains))
            if gains[at] > best:
                best, chosen = float(gains[at]), (column, at)
        found.append(chosen)
        leaf += (binned[chosen[0]] > chosen[1]).astype(np.intp) << level
    return found


def _leaf_values(
    leaf: NDArray[np.intp], pull: NDArray[np.float64], how: Boosting
) -> NDArray[np.float64]:
    size = 1 << how.depth
    count = np.bincount(leaf, minlength=size)
    return np.asarray(np.bincount(leaf, pull, minlength=size) / (count + how.smoothing))
