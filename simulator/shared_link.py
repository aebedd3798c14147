"""A link that replicas load over at the same time: requests as fluid beside layers as operations.

The peer of `serve_trace` is the layer-level simulator with an engine per replica on one executor:
streams are a device's own, the tier's link is shared, load by load. Both see the same requests,
which take turns at the replicas, on a machine made for it: compute takes time by the flop, loads by
the byte, and nothing else takes any.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..core.block_pool import BlockPool
from ..core.engine import Engine
from ..core.generators import rag_workload
from ..core.hardware import Coefficient, Device, HardwareProfile, Provenance, Tier
from ..core.layout import read_bytes
from ..core.metrics import per_request
from ..core.model_spec import ModelSpec
from ..core.ops import Op, Span
from ..core.plan import RatioRule, ReusePlan
from ..core.request_table import RequestTable
from ..core.timeline import Timeline
from ..core.warm_index import warm_index
from ..core.workload import Workload
from .cost import COEFFICIENTS
from .executor import SimExecutor
from .profile_step_cost import ProfileStepCost
from .serving import serve_trace
from .serving_fleet import Fleet, ReplicaSpec, ReusePolicy, ServingLimits, TierSpec

TIER = "store"
CHUNK_TOKENS, CHUNKS, SUFFIX_TOKENS, CONTENTS = 128, 6, 32, 40
LAYERS, RATIO = 16, 0.25
LOADED_TOKENS = CHUNK_TOKENS - round(CHUNK_TOKENS * RATIO)
"""Of a chunk: whole row groups."""
SEQUENCES, BLOCKS = 64, 10_000
FLOP_S = 4e-9
"""Milliseconds of compute for a prompt."""
NO_LIMIT = 1e15

PLAN = ReusePlan(
    policy="cachetune",
    rules=(RatioRule(ratios=(RATIO,)),),
    layer_group=1,
    look_ahead=LAYERS,
    restore_stream="restore",
    n_io_workers=1,
)
MODEL = ModelSpec(
    name="shared-link", family="llama", n_layers=LAYERS, hidden_size=512, intermediate_size=32,
    n_heads=8, n_kv_heads=8, head_dim=64, vocab_size=64, max_position=4096, dtype="float32",
)  # fmt: skip


def difference(
    load: float, share: float, *, n_requests: int = 400, n_replicas: int = 16, seed: int = 0
) -> dict[str, float]:
    """TTFT of both, and requests over layers, at a utilisation of the link.

    Args:
        load: of the link, by what all loads ask of it.
        share: time of a load alone over time of its compute.
    """
    alone = by_requests(requests(1.0, 1, seed), machine(NO_LIMIT), 1)
    load_s = share * float(alone[0]) / 1e3
    profile = machine(CHUNKS * LAYERS * read_bytes(MODEL, LOADED_TOKENS) / load_s)
    workload = requests(load / load_s, n_requests, seed)
    found = {"load": load, "load_over_compute": share}
    layers = by_layers(workload, profile, n_replicas)
    fluid = by_requests(workload, profile, n_replicas)
    for at in (50, 99):
        one, other = float(np.percentile(fluid, at)), float(np.percentile(layers, at))
        found |= {f"ttft_ms_p{at}": one, f"layers_ttft_ms_p{at}": other}
        found[f"error_p{at}"] = one / other - 1
    return found


def machine(link_bytes_per_s: float) -> HardwareProfile:
    """Its profile."""
    seconds = dict.fromkeys(COEFFICIENTS, 0.0)
    seconds |= {"prefill.flop": FLOP_S, "prefill.small_flop": FLOP_S}
    tier = Tier(
        medium="dram",
        link_bytes_per_s=link_bytes_per_s,
        worker_bytes_per_s=link_bytes_per_s,
        read_latency_s=0.0,
    )
    return HardwareProfile(
        name="shared-link",
        device=Device(name="made", kind="cpu", n_cores=1, memory_bytes=1 << 30, compute_threads=1),
        model=MODEL,
        model_fingerprint=MODEL.fingerprint(),
        tiers={TIER: tier},
        coefficients={
            name: Coefficient(value=v, unit="s", low=v, high=v, source="assumed")
            for name, v in seconds.items()
        },
        fits={},
        provenance=Provenance(command="made", commit="", machine="", versions={}, date="", seed=0),
    )


def requests(rate_rps: float, n: int, seed: int) -> Workload:
    """Prompts of passages that all lie in the tier, one token of output each."""
    found = rag_workload(
        "shared-link",
        seed,
        n_requests=n,
        n_contents=CONTENTS,
        chunk_tokens=CHUNK_TOKENS,
        chunks_per_request=CHUNKS,
        suffix_tokens=SUFFIX_TOKENS,
        output_tokens=1,
        rate_rps=rate_rps,
    )
    rows = [r.replace(max_output_tokens=r.output_tokens) for r in found.requests]
    return found.replace(requests=tuple(rows))


def by_layers(workload: Workload, profile: HardwareProfile, n: int) -> NDArray[np.float64]:
    """TTFT, ms, of `n` engines on one executor."""
    index = warm_index(workload, profile, (TIER,))
    engines = [Engine(workload, MODEL, PLAN, index, BlockPool(BLOCKS)) for _ in range(n)]
    executor = SimExecutor(profile)

    def on_device(i: int, ops: list[Op]) -> Iterator[Op]:
        for op in ops:
            deps = tuple(dep * n + i for dep in op.deps)
            yield replace(op, op_id=op.op_id * n + i, deps=deps, device=i)

    pending = sorted(workload.requests, key=lambda r: (r.arrival_ns, r.request_id), reverse=True)
    turn, spans = 0, list[Span]()
    while pending or any(engine.n_open for engine in engines):
        now_ns = executor.now_ns()
        while pending and pending[-1].arrival_ns <= now_ns:
            i, turn = turn, (turn + 1) % n
            executor.submit([*on_device(i, engines[i].on_arrival(pending.pop(), now_ns))])
        for span in executor.wait(pending[-1].arrival_ns if pending else None):
            i = span.op.device
            spans.append(span)
            own = replace(span, op=replace(span.op, op_id=span.op.op_id // n))
            executor.submit([*on_device(i, engines[i].on_done(own))])
    timeline = Timeline(tuple(spans), 0, workload.requests, workload.name)
    return np.array([m.ttft_ms for m in per_request(timeline, workload)])


def by_requests(workload: Workload, profile: HardwareProfile, n: int) -> NDArray[np.float64]:
    """TTFT, ms, of `n` replicas of `serve_trace`."""
    link = profile.tiers[TIER].link_bytes_per_s
    tier = TierSpec(name=TIER, read_bytes_per_s=link, write_bytes_per_s=link, shared=True)
    policy = ReusePolicy(
        name="cachetune",
        recompute_ratio={"*": RATIO},
        n_layers=LAYERS,
        write_back=False,
        kv_bytes_per_token=round(LAYERS * read_bytes(MODEL, LOADED_TOKENS) / LOADED_TOKENS),
    )
    limits = ServingLimits(max_num_seqs=SEQUENCES, prefix_caching=False)
    replica = ReplicaSpec(limits=limits, tiers=(tier,), loads_in_order=True)
    fleet = Fleet(policy=policy, replica=replica, n_replicas=n, router="round_robin")
    table = _table(workload)
    kept = {TIER: [np.arange(len(table.chunk_tokens))]}
    return serve_trace(table, fleet, ProfileStepCost(profile, PLAN), snapshot=kept).ttft_ms


def _table(workload: Workload) -> RequestTable:
    """The same requests as columns, in order of arrival."""
    names = {name: i for i, name in enumerate(sorted(workload.contents))}
    rows = sorted(workload.requests, key=lambda r: (r.arrival_ns, r.request_id))
    ids = [[names[c] for c in r.chunks] for r in rows]
    n = len(rows)
    return RequestTable(
        name=workload.name,
        arrival_ns=np.array([r.arrival_ns for r in rows], np.int64),
        prompt_tokens=np.array([workload.prompt_tokens(r) for r in rows], np.int32),
        output_tokens=np.array([r.output_tokens for r in rows], np.int32),
        chunk_start=np.cumsum([0, *map(len, ids)]),
        chunk_ids=np.array([c for row in ids for c in row], np.int32),
        chunk_tokens=np.array([workload.contents[c].n_tokens for c in names], np.int32),
        after=np.full(n, -1, np.int32),
        tenant=np.zeros(n, np.int16),
        slo_class=np.zeros(n, np.int16),
    )
