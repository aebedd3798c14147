"""A link that several replicas load over at the same time: requests as fluid against layers."""

from __future__ import annotations

import numpy as np
import pytest
from cachetune.simulator.shared_link import by_layers, by_requests, difference, machine, requests

N_REPLICAS, SEED = 16, 3


def errors(load: float, share: float) -> tuple[float, float]:
    """Of TTFT p50 and p99, requests over layers."""
    found = difference(load, share, n_replicas=N_REPLICAS, seed=SEED)
    return found["error_p50"], found["error_p99"]


def test_alone_both_take_the_same_time() -> None:
    """Pages of 4 KiB round what layers load by less than 0.1 %."""
    workload = requests(1e-3, 3, SEED)
    for rate in (1e6, 1e7, 1e9):
        profile = machine(rate)
        expected = by_layers(workload, profile, N_REPLICAS)
        np.testing.assert_allclose(by_requests(workload, profile, N_REPLICAS), expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("load", "share"), [(0.3, 2.0), (0.5, 2.0), (0.7, 1.0), (0.5, 1.0), (0.3, 0.5), (0.5, 0.5)]
)
def test_replicas_share_a_link_as_layers_do(load: float, share: float) -> None:
    """Loads of a replica in order, those of different ones side by side; whatever takes longest."""
    p50, p99 = errors(load, share)
    print(f"load {load}, over compute {share}: p50 {p50:+.2%}, p99 {p99:+.2%}")
    assert abs(p50) <= 0.005 and abs(p99) <= 0.005
