"""A link that several replicas load over at the same time: requests as fluid against layers.

The peer is the layer-level simulator with an engine per replica on one executor: streams are a
device's own, the tier's link is shared, load by load. Both see the same requests and replicas.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from cachetune.core.block_pool import BlockPool
from cachetune.core.engine import Engine
from cachetune.core.generators import rag_workload
from cachetune.core.hardware import HardwareProfile
from cachetune.core.layout import read_bytes
from cachetune.core.metrics import per_request
from cachetune.core.ops import Op, Span
from cachetune.core.plan import RatioRule, ReusePlan
from cachetune.core.timeline import Timeline
from cachetune.core.workload import Workload
from cachetune.simulator.executor import SimExecutor
from cachetune.simulator.profile_step_cost import ProfileStepCost
from cachetune.simulator.serving import serve_trace
from cachetune.simulator.serving_fleet import ServingLimits
from cachetune.simulator.serving_result import ServingResult
from serving_support import make_fleet, make_tier, table_of
from support import COEFFICIENTS_S, make_index, make_model, make_profile
from support import make_tier as make_profile_tier

N_REPLICAS = 16
CHUNK, N_CHUNKS, N_LAYERS = 128, 6, 16
RATIO = 0.25
"""Of 128 tokens 96 are loaded: whole row groups."""
TIER = "store"
N_BLOCKS = 10_000


def make_machine(link_bytes_per_s: float) -> HardwareProfile:
    """Milliseconds of compute per prompt; nothing but linear terms of it, and bytes of loads."""
    coefficients = {name: 0.0 for name in COEFFICIENTS_S}
    coefficients |= {"prefill.flop": 4e-9, "prefill.small_flop": 4e-9}
    tier = make_profile_tier(link_bytes_per_s)
    model = make_model(n_layers=N_LAYERS, hidden_size=512, n_heads=8, n_kv_heads=8, head_dim=64)
    return make_profile(model=model, tiers={TIER: tier}, coefficients_s=coefficients)


def make_requests(rate_rps: float, n: int) -> Workload:
    workload = rag_workload(
        "shared",
        3,
        n_requests=n,
        n_contents=40,
        chunk_tokens=CHUNK,
        chunks_per_request=N_CHUNKS,
        suffix_tokens=32,
        output_tokens=1,
        rate_rps=rate_rps,
    )
    requests = [r.replace(max_output_tokens=r.output_tokens) for r in workload.requests]
    return workload.replace(requests=tuple(requests))


PLAN = ReusePlan(
    policy="cachetune",
    rules=(RatioRule(ratios=(RATIO,)),),
    layer_group=1,
    look_ahead=N_LAYERS,
    restore_stream="restore",
    n_io_workers=1,
)


def by_layers(workload: Workload, profile: HardwareProfile) -> list[float]:
    """TTFT, ms; requests take turns at the replicas."""
    model = profile.model
    index = make_index(workload, tier=TIER, model=model)
    engines = [Engine(workload, model, PLAN, index, BlockPool(N_BLOCKS)) for _ in range(N_REPLICAS)]
    executor = SimExecutor(profile)

    def on_device(i: int, ops: list[Op]) -> Iterator[Op]:
        for op in ops:
            deps = tuple(dep * N_REPLICAS + i for dep in op.deps)
            yield replace(op, op_id=op.op_id * N_REPLICAS + i, deps=deps, device=i)

    def of_engine(span: Span) -> Span:
        return replace(span, op=replace(span.op, op_id=span.op.op_id // N_REPLICAS))

    pending = sorted(workload.requests, key=lambda r: (r.arrival_ns, r.request_id), reverse=True)
    turn = 0
    spans: list[Span] = []
    while pending or any(e.n_open for e in engines):
        now = executor.now_ns()
        while pending and pending[-1].arrival_ns <= now:
            i, turn = turn, (turn + 1) % N_REPLICAS
            executor.submit([*on_device(i, engines[i].on_arrival(pending.pop(), now))])
        for span in executor.wait(pending[-1].arrival_ns if pending else None):
            i = span.op.device
            spans.append(span)
            executor.submit([*on_device(i, engines[i].on_done(of_engine(span)))])
    timeline = Timeline(tuple(spans), 0, workload.requests, workload.name)
    return [m.ttft_ms for m in per_request(timeline, workload)]


def by_requests(
    workload: Workload, profile: HardwareProfile, in_order: bool = True
) -> ServingResult:
    table, model = table_of(workload), profile.model
    limits = ServingLimits(max_num_seqs=64, prefix_caching=False)
    loaded = CHUNK - round(CHUNK * RATIO)
    reuse = {
        "name": "cachetune",
        "recompute_ratio": {"*": RATIO},
        "n_layers": N_LAYERS,
        "write_back": False,
        "kv_bytes_per_token": round(N_LAYERS * read_bytes(model, loaded) / loaded),
    }
    tier = make_tier(TIER, profile.tiers[TIER].link_bytes_per_s, shared=True)
    fleet = make_fleet(
        limits=limits, tiers=[tier], reuse=reuse, n_replicas=N_REPLICAS, router="round_robin"
    )
    fleet = fleet.replace(replica=fleet.replica.replace(loads_in_order=in_order))
    snapshot = {TIER: [list(range(len(table.chunk_tokens)))]}
    return serve_trace(table, fleet, ProfileStepCost(profile, PLAN), snapshot=snapshot)


def difference(load: float, share: float, in_order: bool, n: int = 400) -> tuple[float, float]:
    """Of TTFT p50 and p99, requests over layers, at a utilisation of the link.

    Args:
        load: of the link, by what all loads ask of it.
        share: time of a load alone over time of its compute.
        in_order: `ReplicaSpec.loads_in_order`.
    """
    probe = make_requests(1.0, 1)
    compute_s = by_requests(probe, make_machine(1e15)).ttft_ms[0] / 1e3
    loaded_bytes = N_CHUNKS * N_LAYERS * read_bytes(make_machine(1.0).model, 96)
    load_s = share * compute_s
    profile = make_machine(loaded_bytes / load_s)
    workload = make_requests(load / load_s, n)
    layers = by_layers(workload, profile)
    requests = by_requests(workload, profile, in_order).ttft_ms
    at = (50, 99)
    p50, p99 = np.percentile(requests, at) / np.percentile(layers, at) - 1
    return float(p50), float(p99)


def test_alone_both_take_the_same_time() -> None:
    """Pages of 4 KiB round what layers load by less than 0.1 %."""
    workload = make_requests(1e-3, 3)
    for rate in (1e6, 1e7, 1e9):
        profile = make_machine(rate)
        expected = by_layers(workload, profile)
        np.testing.assert_allclose(by_requests(workload, profile).ttft_ms, expected, rtol=1e-3)


@pytest.mark.parametrize("load", [0.3, 0.5, 0.7])
def test_replicas_share_a_link_as_layers_do(load: float) -> None:
    """Loads of a replica in order, those of different ones side by side; loads take longest."""
    p50, p99 = difference(load, share=2.0, in_order=True)
    print(f"load {load}: p50 {p50:+.2%}, p99 {p99:+.2%}")
    assert abs(p50) <= 0.02 and abs(p99) <= 0.05


def test_how_far_they_are_apart_where_compute_takes_as_long() -> None:
    """A request's first piece begins as late as the present rates allow. If the link gets free
    afterwards, layers have computed meanwhile what had come; the composite begins only then."""
    p50, p99 = difference(0.5, share=1.0, in_order=True)
    print(f"p50 {p50:+.2%}, p99 {p99:+.2%}")
    assert 0.0 <= p50 <= 0.12 and abs(p99) <= 0.05
