"""Which tokens of a chunk matter: scores on its K (before RoPE) and V, fixed offline.

A score becomes the stored order, least critical first, so any ratio's tokens to load are a prefix.
Sources: CacheTune 2605.24022 section 4.1 and its released code (`low_pass`, variant `shared`);
EPIC ICML'25 (`chunk_start`). `high_pass` and `spread_high_pass` are ours, see results/.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .rng import rng

Array = NDArray[np.float32]

LOW_PASS_ALPHA = 0.5
HIGH_PASS_ALPHA = 0.25
SPREAD_NEIGHBOURS = 4
"""Different texts a chunk is encoded behind, to see which of its V depend on them."""


def n_kept_bins(n_tokens: int, alpha: float) -> int:
    """floor(alpha * (floor(N/2) + 1)) of the real FFT's bins, at least one."""
    return max(1, int(alpha * (n_tokens // 2 + 1) + 1e-9))


def low_pass_score(k: Array, v: Array, alpha: float = LOW_PASS_ALPHA) -> Array:
    """Energy of each token after the high bins are cut, normalised per layer, mean over layers.

    Args:
        k, v: `[L, N, HK, D]`, K before RoPE.
        alpha: share of the FFT bins along tokens that is kept.

    Returns:
        `[N]`, larger is more critical.
    """
    keep = n_kept_bins(k.shape[1], alpha)
    return _shared(_norms(_low(k, keep)), _norms(_low(v, keep)))


def high_pass_score(k: Array, v: Array, alpha: float = HIGH_PASS_ALPHA) -> Array:
    """As `low_pass_score`, of what the low-pass filter removes."""
    keep = n_kept_bins(k.shape[1], alpha)
    return _shared(_norms(k - _low(k, keep)), _norms(v - _low(v, keep)))


def spread_score(v: Array, v_behind: Sequence[Array]) -> Array:
    """Standard deviation of V between different neighbours, relative to V alone, mean over layers.

    Args:
        v: `[L, N, HK, D]` of the chunk encoded alone.
        v_behind: the same behind each of several other texts, at least two.

    Returns:
        `[N]`, larger depends more on what stands before the chunk.
    """
    if len(v_behind) < 2:
        raise ValueError(f"a spread needs at least two neighbours, got {len(v_behind)}")
    stacked = np.stack(v_behind)
    spread = np.sqrt(((stacked - stacked.mean(axis=0)) ** 2).sum(axis=(0, 3, 4)) / len(v_behind))
    relative: Array = (spread / (_norms(v) + 1e-12)).mean(axis=0).astype(np.float32)
    return relative


def spread_high_pass_score(k: Array, v: Array, v_behind: Sequence[Array]) -> Array:
    """Dependency times token class: `spread_score` x `high_pass_score`."""
    return spread_score(v, v_behind) * high_pass_score(k, v)


def chunk_start_score(n_tokens: int) -> Array:
    """The first tokens are the most critical (EPIC)."""
    return -np.arange(n_tokens, dtype=np.float32)


def random_score(n_tokens: int, content_id: str, seed: int = 0) -> Array:
    """A fixed random order per content: the baseline every selector must beat."""
    return rng(seed, "random_selector", content_id).random(n_tokens).astype(np.float32)


def stored_order(score: Array) -> NDArray[np.int64]:
    """Token indices, least critical first; of equal scores the lower index is more critical."""
    n = len(score)
    order: NDArray[np.int64] = np.lexsort((-np.arange(n), score)).astype(np.int64)
    return order


def _low(x: Array, keep: int) -> Array:
    spectrum = np.fft.rfft(x, axis=1)
    spectrum[:, keep:] = 0
    return np.fft.irfft(spectrum, n=x.shape[1], axis=1).astype(np.float32)


def _norms(x: Array) -> Array:
    norms: Array = np.sqrt((x.astype(np.float32) ** 2).sum(axis=(2, 3)))
    return norms


def _shared(k_norms: Array, v_norms: Array) -> Array:
    per_layer = 0.5 * (k_norms + v_norms)
    per_layer = per_layer / (per_layer.sum(axis=1, keepdims=True) + 1e-12)
    mean: Array = per_layer.mean(axis=0)
    return mean
