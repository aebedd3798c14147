"""The serving simulator against queueing theory: what has a formula must match it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from cachetune.core.rng import rng
from cachetune.simulator.serving import serve_trace
from cachetune.simulator.serving_fleet import ServingLimits
from cachetune.simulator.serving_result import ServingResult
from numpy.typing import NDArray
from serving_support import LinearCost, make_fleet, make_table

N = 40_000
BATCHES = 20
T_99 = 2.861
"""Student's t for 19 degrees of freedom, two-sided."""
MEAN_TOKENS = 2000
ENDLESS = 1 << 30


def poisson_s(rate: float, seed: int) -> NDArray[np.float64]:
    return np.cumsum(rng(seed, "arrivals").exponential(1 / rate, size=N))


def within(values: NDArray[np.float64], expected: float) -> None:
    """The formula lies in the interval of batch means (first batch left out: warm-up)."""
    means = np.array([b.mean() for b in np.array_split(values, BATCHES + 1)[1:]])
    half = T_99 * means.std(ddof=1) / math.sqrt(BATCHES)
    assert abs(means.mean() - expected) <= half, (means.mean(), expected)
    assert half < 0.25 * expected


def lengths(kind: str, seed: int) -> NDArray[np.int64]:
    """Service requirements of mean `MEAN_TOKENS`."""
    draw = rng(seed, "service")
    if kind == "deterministic":
        return np.full(N, MEAN_TOKENS)
    if kind == "hyperexponential":  # squared coefficient of variation 3.5
        fast = draw.random(N) < 0.75
        means = np.where(fast, MEAN_TOKENS / 3, MEAN_TOKENS * 3)
        return np.maximum(1, np.rint(draw.exponential(means))).astype(np.int64)
    return np.maximum(1, np.rint(draw.exponential(MEAN_TOKENS, N))).astype(np.int64)


def one_by_one(kind: str, load: float, seed: int) -> ServingResult:
    """One server, first come first served: a prompt is the service, one token ends it."""
    service = lengths(kind, seed)
    token_s = 1e-6
    arrivals = poisson_s(load / (MEAN_TOKENS * token_s), seed)
    table = make_table(service.tolist(), [1] * N, arrivals.tolist())
    limits = ServingLimits(max_num_seqs=1, max_num_batched_tokens=ENDLESS, prefix_caching=False)
    return serve_trace(table, make_fleet(limits=limits), LinearCost(token=token_s, decode=token_s))


@pytest.mark.parametrize("load", [0.5, 0.8])
@pytest.mark.parametrize(("kind", "variability"), [("exponential", 1.0), ("deterministic", 0.0)])
def test_one_server(kind: str, variability: float, load: float) -> None:
    """M/M/1 and M/D/1: Pollaczek-Khinchine."""
    result = one_by_one(kind, load, seed=1)
    service_ms = MEAN_TOKENS * 1e-3
    waiting_ms = service_ms * load / (1 - load) * (1 + variability) / 2
    within(result.queue_ms, waiting_ms)
    within(result.e2e_ms, waiting_ms + service_ms)


def decoded(kind: str, load: float, n_seats: int, cost: LinearCost, rate: float) -> ServingResult:
    """A prompt of one token; the service is the output, `n_seats` at a time."""
    outputs = lengths(kind, seed=2)
    arrivals = poisson_s(rate, seed=2)
    table = make_table([1] * N, outputs.tolist(), arrivals.tolist())
    limits = ServingLimits(
        max_num_seqs=n_seats, max_num_batched_tokens=ENDLESS, prefix_caching=False
    )
    return serve_trace(table, make_fleet(limits=limits), cost)


@pytest.mark.parametrize("n_seats", [2, 8])
def test_several_servers(n_seats: int) -> None:
    """M/M/k: Erlang's C. A step takes the same time whoever is in it, so each seat is a server."""
    step_s, load = 1e-5, 0.8
    service_s = MEAN_TOKENS * step_s
    offered = n_seats * load
    result = decoded("exponential", load, n_seats, LinearCost(step=step_s), offered / service_s)
    terms = [offered**k / math.factorial(k) for k in range(n_seats)]
    last = offered**n_seats / math.factorial(n_seats) / (1 - load)
    waits = last / (sum(terms) + last)
    waiting_s = waits * service_s / (n_seats * (1 - load))
    within(result.queue_ms, waiting_s * 1e3)


@pytest.mark.parametrize("kind", ["exponential", "hyperexponential"])
def test_processor_sharing(kind: str) -> None:
    """M/G/1-PS: a step takes as long as it has members, so all share one processor evenly. The
    mean does not depend on the distribution, and a job of x takes x / (1 - load)."""
    load, token_s = 0.7, 1e-6
    cost = LinearCost(decode=token_s)
    result = decoded(kind, load, 1 << 20, cost, load / (MEAN_TOKENS * token_s))
    service_ms = result.table.output_tokens * token_s * 1e3
    within(result.e2e_ms, float(service_ms.mean()) / (1 - load))
    for low, high in ((0.2, 0.5), (0.5, 1), (1, 2), (2, 4)):
        some = (service_ms >= 2 * low) & (service_ms < 2 * high)
        stretch = result.e2e_ms[some].sum() / service_ms[some].sum()
        assert stretch == pytest.approx(1 / (1 - load), rel=0.06)


@pytest.mark.parametrize("load", [0.3, 0.9])
def test_littles_law(load: float) -> None:
    """Requests inside, integrated by the simulator, are rate times mean time inside."""
    left, right = one_by_one("hyperexponential", load, seed=3).littles_law()
    assert left == pytest.approx(right, rel=1e-9)
