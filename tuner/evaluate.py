"""One simulated run of a candidate at a rate, judged against a service level."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ..core.record import Record
from ..core.step_cost import StepCost
from ..core.units import NS_PER_S
from ..simulator.serving import serve_trace
from ..simulator.serving_fleet import Fleet
from ..simulator.serving_result import ServingResult
from .traffic import Traffic
from .trial import BATCHES, Trial
from .warm_start import warm_snapshot

PER_REPLICA = 200
"""Requests of a run of several replicas, at least, for each."""


class RunLength(Record):
    """How much traffic one run has."""

    horizon_s: float = Field(default=120.0, gt=0)
    min_requests: int = Field(default=400, ge=20)
    max_requests: int = Field(default=6000, ge=20)
    warm_share: float = Field(default=0.2, ge=0, lt=1)
    """First part of each run, which is not judged. Traffic without an order (rag) and windows of a
    trace begin with the tiers that what came before leaves; chats have this part to fill them, and
    before it as long as it takes until about as many conversations are under way as later."""

    def n_requests(self, rate_rps: float) -> int:
        """Requests of a run at this rate."""
        wanted = round(rate_rps * self.horizon_s)
        return max(self.min_requests, min(self.max_requests, wanted))


def evaluate(
    fleet: Fleet,
    cost: StepCost,
    traffic: Traffic,
    length: RunLength,
    rate_rps: float,
    seed: int,
) -> Trial:
    """Serve `traffic` at a rate and judge what came after the caches were warm."""
    n_requests = max(
        length.n_requests(rate_rps), min(length.min_requests, PER_REPLICA) * fleet.n_replicas
    )
    n_ramp = round(rate_rps * traffic.ramp_s)
    table = traffic.table(n_requests + n_ramp, rate_rps, seed)
    n_ramp = min(n_ramp, len(table) // 2)
    before = traffic.before(n_requests, seed)
    if fleet.policy.name == "prefix_cache" and not table.chained:
        before = None  # its tiers keep chains, which other chunks' ids do not name
    snapshot = warm_snapshot(before, fleet) if before is not None else None
    result = serve_trace(table, fleet, cost, seed=seed, snapshot=snapshot)
    judged = np.arange(len(result)) >= n_ramp + int(length.warm_share * (len(result) - n_ramp))
    in_ttft, in_tpot = (kept[judged] for kept in result.keeps_slo())
    good = in_ttft & in_tpot
    batches = np.array_split(good, BATCHES)
    behind = falls_behind(result.arrival_ns[judged], result.ttft_ms[judged])
    metrics = {"in_ttft": float(in_ttft.mean()), "in_tpot": float(in_tpot.mean())}
    metrics |= {"traffic_s": float(np.ptp(result.arrival_ns)) / NS_PER_S}
    return Trial(
        rate_rps=rate_rps,
        seed=seed,
        good_share=float(good.mean()),
        behind=behind,
        good=tuple(int(batch.sum()) for batch in batches),
        judged=tuple(len(batch) for batch in batches),
        n_whole=traffic.n_whole,
        metrics=metrics | _metrics(result, judged) | _by_class(result, judged, good),
    )


def falls_behind(arrival_ns: NDArray[np.int64], ttft_ms: NDArray[np.float64]) -> float:
    """Seconds by which TTFT grows per second of traffic.

    The median of the slopes between any two of `BATCHES` batches, in order of arrival (Theil 1950,
    Sen 1968): a burst that passes moves it little, a queue that grows is in all of them. At a
    multiple m of what can be served it is 1 - 1/m of the time it takes to serve, or m - 1.
    """
    order = np.argsort(arrival_ns, kind="stable")
    parts = [part for part in np.array_split(order, BATCHES) if len(part)]
    at_s = np.array([arrival_ns[part].mean() for part in parts]) / NS_PER_S
    wait_s = np.array([ttft_ms[part].mean() for part in parts]) / 1e3
    one, other = np.triu_indices(len(parts), 1)
    apart_s = at_s[other] - at_s[one]
    slopes = (wait_s[other] - wait_s[one])[apart_s > 0] / apart_s[apart_s > 0]
    return float(np.median(slopes)) if len(slopes) else 0.0


def _by_class(
    result: ServingResult, judged: NDArray[np.bool_], good: NDArray[np.bool_]
) -> dict[str, Any]:
    codes = result.table.slo_class[judged]
    names = enumerate(result.table.classes)
    shares = {n: float(good[codes == c].mean()) for c, n in names if (codes == c).any()}
    return {"good_share_by_class": shares}


def _metrics(result: ServingResult, judged: NDArray[np.bool_]) -> dict[str, Any]:
    table = result.table
    end_ns = result.end_ns[judged]
    longest_ns = (end_ns - result.arrival_ns[judged]).max()  # of a few, which end together
    span_s = float(max(np.ptp(end_ns), longest_ns)) / NS_PER_S
    prompt = int(table.prompt_tokens[judged].sum(dtype=np.int64))
    output = int(table.output_tokens[judged].sum(dtype=np.int64))
    loaded = result.loaded_tokens[judged].sum(axis=0) / prompt
    law = result.littles_law()
    found: dict[str, Any] = {
        "n_requests": len(result),
        "prompt_tokens_per_s": prompt / span_s,
        "output_tokens_per_s": output / span_s,
        "gpu_hit_share": float(result.gpu_tokens[judged].sum()) / prompt,
        "loaded_share": {n: float(v) for n, v in zip(result.tier_names, loaded, strict=True)},
        "unloaded_share": float(result.unloaded_tokens[judged].sum()) / prompt,
        "recomputed_share": float(result.recomputed_tokens[judged].sum()) / prompt,
        "utilisation": float(result.busy_ns.mean()) / NS_PER_S / max(result.duration_s, 1e-9),
        "n_preemptions": int(result.n_preemptions.sum()),
        "littles_law": list(law),
    }
    for name, values in (("ttft_ms", result.ttft_ms), ("tpot_ms", result.tpot_ms)):
        values = values[judged & ~np.isnan(values)]
        p50, p99 = np.percentile(values, (50, 99)) if len(values) else (0.0, 0.0)
        found |= {f"{name}_p50": float(p50), f"{name}_p99": float(p99)}
    return found
