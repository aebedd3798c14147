"""Requests per second at saturation: all of them there at once, short outputs, the real loop.

Ledgers as for TTFT, and the ideal of each row: prefill shrinks by the flops that are skipped,
loads are hidden or not, and all else (decode, heads, hand-overs) takes what the baseline's took.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from ..core.plan import ReusePlan
from ..core.policies import order_of
from ..core.timeline import Timeline
from ..core.workload import Workload
from .ideal import Work, load_rate, op_flops
from .ledgers import Preparation, prepare
from .probes import Probe, plan_with

if TYPE_CHECKING:
    from ..core.model_spec import ModelSpec
    from ..runtime.runner import Runner
    from ..runtime.tiers import TierConfig
    from .ceilings import Ceiling

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]

BASELINE: Final = "full_recompute"
AT_A_RATIO = ("cacheblend", "epic", "cachetune")
PREFILLS = ("prefill", "select")


@dataclass
class Served:
    """One plan: every run's duration by the executor's clock and by the wall, seconds."""

    label: str
    plan: ReusePlan
    makespan_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    prefill_s: list[float] = field(default_factory=list)
    """Time in prefill ops."""
    n_decode_steps: int = 0
    work: Work = field(default_factory=lambda: Work(0, 0))
    """Flops of the prefills and bytes of the loads."""
    all_flops: int = 0
    loaded: set[str] = field(default_factory=set)
    """Contents that some request loaded."""


def plans_at(
    ratios: Sequence[float], policies: Sequence[str], chunk_tokens: int, **knobs: object
) -> dict[str, ReusePlan]:
    """The baseline, then every policy; those with a ratio at each of `ratios`."""
    plans = {BASELINE: plan_with(BASELINE, 1.0, **knobs)}
    for policy in policies:
        if policy in AT_A_RATIO:
            for ratio in ratios:
                k = max(1, round(ratio * chunk_tokens))
                plan = {"policy": policy, "rules": ({"ratios": (ratio,)},), "epic_tokens": k}
                plans[f"{policy} {ratio:g}"] = ReusePlan.model_validate({**plan, **knobs})
        elif policy != BASELINE:
            rules = ({"ratios": (0.0,)},)
            plans[policy] = ReusePlan.model_validate({"policy": policy, "rules": rules, **knobs})
    return plans


def serve_all(
    runner: Runner,
    workload: Workload,
    plans: Mapping[str, ReusePlan],
    tier: str,
    n_repeats: int,
    progress: Progress | None = None,
    keep: Callable[[list[Served], dict[str, Preparation]], None] | None = None,
) -> tuple[list[Served], dict[str, Preparation]]:
    """Serve the workload under every plan, interleaved; the first turn warms up.

    Args:
        keep: is handed what there is after each turn that counts.
    """
    preparations: dict[str, Preparation] = {}
    rows = [Served(label, plan) for label, plan in plans.items()]
    for row in rows:
        prepare(runner, Probe(row.label, workload, row.plan, tier), preparations)
    for turn in range(n_repeats + 1):
        for i, row in enumerate(rows):
            runner.index(row.plan, tier)
            began = time.perf_counter()
            timeline = runner.serve(workload, row.plan, runner.index(row.plan)).timeline
            wall_s = time.perf_counter() - began
            if turn:
                _note(row, timeline, wall_s, workload, runner.spec)
            if progress is not None:
                progress("throughput", turn * len(rows) + i + 1, (n_repeats + 1) * len(rows))
        if turn and keep is not None:
            keep(rows, preparations)
    return rows, preparations


def _note(
    row: Served, timeline: Timeline, wall_s: float, workload: Workload, model: ModelSpec
) -> None:
    row.makespan_s.append(timeline.makespan_ns / 1e9)
    row.wall_s.append(wall_s)
    prefills = [s for s in timeline.spans if s.op.kind in PREFILLS]
    row.prefill_s.append(sum(s.duration_ns for s in prefills) / 1e9)
    loads = [s.op for s in timeline.spans if s.op.kind == "load"]
    row.work = Work(sum(op_flops(s.op, model) for s in prefills), sum(op.n_bytes for op in loads))
    row.all_flops = sum(op_flops(s.op, model) for s in timeline.spans)
    row.n_decode_steps = sum(s.op.kind == "decode" for s in timeline.spans)
    chunks = {r.request_id: r.chunks for r in workload.requests}
    row.loaded = {chunks[op.request_ids[0]][ordinal] for op in loads for ordinal in op.chunks}


def hf_seconds(runner: Runner, workload: Workload, n_requests: int) -> list[float]:
    """Hugging Face `generate`, one request after another: seconds of each, after a warm-up.

    Without one a GPU's libraries would plan, within the time, for each length of the keys. Empty
    where they refuse, which is told.
    """
    from .hf_peer import generate_ms

    found = []
    for request in (workload.requests[0], *workload.requests[:n_requests]):
        alone = workload.replace(requests=(request,))
        try:
            ms = generate_ms(runner.loaded, alone, "hf generate", request.output_tokens)
        except RuntimeError as e:  # no plan for this shape, no memory left
            log.warning("hf generate did not run: %s", str(e).strip().partition("\n")[0])
            return []
        found.append(ms / 1e3)
    return found[1:]


def ledgers(
    rows: Sequence[Served],
    preparations: Mapping[str, Preparation],
    workload: Workload,
    config: TierConfig,
    ceilings: Mapping[str, Ceiling],
) -> list[dict[str, Any]]:
    """Every plan with its four ledgers and its ideal."""
    n = len(workload.requests)
    base = rows[0]
    base_s, base_wall_s = median(base.makespan_s), median(base.wall_s)
    other_s = max(0.0, base_s - median(base.prefill_s))
    rate, limit = load_rate(config, ceilings)
    out = []
    for row in rows:
        took_s, wall_s = median(row.makespan_s), median(row.wall_s)
        preparation = preparations.get(order_of(row.plan), Preparation())
        prepare_s = sum(preparation.by_content.get(c, 0.0) for c in row.loaded)
        load_s = row.work.n_bytes / rate
        left = row.work.flops / base.work.flops
        ideal_s = max(load_s, left * median(base.prefill_s)) + other_s
        limit_s = max(load_s, row.all_flops / ceilings["matmul"].rate)
        gain_s = (base_wall_s - wall_s) / n
        needed = math.ceil(prepare_s / gain_s) if gain_s > 0 else None
        out.append(
            {
                "plan": row.label,
                "n": len(row.makespan_s),
                "rps": n / took_s,
                "rps_min": n / max(row.makespan_s),
                "rps_max": n / min(row.makespan_s),
                "path_rps": n / wall_s,
                "prepared_rps": n / (wall_s + prepare_s),
                "prepare_s": prepare_s,
                "break_even_requests": needed if prepare_s else 0,
                "times_baseline": base_s / took_s,
                "flops_skipped": 1 - left,
                "n_bytes": row.work.n_bytes,
                "ideal_rps": n / ideal_s,
                "of_ideal": ideal_s / took_s,
                "limit_rps": n / limit_s,
                "of_limit": limit_s / took_s,
                "load_limit": limit,
                "n_decode_steps": row.n_decode_steps,
                "makespan_s": row.makespan_s,
                "wall_s": row.wall_s,
                "prefill_s": row.prefill_s,
            }
        )
    return out
