"""The simulator's budget: the tuner runs it hundreds of times."""

from __future__ import annotations

import time

from cachetune.core.block_pool import BlockPool
from cachetune.core.engine import Engine
from cachetune.core.executor import serve
from cachetune.core.generators import rag_workload
from cachetune.core.plan import ReusePlan
from cachetune.simulator.executor import SimExecutor
from support import make_index, make_model, make_profile

N_REQUESTS = 200
OPS_PER_S = 4_000
"""A third of what a slow shared core reached; a fresh laptop core does ten times this."""


def test_rag_workload_runs_in_its_budget():
    """8 chunks, 49 ops before decode, 64 tokens out; 1,000 such requests must fit in seconds."""
    model = make_model(n_layers=32, max_position=8192)
    workload = rag_workload(
        "speed", 0, n_requests=N_REQUESTS, chunk_tokens=512, zipf_a=0.9, rate_rps=20_000.0
    )
    engine = Engine(
        workload, model, ReusePlan(), make_index(workload, model=model), BlockPool(100_000)
    )
    start = time.process_time()
    timeline = serve(workload, engine, SimExecutor(make_profile(model=model)))
    seconds = time.process_time() - start
    n_ops = len(timeline.spans)
    assert n_ops >= 49 * N_REQUESTS
    print(f"{n_ops} ops in {seconds:.2f} s: {n_ops / seconds:,.0f} ops/s")
    assert n_ops / seconds > OPS_PER_S
