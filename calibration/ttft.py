"""TTFT measured on this machine: every policy in four ledgers, against the fastest full prefill.

The baseline is the fastest of Hugging Face's `generate` and our full recompute: same weights, dtype
and threads, interleaved in the same run. Ideals come from the limits of that run.
"""

from __future__ import annotations

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
    from ..runtime.runner import Runner
    from ..runtime.tiers import TierConfig
    from .ceilings import Ceiling

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
    **knobs: object,
) -> Measured:
    """Rows of `policies` in one tier and the peers' times, interleaved; the first turn warms up."""
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
    peer_ms: dict[str, list[float]] = {name: [] for name in peers_of(device)}
    total = (n_repeats + 1) * (len(rows) + len(peer_ms))
    for turn in range(n_repeats + 1):
        for i, name in enumerate(peer_ms):
            elapsed = generate_ms(runner.loaded, workload, name)
            if turn:
                peer_ms[name].append(elapsed)
            _tell(progress, tier, turn * (total // (n_repeats + 1)) + i + 1, total)
        for i, (row, probe) in enumerate(zip(rows, probes, strict=True)):
            run = run_on_path(runner, probe)
            if turn:
                row.runs.append(run)
            at = turn * (total // (n_repeats + 1)) + len(peer_ms) + i + 1
            _tell(progress, tier, at, total)
    return Measured(rows, peer_ms, preparations)


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
