"""Fidelity: predict held-out schedules, write that down, then measure them.

Both run the same ops (`core.engine.batch_schedule_of`), joined by op id. The A/A error, one half
of the repeats against the other, is what no model can beat on this machine.

A shared machine's speed moves while a check lasts, so every repeat is predicted by itself, just
before it runs: the profile at the speed of the probes that ran before it (`speed.py`). What the
profile says without that is written before anything runs, and reported beside it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from ..core.hardware import HardwareProfile
from ..core.ops import OpKind
from ..core.timeline import Timeline
from .align import ms_by_kind, simulate_schedule
from .calibrate import open_runner
from .collect import run_once, ttft_ms
from .probes import Library, Probe, held_out
from .speed import Speed, known_probes

if TYPE_CHECKING:
    from ..runtime.loaded_model import LoadedModel
    from ..runtime.runner import Runner

TTFT_MEDIAN_BOUND = 0.05
TTFT_P95_BOUND = 0.12
OP_MEDIAN_BOUND = 0.08

PROBES_BETWEEN = 2
"""Between two schedules: all of calibration's probes have run again within about half a minute."""


@dataclass
class Point:
    """One held-out schedule: each repeat was predicted before it was measured."""

    name: str
    tier: str
    limited: bool
    policy: str
    n_prompt: int
    ttft_ms_as_calibrated: float
    op_ms_as_calibrated: dict[str, float]
    ttft_ms_predicted: list[float] = field(default_factory=list)
    ttft_ms_measured: list[float] = field(default_factory=list)
    op_ms_predicted: dict[str, list[float]] = field(default_factory=dict)
    op_ms_measured: dict[str, list[float]] = field(default_factory=dict)

    @property
    def ttft_error(self) -> float:
        """Signed relative error of the predicted TTFT, median over the repeats."""
        return _error(self.ttft_ms_predicted, self.ttft_ms_measured)

    @property
    def a_a_error(self) -> float:
        """Median of even repeats against median of odd ones."""
        return _halves(self.ttft_ms_measured)

    def op_error(self, kind: str) -> float:
        """Signed relative error of the time of all ops of a kind, median over the repeats."""
        return _error(self.op_ms_predicted[kind], self.op_ms_measured[kind])


Prediction = dict[str, Any]
"""What is written before a run: schedule, repeat (none: as calibrated), TTFT and ms by op kind."""


def check(
    profile: HardwareProfile,
    loaded: LoadedModel,
    *,
    seed: int,
    n_schedules: int = 30,
    n_repeats: int = 5,
    max_tokens: int = 1024,
    tiers: Sequence[str] | None = None,
    device: str = "",
    on_predicted: Callable[[Prediction], None] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    keep: Callable[[list[Point], dict[OpKind, float]], object] | None = None,
) -> tuple[list[Point], dict[OpKind, float]]:
    """Draw; predict as calibrated; then interleaved, for each repeat: predict it, measure it.

    Args:
        device: as of `open_runner`.
        on_predicted: is handed each prediction before its schedule runs.
        keep: is handed what there is after each round, from the second on.

    Returns:
        The points, and by kind the time ops took while checking over what the profile says.
    """
    library = Library(profile.model, seed)
    rhos = {name: profile.tier(name).rho for name in tiers or profile.tiers}
    probes = held_out(library, rhos, max_tokens, n_schedules, seed)
    with (
        tempfile.TemporaryDirectory(prefix="cachetune-") as folder,
        open_runner(profile, loaded, folder, device) as runner,
    ):
        held = [_Held(profile, runner, probe) for probe in probes]
        tell = on_predicted or (lambda prediction: None)
        for one in held:
            tell(one.as_calibrated())
        speed = Speed(profile, runner, known_probes(profile, max_tokens), progress)
        factors: dict[OpKind, list[float]] = {}
        for turn in range(n_repeats + 1):
            for i, one in enumerate(held):
                for _ in range(PROBES_BETWEEN):
                    speed.step()
                if turn == 0:
                    one.run()
                else:
                    tell(one.predict(speed.now(), turn))
                    one.measure()
                    for kind, factor in speed.factors().items():
                        factors.setdefault(kind, []).append(factor)
                if progress is not None:
                    progress("held-out", turn * len(held) + i + 1, len(held) * (n_repeats + 1))
            if keep is not None and turn > 1:  # A/A needs two repeats
                keep(*_found(held, factors))
    return _found(held, factors)


def _found(
    held: Sequence[_Held], factors: Mapping[OpKind, list[float]]
) -> tuple[list[Point], dict[OpKind, float]]:
    return [one.point for one in held], {kind: median(found) for kind, found in factors.items()}


class _Held:
    """A held-out schedule and its point."""

    def __init__(self, profile: HardwareProfile, runner: Runner, probe: Probe) -> None:
        runner.prepare(probe.workload, probe.plan, probe.tier)
        index = runner.index(probe.plan, probe.tier)
        _, self._schedule = runner.batch_schedule(probe.workload, probe.plan, index, probe.n_decode)
        self._runner, self._probe = runner, probe
        timeline = simulate_schedule(profile, self._schedule)
        self.point = Point(
            name=probe.name,
            tier=probe.tier,
            limited=profile.tier(probe.tier).limited,
            policy=probe.plan.policy,
            n_prompt=probe.n_prompt,
            ttft_ms_as_calibrated=ttft_ms(timeline),
            op_ms_as_calibrated=ms_by_kind(timeline),
        )

    def as_calibrated(self) -> Prediction:
        point = self.point
        return _prediction(point.name, None, point.ttft_ms_as_calibrated, point.op_ms_as_calibrated)

    def predict(self, now: HardwareProfile, turn: int) -> Prediction:
        """By the profile at the machine's present speed."""
        timeline = simulate_schedule(now, self._schedule)
        at_ms, by_kind = ttft_ms(timeline), ms_by_kind(timeline)
        self.point.ttft_ms_predicted.append(at_ms)
        for kind, ms in by_kind.items():
            self.point.op_ms_predicted.setdefault(kind, []).append(ms)
        return _prediction(self.point.name, turn, at_ms, by_kind)

    def run(self) -> Timeline:
        return run_once(self._runner, self._probe)

    def measure(self) -> None:
        timeline = self.run()
        self.point.ttft_ms_measured.append(ttft_ms(timeline))
        for kind, ms in ms_by_kind(timeline).items():
            self.point.op_ms_measured.setdefault(kind, []).append(ms)


def _prediction(
    name: str, turn: int | None, at_ms: float, by_kind: Mapping[str, float]
) -> Prediction:
    return {"schedule": name, "repeat": turn, "ttft_ms": at_ms, "op_ms": dict(by_kind)}


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
    """The errors of the profile by itself, which knows nothing of the machine's present speed."""
    errors = [
        abs(_error([p.ttft_ms_as_calibrated] * len(p.ttft_ms_measured), p.ttft_ms_measured))
        for p in points
    ]
    by_op: dict[str, list[float]] = {}
    for p in points:
        for kind, ms in p.op_ms_as_calibrated.items():
            took = p.op_ms_measured[kind]
            by_op.setdefault(kind, []).append(abs(_error([ms] * len(took), took)))
    return {
        "ttft_error_median": median(errors),
        "ttft_error_p95": p95(errors),
        "by_op": {kind: median(found) for kind, found in sorted(by_op.items())},
    }


def p95(values: Sequence[float]) -> float:
    """The smallest value that at least 95 % do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * 95 // 100) - 1)]


def _op_errors(points: Sequence[Point], kind: str) -> dict[str, float]:
    having = [p for p in points if kind in p.op_ms_predicted]
    errors = [p.op_error(kind) for p in having]
    return {
        "n": len(errors),
        "error_median": median(abs(e) for e in errors),
        "signed_median": median(errors),
        "a_a_error_median": median(abs(_halves(p.op_ms_measured[kind])) for p in having),
    }


def _error(predicted: Sequence[float], measured: Sequence[float]) -> float:
    return median((p - m) / m for p, m in zip(predicted, measured, strict=True))


def _halves(repeats: Sequence[float]) -> float:
    return median(repeats[::2]) / median(repeats[1::2]) - 1
