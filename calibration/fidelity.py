"""Fidelity: predict held-out schedules, write that down, then measure them.

Both run the same ops (`core.engine.batch_schedule_of`), joined by op id. The A/A error, one half
of the repeats against the other, is what no model can beat on this machine.

A shared machine is faster in one minute than in another, so a check begins with some of the
probes again: the profile is aligned to them (`align.py`), and predictions are of the machine as it
is now. What the profile would have said without that is predicted and reported beside it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from ..core.executor import execute
from ..core.hardware import HardwareProfile
from ..core.ops import OpKind, Schedule
from ..core.timeline import Timeline
from ..simulator.executor import SimExecutor
from .align import align, factors_of, ms_by_kind
from .calibrate import PROBED_RHO, open_runner
from .collect import Measured, collect, run_once, ttft_ms
from .probes import Library, Probe, held_out, ladder

if TYPE_CHECKING:
    from ..runtime.loaded_model import LoadedModel
    from ..runtime.runner import Runner

TTFT_MEDIAN_BOUND = 0.05
TTFT_P95_BOUND = 0.12
OP_MEDIAN_BOUND = 0.08

ANCHOR_EVERY, ANCHOR_ROUNDS = 2, 5
"""Every second probe again, in so many rounds: half a minute."""


@dataclass
class Point:
    """One held-out schedule: predicted before it was measured."""

    name: str
    tier: str
    limited: bool
    policy: str
    n_prompt: int
    ttft_ms_predicted: float
    ttft_ms_measured: list[float]
    op_ms_predicted: dict[str, float]
    op_ms_measured: dict[str, list[float]]
    ttft_ms_as_calibrated: float = 0.0
    op_ms_as_calibrated: dict[str, float] = field(default_factory=dict)

    @property
    def ttft_error(self) -> float:
        """Signed relative error of the predicted TTFT against the median measured."""
        measured = median(self.ttft_ms_measured)
        return (self.ttft_ms_predicted - measured) / measured

    @property
    def a_a_error(self) -> float:
        """Median of even repeats against median of odd ones."""
        even, odd = self.ttft_ms_measured[::2], self.ttft_ms_measured[1::2]
        return (median(even) - median(odd)) / median(odd)


def simulate_schedule(profile: HardwareProfile, schedule: Schedule) -> Timeline:
    """One fixed DAG on the simulated executor, without noise."""
    return execute(schedule, SimExecutor(profile))


def anchor(
    profile: HardwareProfile,
    runner: Runner,
    max_tokens: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[HardwareProfile, dict[OpKind, float]]:
    """The profile at the machine's present speed, and by kind what ops take now over then."""
    tiers = [n for n, t in profile.tiers.items() if t.rho is None or t.rho < PROBED_RHO]
    probes = ladder(Library(profile.model, profile.provenance.seed), tiers, max_tokens)[
        ::ANCHOR_EVERY
    ]
    tell = progress or (lambda what, done, total: None)
    measured = collect(runner, probes, ANCHOR_ROUNDS, lambda i, n: tell("speed now", i, n))
    return align(profile, measured), factors_of(profile, measured)


def predict(
    profile: HardwareProfile, now: HardwareProfile, runner: Runner, probes: Sequence[Probe]
) -> list[Point]:
    """Predictions only; nothing of these schedules has run.

    Args:
        profile: as it was calibrated.
        now: aligned to the machine's present speed; the predictions that count are by it.
    """
    points = []
    for probe in probes:
        runner.prepare(probe.workload, probe.plan, probe.tier)
        index = runner.index(probe.plan, probe.tier)
        _, schedule = runner.batch_schedule(probe.workload, probe.plan, index, probe.n_decode)
        timeline = simulate_schedule(now, schedule)
        as_calibrated = simulate_schedule(profile, schedule)
        points.append(
            Point(
                name=probe.name,
                tier=probe.tier,
                limited=profile.tier(probe.tier).limited,
                policy=probe.plan.policy,
                n_prompt=probe.n_prompt,
                ttft_ms_predicted=ttft_ms(timeline),
                ttft_ms_measured=[],
                op_ms_predicted=ms_by_kind(timeline),
                op_ms_measured={},
                ttft_ms_as_calibrated=ttft_ms(as_calibrated),
                op_ms_as_calibrated=ms_by_kind(as_calibrated),
            )
        )
    return points


def check(
    profile: HardwareProfile,
    loaded: LoadedModel,
    *,
    seed: int,
    n_schedules: int = 30,
    n_repeats: int = 5,
    max_tokens: int = 1024,
    tiers: Sequence[str] | None = None,
    on_predicted: Callable[[list[dict[str, Any]]], None] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[list[Point], dict[OpKind, float]]:
    """Draw, anchor, predict, hand the predictions to `on_predicted`, then measure interleaved.

    Returns:
        The points, and the machine's speed at the check over its speed when it was calibrated.
    """
    library = Library(profile.model, seed)
    rhos = {name: profile.tier(name).rho for name in tiers or profile.tiers}
    probes = held_out(library, rhos, max_tokens, n_schedules, seed)
    with (
        tempfile.TemporaryDirectory(prefix="cachetune-") as folder,
        open_runner(profile, loaded, folder) as runner,
    ):
        now, drift = anchor(profile, runner, max_tokens, progress)
        points = predict(profile, now, runner, probes)
        if on_predicted is not None:
            on_predicted([asdict(p) for p in points])
        measure(runner, probes, points, n_repeats, progress)
    return points, drift


def measure(
    runner: Runner,
    probes: Sequence[Probe],
    points: Sequence[Point],
    n_repeats: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Fill in the measured values, one warm-up round and then interleaved repeats."""
    measured = [Measured(p) for p in probes]
    for turn in range(n_repeats + 1):
        for i, (one, point) in enumerate(zip(measured, points, strict=True)):
            timeline = run_once(runner, one.probe)
            if turn > 0:
                point.ttft_ms_measured.append(ttft_ms(timeline))
                for kind, ms in ms_by_kind(timeline).items():
                    point.op_ms_measured.setdefault(kind, []).append(ms)
            if progress is not None:
                progress("held-out", turn * len(probes) + i + 1, len(probes) * (n_repeats + 1))


def summarise(points: Sequence[Point], drift: Mapping[OpKind, float]) -> dict[str, Any]:
    """Errors as fractions: TTFT overall and by kind of tier, by op kind signed and absolute."""
    out: dict[str, Any] = {"n_points": len(points), "drift": dict(drift)}
    for label, group in (
        ("", list(points)),
        ("_limited", [p for p in points if p.limited]),
        ("_unlimited", [p for p in points if not p.limited]),
    ):
        if group:
            errors = [p.ttft_error for p in group]
            out[f"ttft_error_median{label}"] = median(abs(e) for e in errors)
            out[f"ttft_error_p95{label}"] = p95([abs(e) for e in errors])
            out[f"ttft_error_signed_median{label}"] = median(errors)
    out["a_a_error_median"] = median(abs(p.a_a_error) for p in points)
    out["a_a_error_p95"] = p95([abs(p.a_a_error) for p in points])
    kinds = sorted({k for p in points for k in p.op_ms_predicted})
    out["by_op"] = {kind: _op_errors(points, kind) for kind in kinds}
    plain = [p for p in points if not p.limited and "load" in p.op_ms_predicted]
    if plain:
        out["load_unlimited"] = _op_errors(plain, "load")
    out["as_calibrated"] = _as_calibrated(points)
    out["bounds"] = {
        "ttft_error_median": TTFT_MEDIAN_BOUND,
        "ttft_error_p95": TTFT_P95_BOUND,
        "op_error_median": OP_MEDIAN_BOUND,
    }
    return out


def _as_calibrated(points: Sequence[Point]) -> dict[str, Any]:
    """The errors that the profile would have had without knowing the machine's present speed."""
    before = [
        replace(p, ttft_ms_predicted=p.ttft_ms_as_calibrated, op_ms_predicted=p.op_ms_as_calibrated)
        for p in points
    ]
    errors = [abs(p.ttft_error) for p in before]
    kinds = sorted({k for p in before for k in p.op_ms_predicted})
    return {
        "ttft_error_median": median(errors),
        "ttft_error_p95": p95(errors),
        "by_op": {kind: _op_errors(before, kind)["error_median"] for kind in kinds},
    }


def p95(values: Sequence[float]) -> float:
    """The smallest value that at least 95 % do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * 95 // 100) - 1)]


def _op_errors(points: Sequence[Point], kind: str) -> dict[str, float]:
    errors = [
        (p.op_ms_predicted[kind] - median(p.op_ms_measured[kind])) / median(p.op_ms_measured[kind])
        for p in points
        if kind in p.op_ms_predicted
    ]
    repeats = [p.op_ms_measured[kind] for p in points if kind in p.op_ms_predicted]
    return {
        "n": len(errors),
        "error_median": median(abs(e) for e in errors),
        "signed_median": median(errors),
        "a_a_error_median": median(abs(median(r[::2]) / median(r[1::2]) - 1) for r in repeats),
    }
