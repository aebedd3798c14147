"""Slower tiers: the ratio at which loading and computing take the same time, measured.

For a tier of rho (transfer over recompute, per token) the bound is the least over r of max(load
alone, compute alone). Loads of a rate-limited tier are known from their bytes; compute is measured.
A chunk that is exact at its place may be loaded whole or computed; each way has a curve of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.layout import GROUP_TOKENS
from ..core.ops import Schedule
from ..core.plan import RatioRule, ReusePlan
from ..core.standalone import COMPUTING, LOADING, part_of
from ..core.timeline import Timeline
from .ideal import Work
from .probes import Library, Shape

if TYPE_CHECKING:
    from ..core.workload import Workload
    from ..runtime.runner import Runner

Progress = Callable[[str, int, int], None]

BOUND = 1.10
"""A measured TTFT may exceed the bound by this factor."""
RATIO_STEP = 0.01
SCREENING = 3
"""Times that every plan is measured; the repeats after those are the best one's."""
SLOW_RHO = 1.0
"""Where a token takes longer to load than to compute, exact chunks are computed."""


@dataclass(frozen=True)
class ComputeCurve:
    """Compute alone at several ratios, increasing, and bytes to load; no tier in it."""

    load_exact: bool
    ratios: tuple[float, ...]
    compute_ms: tuple[tuple[float, ...], ...]
    """All repeats of each ratio."""
    n_bytes: tuple[int, ...]
    fine_ratios: tuple[float, ...]
    fine_bytes: tuple[int, ...]
    """Whole row groups are read, so bytes go down in steps."""

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> ComputeCurve:
        """As `asdict` made it."""
        lists = {k: tuple(v) for k, v in data.items() if k not in ("load_exact", "compute_ms")}
        times = tuple(tuple(t) for t in data["compute_ms"])
        return ComputeCurve(load_exact=data["load_exact"], compute_ms=times, **lists)

    def at(self, ratio: float) -> float:
        """Compute alone, ms, on straight lines between the measured ratios."""
        middle = [median(times) for times in self.compute_ms]
        return float(np.interp(ratio, self.ratios, middle))

    def bounds_ms(self, limit_bytes_per_s: float, slower: float = 1.0) -> list[float]:
        """max(load, compute) at each measured ratio; computing takes `slower` times as long now."""
        loads = [1e3 * n / limit_bytes_per_s for n in self.n_bytes]
        return [max(a, slower * median(b)) for a, b in zip(loads, self.compute_ms, strict=True)]

    def balanced(self, limit_bytes_per_s: float) -> tuple[float, float]:
        """The ratio with the least max(load, compute), and that in ms."""
        compute = np.array([self.at(ratio) for ratio in self.fine_ratios])
        load = np.array(self.fine_bytes) * 1e3 / limit_bytes_per_s
        either = np.maximum(load, compute)
        at = int(np.argmin(either))
        return self.fine_ratios[at], float(either[at])


@dataclass
class Balanced:
    """One plan in one limited tier: whole, loads alone, compute alone; milliseconds."""

    label: str
    ratios: tuple[float, ...]
    work: Work
    whole_ms: list[float] = field(default_factory=list)
    load_ms: list[float] = field(default_factory=list)
    compute_ms: list[float] = field(default_factory=list)
    busy_beside_ms: list[float] = field(default_factory=list)
    """Time in compute ops with loads beside them."""
    busy_alone_ms: list[float] = field(default_factory=list)

    @property
    def slowdown(self) -> float:
        """How much longer compute ops take with loads beside them; 1 is not at all."""
        return median(self.busy_beside_ms) / median(self.busy_alone_ms)

    @property
    def parts_ms(self) -> float:
        """max(load alone, compute alone)."""
        return max(median(self.load_ms), median(self.compute_ms))


def _plan(ratios: tuple[float, ...], load_exact: bool, **knobs: object) -> ReusePlan:
    rules = (RatioRule(ratios=ratios, load_exact=load_exact),)
    return ReusePlan.model_validate({"policy": "cachetune", "rules": rules, **knobs})


def compute_curve(
    runner: Runner,
    shape: Shape,
    ratios: Sequence[float],
    load_exact: bool,
    tier: str,
    n_repeats: int,
    progress: Progress | None = None,
    **knobs: object,
) -> ComputeCurve:
    """Compute alone at every ratio, interleaved after one warm-up; `tier` only lends its chunks."""
    workload = Library(runner.spec, 0).workload(shape)
    runner.prepare(workload, _plan((1.0,), load_exact, **knobs), tier)

    def lowered(ratio: float) -> tuple[ReusePlan, Any, Schedule]:
        plan = _plan((ratio,), load_exact, **knobs)
        return (plan, *runner.batch_schedule(workload, plan, runner.index(plan, tier)))

    cases = [lowered(ratio) for ratio in ratios]
    times: list[list[float]] = [[] for _ in ratios]
    for turn in range(n_repeats + 1):
        for i, (plan, decisions, whole) in enumerate(cases):
            one_turn = _Turn(runner, workload, plan, decisions)
            timeline = one_turn.run(part_of(whole, COMPUTING))
            if turn:
                times[i].append(timeline.makespan_ns / 1e6)
            if progress is not None:
                what = f"compute alone, exact chunks {'loaded' if load_exact else 'computed'}"
                progress(what, turn * len(cases) + i + 1, (n_repeats + 1) * len(cases))
    steps = round((ratios[-1] - ratios[0]) / RATIO_STEP)
    fine = [round(ratios[0] + RATIO_STEP * i, 4) for i in range(steps + 1)]
    return ComputeCurve(
        load_exact,
        tuple(ratios),
        tuple(map(tuple, times)),
        tuple(Work.of(whole, runner.spec).n_bytes for _, _, whole in cases),
        tuple(fine),
        tuple(Work.of(lowered(ratio)[2], runner.spec).n_bytes for ratio in fine),
    )


def candidates(
    ratio: float, n_layers: int, chunk_tokens: int, load_exact: bool, **knobs: object
) -> dict[str, ReusePlan]:
    """Plans of about the same work: one ratio, the first layer whole, falling with depth.

    A first layer that is computed whole has nothing to wait for, and the others give back what it
    takes. Where ratios fall, the first load and the last layer, which nothing overlaps, are short.
    Both may load all layers ahead, and load whole row groups: of a part of one, all is read.
    """
    n_rest = n_layers - 1
    plans = {"same in all layers": _plan((ratio,), load_exact, **knobs)}
    if n_rest:
        rest = max(0.0, (n_layers * ratio - 1) / n_rest)
        first = min(1.0, 2 * ratio)
        ahead = {**knobs, "look_ahead": n_layers}
        shapes: dict[str, Iterable[float]] = {
            "first layer whole": [1.0, *([rest] * n_rest)],
            "falling": np.linspace(first, 2 * ratio - first, n_layers),
        }
        for label, wanted in shapes.items():
            ratios = tuple(_whole_groups(float(r), chunk_tokens) for r in wanted)
            plans[label] = _plan(ratios, load_exact, **ahead)
    return plans


def _whole_groups(ratio: float, chunk_tokens: int) -> float:
    """The nearest ratio at which a chunk's load is whole row groups."""
    n_groups = chunk_tokens // GROUP_TOKENS
    loaded = GROUP_TOKENS * round((1 - ratio) * chunk_tokens / GROUP_TOKENS)
    return (chunk_tokens - min(loaded, GROUP_TOKENS * n_groups)) / chunk_tokens


def measure_balanced(
    runner: Runner,
    shape: Shape,
    tier: str,
    plans: dict[str, ReusePlan],
    n_repeats: int,
    progress: Progress | None = None,
) -> list[Balanced]:
    """Each plan whole and in parts, interleaved; loads alone only wait, so they run once.

    After `SCREENING` turns only the best plan goes on, so that its median is not the least of
    several that scatter; the first still computes alone, which tells by how much the machine is
    slower than when the curves were measured.
    """
    workload = Library(runner.spec, 0).workload(shape)
    cases = []
    for label, plan in plans.items():
        runner.prepare(workload, plan, tier)
        decisions, whole = runner.batch_schedule(workload, plan, runner.index(plan, tier))
        one = Balanced(label, plan.rule(tier, 1).ratios, Work.of(whole, runner.spec))
        cases.append((one, _Turn(runner, workload, plan, decisions), whole))
    found = [case[0] for case in cases]
    best: Balanced | None = None
    for turn in range(n_repeats + 1):
        if turn > SCREENING and best is None:
            best = min(found, key=lambda one: median(one.whole_ms))
        for one, one_turn, whole in cases:
            if best is None or best is one:
                _note(one, one_turn, whole, turn)
            elif one is found[0]:
                alone = one_turn.run(part_of(whole, COMPUTING))
                one.compute_ms.append(alone.makespan_ns / 1e6)
        if progress is not None:
            progress(tier, turn + 1, n_repeats + 1)
    return found


def _note(one: Balanced, one_turn: _Turn, whole: Schedule, turn: int) -> None:
    """Measure and keep one turn; turn 0 warms up."""
    beside, alone = one_turn.run(whole), one_turn.run(part_of(whole, COMPUTING))
    if turn:
        one.whole_ms.append(beside.makespan_ns / 1e6)
        one.compute_ms.append(alone.makespan_ns / 1e6)
        one.busy_beside_ms.append(_computing_ms(beside))
        one.busy_alone_ms.append(_computing_ms(alone))
    if turn == 1:
        one.load_ms.append(one_turn.run(part_of(whole, LOADING)).makespan_ns / 1e6)


@dataclass(frozen=True)
class _Turn:
    runner: Runner
    workload: Workload
    plan: ReusePlan
    decisions: Any

    def run(self, schedule: Schedule) -> Timeline:
        """All of it or a part."""
        arguments = (self.workload, self.plan, self.decisions, schedule)
        return self.runner.execute_schedule(*arguments).timeline


def _computing_ms(timeline: Timeline) -> float:
    return sum(s.duration_ns for s in timeline.spans if s.op.kind in COMPUTING) / 1e6


def summarise(
    found: Sequence[Balanced],
    curves: Sequence[ComputeCurve],
    rho: float,
    limit_bytes_per_s: float,
    slower: float,
) -> list[dict[str, Any]]:
    """Rows with the bound; the speed-up is over the curve's ratio 1 that loads nothing.

    Args:
        slower: computing in the minutes of `found` over computing in those of `curves`, by one
            schedule that both measured. Without it, the bound would be another minute's.
    """
    bounds = [ms for curve in curves for ms in curve.bounds_ms(limit_bytes_per_s, slower)]
    bound_ms = min([*bounds, *(one.parts_ms for one in found)])
    whole = next(c for c in curves if not c.load_exact)
    full_ms = slower * whole.at(1.0)
    return [
        {
            "rho": rho,
            "plan": one.label,
            "ratio": sum(one.ratios) / len(one.ratios),
            "ttft_ms": median(one.whole_ms),
            "load_ms": median(one.load_ms),
            "compute_ms": median(one.compute_ms),
            "bound_ms": bound_ms,
            "factor": median(one.whole_ms) / bound_ms,
            "must": BOUND,
            "overlap": median(one.whole_ms) / one.parts_ms,
            "slowdown": one.slowdown,
            "slower": slower,
            "speedup": full_ms / median(one.whole_ms),
            "allowed_speedup": (1 + rho) / rho,
            "n": len(one.whole_ms),
            "n_bytes": one.work.n_bytes,
            "flops": one.work.flops,
            "limited": True,
            "ratios": one.ratios,
            "whole_ms_runs": one.whole_ms,
            "compute_ms_runs": one.compute_ms,
        }
        for one in found
    ]
