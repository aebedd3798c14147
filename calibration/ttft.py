"""TTFT measured on this machine: every policy in four ledgers, against the fastest full prefill.

The baseline is the fastest of Hugging Face's `generate` and our full recompute: same weights, dtype
and threads, interleaved in the same run. Ideals come from the limits of that run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from ..core.plan import ReusePlan
from ..core.policies import order_of
from .hf_peer import generate_ms, peers_of
from .ideal import Ideal, Work, ideal_speedup, load_rate
from .ledgers import (
    OnPath,
    Preparation,
    break_even,
    loaded_contents,
    prepare,
    run_on_path,
)
from .probes import Library, Probe, Shape, plan_with

if TYPE_CHECKING:
    from ..core.workload import Workload
    from ..runtime.runner import Runner
    from ..runtime.tiers import TierConfig
    from .ceilings import Ceiling

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]

BASELINE = "full_recompute"


@dataclass
class Row:
    """One policy in one tier, in the order measured."""

    policy: str
    tier: str
    ratio: float
    work: Work
    contents: dict[str, int]
    """Contents that are loaded, with their tokens."""
    runs: list[OnPath] = field(default_factory=list)

    def middle(self, name: str) -> float:
        """Median over the runs, milliseconds."""
        times: list[float] = [getattr(run, name) for run in self.runs]
        return median(times)


@dataclass
class Measured:
    """All rows of one tier, the peers' times, and what the preparation took by order."""

    rows: list[Row]
    peer_ms: dict[str, list[float]]
    preparations: dict[str, Preparation]
    peer_trouble: dict[str, str] = field(default_factory=dict)
    """Peers that did not run here, and why."""

    def baseline_ms(self, ledger: str) -> float:
        """The fastest full prefill of the run, ours taken as `ttft_ms` or `path_ms`."""
        ours = [r.middle(ledger) for r in self.rows if r.policy == BASELINE]
        return min([*ours, *(median(times) for times in self.peer_ms.values())])


def policy_plans(ratio: float, chunk_tokens: int, **knobs: object) -> dict[str, ReusePlan]:
    """Every policy at one budget."""
    k = max(1, round(ratio * chunk_tokens))
    return {
        "full_recompute": plan_with("full_recompute", 1.0, **knobs),
        "prefix_cache": plan_with("prefix_cache", 0.0, **knobs),
        "full_reuse": plan_with("full_reuse", 0.0, **knobs),
        "cacheblend": plan_with("cacheblend", ratio, **knobs),
        "epic": plan_with("epic", ratio, epic_tokens=k, **knobs),
        "cachetune": plan_with("cachetune", ratio, **knobs),
    }


def measure_tier(
    runner: Runner,
    shape: Shape,
    ratio: float,
    tier: str,
    policies: Sequence[str],
    n_repeats: int,
    device: str = "cpu",
    progress: Progress | None = None,
    keep: Callable[[Measured], None] | None = None,
    **knobs: object,
) -> Measured:
    """Rows of `policies` in one tier and the peers' times, interleaved; the first turn warms up.

    Args:
        keep: is handed what there is after each turn that counts.
    """
    workload = Library(runner.spec, 0).workload(shape)
    plans = policy_plans(ratio, shape.chunk_tokens, **knobs)
    wanted = [BASELINE, *(p for p in policies if p != BASELINE)]
    probes = [Probe(p, workload, plans[p], tier) for p in wanted]
    preparations: dict[str, Preparation] = {}
    rows = []
    for probe in probes:
        prepare(runner, probe, preparations)
        contents, work = loaded_contents(runner, probe)
        policy = probe.plan.policy
        share = {"full_recompute": 1.0, "full_reuse": 0.0, "prefix_cache": 0.0}.get(policy, ratio)
        rows.append(Row(policy, tier, share, work, contents))
    measured = Measured(rows, {name: [] for name in peers_of(device)}, preparations)
    total = (n_repeats + 1) * (len(rows) + len(measured.peer_ms))
    done = 0
    for turn in range(n_repeats + 1):
        for name in list(measured.peer_ms):
            elapsed = _peer_ms(measured, runner, workload, name)
            if turn and elapsed is not None:
                measured.peer_ms[name].append(elapsed)
            _tell(progress, tier, done := done + 1, total)
        for row, probe in zip(rows, probes, strict=True):
            run = run_on_path(runner, probe)
            if turn:
                row.runs.append(run)
            _tell(progress, tier, done := done + 1, total)
        if turn and keep is not None:
            keep(measured)
    return measured


def _peer_ms(measured: Measured, runner: Runner, workload: Workload, name: str) -> float | None:
    """A peer's time; one whose libraries refuse is left out from then on, and that is told."""
    try:
        return generate_ms(runner.loaded, workload, name)
    except RuntimeError as e:  # no plan for this shape, no memory left
        why = (str(e).strip() or type(e).__name__).splitlines()[0][:160]
    log.warning("%s did not run, and is no baseline: %s", name, why)
    measured.peer_trouble[name] = why
    del measured.peer_ms[name]
    return None


def _tell(progress: Progress | None, tier: str, done: int, total: int) -> None:
    if progress is not None:
        progress(f"ttft {tier}", done, total)


def ledgers(
    measured: Measured,
    plans: Mapping[str, ReusePlan],
    config: TierConfig,
    ceilings: Mapping[str, Ceiling],
) -> list[dict[str, Any]]:
    """Every row with its four ledgers and its ideal, ready to be written and printed."""
    full = next(r for r in measured.rows if r.policy == BASELINE)
    alone_ms, whole_ms = measured.baseline_ms("ttft_ms"), measured.baseline_ms("path_ms")
    rate, limit = load_rate(config, ceilings)
    out = []
    for row in measured.rows:
        ideal = Ideal.of(row.work, rate, ceilings["matmul"].rate)
        could = ideal_speedup(alone_ms, full.work, row.work, ideal.load_ms)
        preparation = measured.preparations.get(order_of(plans[row.policy]), Preparation())
        prepare_ms = preparation.of(row.contents)
        ttft_ms, path_ms = row.middle("ttft_ms"), row.middle("path_ms")
        raw = [run.ttft_ms for run in row.runs]
        out.append(
            {
                "policy": row.policy,
                "tier": row.tier,
                "ratio": row.ratio,
                "n": len(row.runs),
                "ttft_ms": ttft_ms,
                "ttft_ms_min": min(raw),
                "ttft_ms_max": max(raw),
                "lookup_ms": row.middle("lookup_ms"),
                "path_ms": path_ms,
                "prepare_ms": prepare_ms,
                "prepared_ms": prepare_ms + path_ms,
                "break_even": break_even(prepare_ms, path_ms, whole_ms) if prepare_ms else 0,
                "speedup": alone_ms / ttft_ms,
                "path_speedup": whole_ms / path_ms,
                "prepared_speedup": whole_ms / (prepare_ms + path_ms),
                "flops": row.work.flops,
                "flops_skipped": 1 - row.work.flops / full.work.flops,
                "n_bytes": row.work.n_bytes,
                "ideal_load_ms": ideal.load_ms,
                "ideal_compute_ms": ideal.compute_ms,
                "ideal_ms": ideal.ms,
                "of_ideal": ideal.ms / ttft_ms,
                "ideal_speedup": could,
                "of_ideal_speedup": alone_ms / ttft_ms / could,
                "load_limit": limit,
                "preparation_parts": preparation.parts if row.contents else {},
                "runs": [vars(run) for run in row.runs],
            }
        )
    return out
