"""TTFT measured on this machine: speed-up over full recompute, and overlap of load and compute.

The baseline is the fastest of Hugging Face's own forward (SDPA, last logits only) and our full
recompute: same weights, dtype and threads, interleaved in the same run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

from ..core.plan import ReusePlan
from ..core.standalone import COMPUTING, LOADING, part_of
from .collect import run_once
from .probes import SLOW_RHO, Library, Probe, Shape, plan_with

if TYPE_CHECKING:
    from ..runtime.runner import Runner

Progress = Callable[[str, int, int], None]


@dataclass
class Row:
    """One policy in one tier; all TTFTs in milliseconds, in the order measured."""

    policy: str
    tier: str
    rho: float | None
    ratio: float
    ttft_ms: list[float] = field(default_factory=list)


@dataclass
class Overlap:
    """One schedule, whole and in parts, milliseconds."""

    tier: str
    rho: float | None
    ratio: float
    whole_ms: list[float] = field(default_factory=list)
    load_ms: list[float] = field(default_factory=list)
    compute_ms: list[float] = field(default_factory=list)

    @property
    def factor(self) -> float:
        """TTFT over max(load alone, compute alone); 1 is perfect overlap."""
        return median(self.whole_ms) / max(median(self.load_ms), median(self.compute_ms))


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


def hf_forward_ms(runner: Runner, probe: Probe) -> float:
    """Hugging Face's own prefill of the whole prompt, SDPA, logits of the last token only."""
    import torch

    from ..runtime.attention import ATTENTION_NAME

    contents, request = probe.workload.contents, probe.workload.requests[0]
    ids = [t for c in request.chunks for t in contents[c].token_ids or ()]
    prompt = torch.tensor([[*ids, *(request.suffix_ids or ())]])
    model = runner.loaded.hf
    model.set_attn_implementation("sdpa")
    try:
        with torch.inference_mode():
            started = time.perf_counter_ns()
            model(prompt, use_cache=True, logits_to_keep=1)
            return (time.perf_counter_ns() - started) / 1e6
    finally:
        model.set_attn_implementation(ATTENTION_NAME)


def speedups(
    runner: Runner,
    shape: Shape,
    ratio: float,
    tiers: dict[str, float | None],
    n_repeats: int,
    progress: Progress | None = None,
    **knobs: object,
) -> tuple[list[Row], list[float]]:
    """Rows of every policy in every tier, and the Hugging Face times, all interleaved.

    Args:
        tiers: name to rho, None where the tier is not limited.
    """
    workload = Library(runner.spec, 0).workload(shape)
    plans = policy_plans(ratio, shape.chunk_tokens, **knobs)
    rows = [Row("full_recompute", "", None, 1.0)]
    rows += [
        Row(policy, tier, rho, 0.0 if policy in ("full_reuse", "prefix_cache") else ratio)
        for tier, rho in tiers.items()
        for policy in plans
        if policy != "full_recompute"
    ]
    probes = [Probe(r.policy, workload, plans[r.policy], r.tier or next(iter(tiers))) for r in rows]
    hf_ms: list[float] = []
    for turn in range(n_repeats + 1):
        elapsed = hf_forward_ms(runner, probes[0])
        if turn:
            hf_ms.append(elapsed)
        for i, (row, probe) in enumerate(zip(rows, probes, strict=True)):
            timeline = run_once(runner, probe, prepare=turn == 0)
            if turn:
                row.ttft_ms.append(timeline.makespan_ns / 1e6)
            if progress is not None:
                progress("ttft", turn * len(rows) + i + 1, (n_repeats + 1) * len(rows))
    return rows, hf_ms


def overlaps(
    runner: Runner,
    shape: Shape,
    tiers: dict[str, float | None],
    ratios: Sequence[float],
    n_repeats: int,
    **knobs: object,
) -> list[Overlap]:
    """The same schedule whole, loads alone and compute alone, interleaved.

    The first turn warms up, unless the schedule mostly waits for a rate limiter.
    """
    workload = Library(runner.spec, 0).workload(shape)
    request = workload.requests[0]
    out = []
    for tier, rho in tiers.items():
        for ratio in ratios:
            plan = plan_with("cachetune", ratio, **knobs)
            runner.prepare(workload, plan, tier)
            index = runner.index(plan, tier)
            decisions, whole = runner.schedule(workload, request, plan, index)
            parts = (whole, part_of(whole, LOADING), part_of(whole, COMPUTING))
            one = Overlap(tier, rho, ratio)
            warm_up = rho is None or rho < SLOW_RHO
            for turn in range(not warm_up, n_repeats + 1):
                times = [
                    runner.execute_schedule(workload, plan, decisions, part).timeline
                    for part in parts
                ]
                if turn:
                    for found, timeline in zip(
                        (one.whole_ms, one.load_ms, one.compute_ms), times, strict=True
                    ):
                        found.append(timeline.makespan_ns / 1e6)
            out.append(one)
    return out
