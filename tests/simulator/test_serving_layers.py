"""`detail="request"` against `detail="layers"`: composites against the engine in SimPy."""

from __future__ import annotations

import random

import numpy as np
import pytest
from cachetune.core.block_pool import BlockPool
from cachetune.core.engine import Engine
from cachetune.core.executor import serve
from cachetune.core.generators import rag_workload
from cachetune.core.hardware import HardwareProfile
from cachetune.core.metrics import RequestMetrics, per_request
from cachetune.core.plan import RatioRule, ReusePlan
from cachetune.core.workload import Workload
from cachetune.simulator.executor import SimExecutor
from cachetune.simulator.profile_step_cost import ProfileStepCost
from cachetune.simulator.serving import serve_trace
from cachetune.simulator.serving_fleet import ServingLimits
from cachetune.simulator.serving_result import ServingResult
from serving_support import make_fleet, make_tier, table_of
from support import COEFFICIENTS_S, make_index, make_model, make_profile
from support import make_tier as make_profile_tier

N_BLOCKS = 100
TIERS = ("dram", "disk")
POLICIES = ("full_recompute", "full_reuse", "epic", "cachetune", "cacheblend")


def make_machine(load_s_per_byte: float = 2e-8) -> HardwareProfile:
    """Times of milliseconds, as those of a real model, so that whole nanoseconds do not matter."""
    coefficients = {name: 2e3 * value for name, value in COEFFICIENTS_S.items()}
    coefficients |= {"prefill.flop": 2e-9, "prefill.attention_flop": 4e-9, "dispatch.gap": 1e-5}
    coefficients |= {"prefill.small_flop": 3e-9, "prefill.causal_flop": 3e-9}
    coefficients |= {"decode.attention_flop": 1e-8, "restore.byte": 1e-9}
    tiers = {
        "dram": make_profile_tier(1 / load_s_per_byte, latency_s=1e-5),
        "disk": make_profile_tier(0.2 / load_s_per_byte, latency_s=1e-4),
    }
    return make_profile(model=make_model(n_layers=8), tiers=tiers, coefficients_s=coefficients)


def by_layers(
    workload: Workload, plan: ReusePlan, profile: HardwareProfile, tier: str
) -> list[RequestMetrics]:
    model = profile.model
    index = make_index(workload, tier=tier, model=model)
    engine = Engine(workload, model, plan, index, BlockPool(N_BLOCKS))
    return per_request(serve(workload, engine, SimExecutor(profile)), workload)


def by_requests(
    workload: Workload, plan: ReusePlan, profile: HardwareProfile, tier: str, steps: str
) -> ServingResult:
    table = table_of(workload)
    limits = ServingLimits(
        max_num_seqs=plan.max_num_seqs, n_blocks=N_BLOCKS, prefix_caching=False, steps=steps
    )
    reuse = {
        "name": plan.policy,
        "recompute_ratio": {"*": plan.rules[0].ratios[0]},
        "epic_tokens": plan.epic_tokens,
        "n_layers": profile.model.n_layers // plan.layer_group,
        "write_back": False,
        "kv_bytes_per_token": profile.model.kv_bytes_per_token,
    }
    link = profile.tiers[tier].link_bytes_per_s  # one tier: nothing moves up
    fleet = make_fleet(limits=limits, tiers=[make_tier(tier, link)], reuse=reuse)
    snapshot = {tier: [list(range(len(table.chunk_tokens)))]}
    return serve_trace(table, fleet, ProfileStepCost(profile, plan), snapshot=snapshot)


def random_case(seed: int, n_requests: int) -> tuple[Workload, ReusePlan, str]:
    draw = random.Random(seed)
    workload = rag_workload(
        "layers",
        draw.randrange(1000),
        n_requests=n_requests,
        n_contents=10,
        chunk_tokens=(16, 90),
        chunks_per_request=draw.randint(0, 5),
        suffix_tokens=(1, 20),
        output_tokens=(1, 30),
        rate_rps=draw.choice([5.0, 20.0, 60.0]),
    )
    requests = [r.replace(max_output_tokens=r.output_tokens) for r in workload.requests]
    workload = workload.replace(requests=tuple(requests))  # a table knows no more
    plan = ReusePlan(
        policy=draw.choice(POLICIES),
        rules=(RatioRule(ratios=(draw.choice([0.0, 0.15, 0.5]),)),),
        layer_group=draw.choice([1, 2, 3]),
        look_ahead=draw.choice([1, 2, 4]),
        restore_stream="restore",
        prefill_chunk_tokens=draw.choice([32, 128, 8192]),
        max_num_seqs=draw.choice([4, 64]),
    )
    return workload, plan, draw.choice(TIERS)


def compare(seed: int, n_requests: int) -> None:
    workload, plan, tier = random_case(seed, n_requests)
    profile = make_machine()
    layers = by_layers(workload, plan, profile, tier)
    result = by_requests(workload, plan, profile, tier, "pieces")
    ttft = np.array([m.ttft_ms for m in layers])
    e2e = np.array([m.e2e_ms for m in layers])
    np.testing.assert_allclose(result.ttft_ms, ttft, rtol=1e-6, atol=1e-4)
    np.testing.assert_allclose(result.e2e_ms, e2e, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("n_requests", [1, 40])
def test_composites_keep_the_times_of_layers(n_requests: int) -> None:
    """Alone and in the queue, whatever policy, plan and tier."""
    for seed in range(30):
        try:
            compare(seed, n_requests)
        except Exception as e:
            e.add_note(f"replay: test_serving_layers.compare({seed}, {n_requests})")
            raise
