"""Selectors against the formula written out as a DFT matrix, and their edge cases."""

from __future__ import annotations

import numpy as np
import pytest
from cachetune.core import selectors
from numpy.typing import NDArray

SHAPE = (3, 2, 4)
"""Layers, key heads, head dim of the synthetic K and V."""


def random_kv(n: int, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    layers, heads, dim = SHAPE
    draw = np.random.default_rng([seed, n])
    k, v = draw.normal(size=(2, layers, n, heads, dim)).astype(np.float32)
    return k, v * np.float32(2.0)


def low_pass_matrix(n: int, alpha: float) -> NDArray[np.float64]:
    """`[n, n]`: keeps the real FFT's bins below floor(alpha * (floor(n/2) + 1)), at least one.

    A real bin f stands for the frequencies f and -f of the full transform.
    """
    keep = max(1, int(np.floor(alpha * (n // 2 + 1))))
    t = np.arange(n)
    forward = np.exp(-2j * np.pi * np.outer(t, t) / n)
    frequency = np.minimum(t, n - t)
    inverse = np.conj(forward).T / n
    return (inverse @ np.diag(frequency < keep) @ forward).real


def straightforward(k: NDArray[np.float32], v: NDArray[np.float32], alpha: float) -> list[float]:
    """CacheTune's score by its definition, loop by loop, in float64."""
    n_layers, n = k.shape[:2]
    matrix = low_pass_matrix(n, alpha)
    total = np.zeros(n)
    for layer in range(n_layers):
        low_k = np.einsum("st,thd->shd", matrix, k[layer].astype(np.float64))
        low_v = np.einsum("st,thd->shd", matrix, v[layer].astype(np.float64))
        energy = np.array(
            [
                0.5 * (np.linalg.norm(low_k[i].ravel()) + np.linalg.norm(low_v[i].ravel()))
                for i in range(n)
            ]
        )
        total += energy / energy.sum()
    return list(total / n_layers)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 31, 64, 97])
@pytest.mark.parametrize("alpha", [0.5, 0.2])
def test_low_pass_is_the_written_out_formula(n: int, alpha: float) -> None:
    k, v = random_kv(n)
    score = selectors.low_pass_score(k, v, alpha)
    assert score.shape == (n,)
    np.testing.assert_allclose(score, straightforward(k, v, alpha), rtol=2e-5)


@pytest.mark.parametrize("n", [2, 7, 32])
def test_high_pass_is_what_low_pass_removes(n: int) -> None:
    k, v = random_kv(n)
    rest = np.eye(n) - low_pass_matrix(n, selectors.HIGH_PASS_ALPHA)
    energy = np.stack(
        [
            0.5
            * sum(
                np.linalg.norm(np.tensordot(rest, x[layer], axes=(1, 0)).reshape(n, -1), axis=1)
                for x in (k, v)
            )
            for layer in range(SHAPE[0])
        ]
    )
    expected = (energy / energy.sum(axis=1, keepdims=True)).mean(axis=0)
    np.testing.assert_allclose(selectors.high_pass_score(k, v), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("n", "alpha", "bins"),
    [(1, 0.5, 1), (2, 0.5, 1), (3, 0.5, 1), (4, 0.5, 1), (6, 0.5, 2), (64, 0.5, 16), (65, 0.5, 16)],
)
def test_at_least_one_bin_is_kept(n: int, alpha: float, bins: int) -> None:
    assert selectors.n_kept_bins(n, alpha) == bins


@pytest.mark.parametrize("alpha", [0.0, 1e-9])
def test_one_bin_is_the_mean_so_all_tokens_score_alike(alpha: float) -> None:
    score = selectors.low_pass_score(*random_kv(9), alpha)
    np.testing.assert_allclose(score, np.full(9, 1 / 9), rtol=1e-5)


def test_all_bins_keep_the_input() -> None:
    k, v = random_kv(10)
    norms = [np.linalg.norm(x.reshape(SHAPE[0], 10, -1), axis=2) for x in (k, v)]
    energy = 0.5 * (norms[0] + norms[1])
    expected = (energy / energy.sum(axis=1, keepdims=True)).mean(axis=0)
    np.testing.assert_allclose(selectors.low_pass_score(k, v, 1.0), expected, rtol=1e-5)


def test_zero_keys_and_values_score_zero() -> None:
    nothing = np.zeros((2, 5, 1, 4), dtype=np.float32)
    assert selectors.low_pass_score(nothing, nothing).tolist() == [0.0] * 5


def test_a_slow_wave_scores_and_a_fast_one_does_not() -> None:
    """The first half carries a constant, the second an alternating sign of the same size."""
    n = 32
    k = np.ones((1, n, 1, 2), dtype=np.float32)
    k[:, n // 2 :] *= (np.where(np.arange(n // 2) % 2, -1.0, 1.0))[None, :, None, None]
    score = selectors.low_pass_score(k, k)
    assert score[2 : n // 2 - 2].min() > 3 * score[n // 2 + 2 : -2].max()


def test_of_equal_scores_the_lower_index_is_more_critical() -> None:
    score = np.array([1.0, 2.0, 1.0, 2.0, 0.0], dtype=np.float32)
    order = selectors.stored_order(score)
    assert order.tolist() == [4, 2, 0, 3, 1]
    assert order.dtype == np.int64
    # Recomputing r * N tokens takes them from the end.
    assert sorted(order[5 - 1 :]) == [1]
    assert sorted(order[5 - 3 :]) == [0, 1, 3]


@pytest.mark.parametrize("n", [1, 2, 33])
def test_any_ratio_loads_a_prefix_and_recomputes_the_top(n: int) -> None:
    score = np.random.default_rng(n).integers(0, 6, n).astype(np.float32)  # many ties
    order = selectors.stored_order(score)
    assert sorted(order) == list(range(n))
    by_rank = sorted(range(n), key=lambda i: (-score[i], i))
    for count in range(n + 1):
        assert set(order[n - count :]) == set(by_rank[:count])


def test_chunk_start_recomputes_the_first_tokens() -> None:
    order = selectors.stored_order(selectors.chunk_start_score(6))
    assert order.tolist() == [5, 4, 3, 2, 1, 0]


def test_random_is_fixed_per_content_and_seed() -> None:
    first = selectors.random_score(50, "a", seed=1)
    assert np.array_equal(first, selectors.random_score(50, "a", seed=1))
    assert not np.array_equal(first, selectors.random_score(50, "b", seed=1))
    assert not np.array_equal(first, selectors.random_score(50, "a", seed=2))


def test_spread_is_the_deviation_between_neighbours() -> None:
    _, v = random_kv(8)
    behind = [v + np.float32(1.0), v - np.float32(1.0)]
    behind[0][:, 3] = behind[1][:, 3] = v[:, 3]  # this token does not depend on them
    score = selectors.spread_score(v, behind)
    assert score[3] == 0
    n_values = SHAPE[1] * SHAPE[2]
    norms = np.linalg.norm(v.reshape(SHAPE[0], 8, -1), axis=2)
    expected = (np.sqrt(n_values) / norms).mean(axis=0)
    assert np.delete(score, 3) == pytest.approx(np.delete(expected, 3), rel=1e-4)


@pytest.mark.parametrize("n_neighbours", [0, 1])
def test_spread_needs_two_neighbours(n_neighbours: int) -> None:
    k, v = random_kv(8)
    with pytest.raises(ValueError, match="at least two neighbours"):
        selectors.spread_high_pass_score(k, v, [v] * n_neighbours)


def test_spread_high_pass_is_the_product() -> None:
    k, v = random_kv(8)
    behind = [random_kv(8, seed)[1] for seed in (1, 2, 3)]
    product = selectors.spread_score(v, behind) * selectors.high_pass_score(k, v)
    assert np.array_equal(selectors.spread_high_pass_score(k, v, behind), product)
