"""The simulator against queueing theory: what has a formula must match it."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pytest
from cachetune.core.block_pool import BlockPool
from cachetune.core.engine import Engine
from cachetune.core.executor import serve
from cachetune.core.generators import rag_workload
from cachetune.core.metrics import littles_law
from cachetune.core.ops import Op, Span
from cachetune.core.plan import ReusePlan
from cachetune.core.rng import rng
from cachetune.simulator.executor import SimExecutor
from support import make_index, make_op, make_profile, make_tier

MEAN_NS = 1000
N = 20_000


def poisson_ns(utilisation: float, seed: int) -> list[int]:
    gaps = rng(seed, "arrivals").exponential(MEAN_NS / utilisation, size=N)
    return [int(t) for t in np.cumsum(gaps)]


def feed(sim: SimExecutor, arrivals: Iterable[tuple[int, Op]]) -> list[Span]:
    """Submit each op at its time."""
    spans: list[Span] = []
    for at, op in arrivals:
        while sim.now_ns() < at:
            spans += sim.wait(at)
        sim.submit([op])
    while found := sim.wait(None):
        spans += found
    return spans


def interval(values: list[float], n_batches: int = 20) -> tuple[float, float]:
    """99 % interval of the mean of correlated values, by batch means after a warm-up."""
    kept = np.asarray(values[len(values) // 10 :])
    means = np.array([batch.mean() for batch in np.array_split(kept, n_batches)])
    half = 2.861 * means.std(ddof=1) / math.sqrt(n_batches)
    return float(means.mean() - half), float(means.mean() + half)


@pytest.mark.parametrize("utilisation", [0.3, 0.7])
@pytest.mark.parametrize("service", ["deterministic", "exponential"])
def test_wait_on_a_stream_is_pollaczek_khinchin(service: str, utilisation: float):
    """M/G/1: mean wait = rho E[S^2] / (2 E[S] (1 - rho)); D has E[S^2] = 1, M has 2."""
    profile = make_profile(coefficients_s={"select.op": 0.0})
    sizes = rng(2, "sizes").exponential(MEAN_NS, size=N)
    lengths = [MEAN_NS] * N if service == "deterministic" else [round(s) for s in sizes]
    ops = [make_op(i, "select", n_tokens=n) for i, n in enumerate(lengths)]
    spans = feed(SimExecutor(profile), zip(poisson_ns(utilisation, 1), ops, strict=True))
    second_moment = 1 if service == "deterministic" else 2
    expected = MEAN_NS * utilisation * second_moment / (2 * (1 - utilisation))
    low, high = interval([s.start_ns - s.submit_ns for s in spans])
    assert low <= expected <= high
    assert high - low < 0.35 * expected


@pytest.mark.parametrize("sizes", ["equal", "exponential"])
def test_time_on_a_shared_link_is_processor_sharing(sizes: str):
    """M/G/1-PS: mean time = E[S] / (1 - rho), whatever the distribution of sizes."""
    utilisation = 0.6
    tiers = {"t": make_tier(1e9)}
    profile = make_profile(tiers=tiers, coefficients_s={"load.op": 0.0})
    drawn = rng(3, "sizes").exponential(MEAN_NS, size=N)
    lengths = [MEAN_NS] * N if sizes == "equal" else [max(1, round(s)) for s in drawn]
    ops = [make_op(i, "load", f"io.t.{i}", n_bytes=n, tier="t") for i, n in enumerate(lengths)]
    spans = feed(SimExecutor(profile), zip(poisson_ns(utilisation, 4), ops, strict=True))
    low, high = interval([float(s.duration_ns) for s in sorted(spans, key=lambda s: s.seq)])
    assert low <= MEAN_NS / (1 - utilisation) <= high


def test_littles_law_holds_for_a_served_workload():
    workload = rag_workload(
        "w", 1, n_requests=200, n_contents=20, chunk_tokens=64, output_tokens=(1, 20),
        rate_rps=10_000.0,
    )  # fmt: skip
    profile = make_profile()
    engine = Engine(workload, profile.model, ReusePlan(), make_index(workload), BlockPool(500))
    law = littles_law(serve(workload, engine, SimExecutor(profile)), workload)
    assert law.n_mean > 1
    assert law.error < 1e-9
