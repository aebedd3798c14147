"""The closed loop on both executors: live arrivals and batching, distributions compared.

Timing changes batching, so single requests may differ; only distributions are held together.
Predictions are made before the requests are served: by the profile as it was calibrated, and at the
speed that the machine had in the probes just before (`speed.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..core.block_pool import BlockPool
from ..core.chunk_index import ChunkIndex
from ..core.engine import Engine
from ..core.executor import serve
from ..core.generators import rag_workload
from ..core.hardware import HardwareProfile
from ..core.metrics import summary
from ..core.plan import ReusePlan
from ..core.timeline import Timeline
from ..core.workload import Workload
from ..simulator.executor import SimExecutor

if TYPE_CHECKING:
    from ..runtime.runner import Runner

COMPARED = (
    "ttft_ms_mean",
    "ttft_ms_p50",
    "ttft_ms_p90",
    "ttft_ms_p99",
    "tpot_ms_mean",
    "tpot_ms_p90",
    "e2e_ms_mean",
)


@dataclass(frozen=True)
class Load:
    """Traffic of one run."""

    n_requests: int = 60
    n_contents: int = 24
    chunk_tokens: int = 64
    chunks_per_request: int = 6
    suffix_tokens: int = 24
    output_tokens: int = 8


def traffic(load: Load, rate_rps: float, vocab_size: int, seed: int) -> Workload:
    """Poisson arrivals of RAG requests with token ids."""
    return rag_workload(
        f"closed-loop-{rate_rps:.3g}rps",
        seed,
        n_requests=load.n_requests,
        n_contents=load.n_contents,
        chunk_tokens=load.chunk_tokens,
        chunks_per_request=load.chunks_per_request,
        suffix_tokens=load.suffix_tokens,
        output_tokens=load.output_tokens,
        rate_rps=rate_rps,
        vocab_size=vocab_size,
    )


def simulated(
    profile: HardwareProfile, workload: Workload, plan: ReusePlan, index: ChunkIndex, n_blocks: int
) -> Timeline:
    """`serve` on the simulated executor."""
    engine = Engine(workload, profile.model, plan, index, BlockPool(n_blocks))
    return serve(workload, engine, SimExecutor(profile))


def capacity_rps(
    profile: HardwareProfile, load: Load, plan: ReusePlan, runner: Runner, tier: str
) -> float:
    """Simulated throughput with every request there at once: what utilisation refers to."""
    workload = traffic(load, 1e6, profile.model.vocab_size, 0)
    runner.prepare(workload, plan, tier)
    timeline = simulated(profile, workload, plan, runner.index(plan, tier), runner.n_kv_blocks)
    return load.n_requests / (timeline.makespan_ns / 1e9)


def compare_at(
    runner: Runner,
    profile: HardwareProfile,
    now: HardwareProfile,
    load: Load,
    plan: ReusePlan,
    tier: str,
    rate_rps: float,
    seed: int,
) -> dict[str, Any]:
    """The same traffic on both; the simulations are done first.

    Args:
        profile: as it was calibrated.
        now: the same at the machine's present speed.
    """
    workload = traffic(load, rate_rps, profile.model.vocab_size, seed)
    runner.prepare(workload, plan, tier)
    index = runner.index(plan, tier)
    first, predicted = (
        summary(simulated(p, workload, plan, index, runner.n_kv_blocks), workload)
        for p in (profile, now)
    )
    measured = summary(runner.serve(workload, plan, index).timeline, workload)
    kept = [k for k in COMPARED if measured[k]]
    return {
        "rate_rps": rate_rps,
        "n_requests": load.n_requests,
        "as_calibrated": {k: first[k] for k in COMPARED},
        "predicted": {k: predicted[k] for k in COMPARED},
        "measured": {k: measured[k] for k in COMPARED},
        "error_as_calibrated": {k: first[k] / measured[k] - 1 for k in kept},
        "error": {k: predicted[k] / measured[k] - 1 for k in kept},
    }
