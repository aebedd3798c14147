"""Spans to coefficients: non-negative least squares on relative residuals, bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, median

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import lsq_linear, nnls

from ..core.hardware import Coefficient, FitReport, Tier
from ..core.model_spec import ModelSpec
from ..core.ops import Op, OpKind, Span
from ..core.rng import rng
from ..core.timeline import Timeline
from ..core.units import s_to_ns
from ..simulator.cost import (
    DISPATCH_GAP,
    FEATURES,
    WAKE_AFTER_NS,
    features,
    wake_coefficient,
)
from ..simulator.interference import (
    LOSES_TO,
    coefficient_of,
    moving_share,
    slowed_of,
    source_of,
)
from .collect import Measured

N_BOOTSTRAP = 200
SUMMED: tuple[OpKind, ...] = ("prefill", "select")
"""What matters of them is their sum over a prompt, and one that waits for its core takes several
times as long: the sum over each probe is fitted, robustly."""
ROBUST_ROUNDS = 6
LEAST_RESIDUAL = 0.02
"""Of the robust fit: relative residuals below this count alike."""
MOST_LOST = 0.9
"""Upper bound of a share of speed that one source can cost."""
INTERFERED: tuple[OpKind, ...] = ("prefill", "restore", "load")
"""Kinds that interference is fitted on; others of their stream suffer the same."""


@dataclass(frozen=True)
class Sample:
    """One op and its duration: median over repeats, seconds."""

    op: Op
    seconds: float
    extras: Mapping[str, float] = field(default_factory=dict)
    """By coefficient, what the op's sizes do not tell: seconds beside others, waking up."""
    probe: str = ""


@dataclass(frozen=True)
class Fit:
    """Coefficients of one kind, and how well they explain its samples."""

    coefficients: dict[str, Coefficient]
    report: FitReport


def fit_kind(kind: OpKind, samples: Sequence[Sample], model: ModelSpec, seed: int) -> Fit:
    """Fit the features of `simulator.cost` for one op kind.

    Args:
        samples: at least one; ops without rows are left out by the caller.
        seed: of the bootstrap.
    """
    rows = [features(s.op, model) for s in samples]
    return fit_rows(list(FEATURES[kind]), rows, samples, seed, summed=kind in SUMMED)


def fit_loads(samples: Sequence[Sample], media: Mapping[str, str], seed: int) -> Fit:
    """`load.op`, and for each medium the seconds per read and per byte of one worker.

    Args:
        samples: loads from tiers as they are, alone and beside other ops.
        media: medium by tier.
    """
    names = ["load.op"]
    names += [f"load.{medium}.{what}" for medium in media.values() for what in ("read", "byte")]
    rows = []
    for sample in samples:
        row = dict.fromkeys(names, 0.0)
        medium = media[sample.op.tier]
        row |= {
            "load.op": 1.0,
            f"load.{medium}.read": float(sample.op.n_reads),
            f"load.{medium}.byte": float(sample.op.n_bytes),
        }
        rows.append(row)
    return fit_rows(names, rows, samples, seed)


def fit_rows(
    names: list[str],
    rows: list[dict[str, float]],
    samples: Sequence[Sample],
    seed: int,
    *,
    summed: bool = False,
) -> Fit:
    """Fit `rows` of features, and what the samples carry beside them, to their seconds.

    `summed`: sums over each probe are fitted, robustly; the report is of the samples all the same.
    """
    for extra in sorted({extra for s in samples for extra in s.extras}):
        names.append(extra)
        for row, sample in zip(rows, samples, strict=True):
            row[extra] = sample.extras.get(extra, 0.0)
    x = np.array([[row[name] for name in names] for row in rows])
    y = np.array([s.seconds for s in samples])
    if summed:
        probes = list(dict.fromkeys(s.probe for s in samples))
        of = np.array([[float(s.probe == probe) for s in samples] for probe in probes])
        coefficients = intervals(of @ x, of @ y, names, seed, robust=True)
    else:
        coefficients = intervals(x, y, names, seed)
    value = np.array([coefficients[name].value for name in names])
    return Fit(coefficients, report(y, x @ value))


def intervals(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    names: Sequence[str],
    seed: int,
    *,
    robust: bool = False,
) -> dict[str, Coefficient]:
    """Coefficients by name with 95 % intervals, by bootstrap over the samples."""
    upper = [MOST_LOST if n.startswith("interference.") else np.inf for n in names]
    value = solve(x, y, upper, robust=robust)
    draws = rng(seed, "bootstrap", *names)
    picks = [draws.integers(0, len(y), len(y)) for _ in range(N_BOOTSTRAP)]
    found = [solve(x[i], y[i], upper, robust=robust) for i in picks]
    low, high = np.percentile(found, [2.5, 97.5], axis=0)
    return {
        name: Coefficient(
            value=float(value[i]),
            unit=_unit(name),
            low=float(min(low[i], value[i])),
            high=float(max(high[i], value[i])),
        )
        for i, name in enumerate(names)
    }


def solve(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    upper: Sequence[float] | None = None,
    *,
    robust: bool = False,
) -> NDArray[np.float64]:
    """Coefficients in [0, upper] that minimise the sum of squared *relative* residuals.

    `robust`: of their absolute values instead, by weights that are found again and again.
    """
    own = 1.0 / np.maximum(y, 1e-9)
    value = _bounded(x, y, own, upper)
    for _ in range(ROBUST_ROUNDS if robust else 0):
        residual = np.maximum(np.abs(x @ value - y) * own, LEAST_RESIDUAL)
        value = _bounded(x, y, own / np.sqrt(residual), upper)
    return value


def _bounded(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    weight: NDArray[np.float64],
    upper: Sequence[float] | None,
) -> NDArray[np.float64]:
    scale = np.abs(x).max(axis=0)
    scale[scale == 0] = 1.0
    a, b = x / scale * weight[:, None], y * weight
    if upper is None or not np.isfinite(upper).any():
        return np.asarray(nnls(a, b)[0] / scale)
    limits = np.maximum(np.asarray(upper) * scale, 1e-12)
    return np.asarray(lsq_linear(a, b, bounds=(0.0, limits)).x / scale)


def report(y: NDArray[np.float64], predicted: NDArray[np.float64]) -> FitReport:
    """R² and median absolute relative error."""
    spread = float(((y - y.mean()) ** 2).sum())
    residual = float(((y - predicted) ** 2).sum())
    return FitReport(
        n_spans=len(y),
        r2=1.0 - residual / spread if spread > 0 else 1.0,
        error_median=float(median(np.abs(predicted - y) / y)),
    )


def samples_of(
    measured: Measured, tiers: Mapping[str, Tier], load_op_s: float = 0.0
) -> list[Sample]:
    """Each op of a probe: median seconds, and means over the repeats of what was beside it.

    Args:
        load_op_s: `load.op`, which is a part of a load's own work.
    """
    extras = [extras_of(t, tiers, load_op_s) for t in measured.timelines]
    samples = []
    for op in measured.ops():
        names = {name for found in extras for name in found[op.op_id]}
        beside = {n: mean(f[op.op_id].get(n, 0.0) for f in extras) for n in names}
        seconds = measured.median_ns(op.op_id) / 1e9
        samples.append(Sample(op, seconds, beside, measured.probe.name))
    return samples


def extras_of(
    timeline: Timeline, tiers: Mapping[str, Tier], load_op_s: float = 0.0
) -> dict[int, dict[str, float]]:
    """By op id: seconds beside each source of interference, and 1 where a stream had to wake."""
    found = {}
    for spans in timeline.by_stream().values():
        idle_since_ns: int | None = None
        for span in spans:
            extras = _beside_s(timeline, span, tiers, load_op_s)
            woke = idle_since_ns is None or span.start_ns - idle_since_ns >= WAKE_AFTER_NS
            extras[wake_coefficient(span.op.kind)] = float(woke)
            found[span.op.op_id] = extras
            idle_since_ns = span.end_ns
    return found


def _beside_s(
    timeline: Timeline, span: Span, tiers: Mapping[str, Tier], load_op_s: float
) -> dict[str, float]:
    """Seconds of `span` during which each source of interference was active on another stream."""
    found: dict[str, float] = {}
    if span.op.kind not in INTERFERED:
        return found
    slowed = slowed_of(span.op)
    loses_to = LOSES_TO.get(slowed, ())
    for other in timeline.spans:
        if other.op.stream == span.op.stream:
            continue
        source = source_of(other.op, tiers)
        if source not in loses_to:
            continue
        both_ns = _overlap_ns(span, other.start_ns, other.end_ns)
        if other.op.kind == "load" and (share := moving_share(tiers[other.op.tier])) < 1.0:
            tier = tiers[other.op.tier]
            own_ns = s_to_ns(load_op_s + other.op.n_reads * tier.read_latency_s)
            moves_ns = min(other.end_ns, other.start_ns + own_ns)
            both_ns -= (1.0 - share) * _overlap_ns(span, moves_ns, other.end_ns)
        name = coefficient_of(slowed, source)
        found[name] = found.get(name, 0.0) + both_ns / 1e9
    return {k: min(v, span.duration_ns / 1e9) for k, v in found.items()}


def _overlap_ns(span: Span, start_ns: int, end_ns: int) -> float:
    return float(max(0, min(span.end_ns, end_ns) - max(span.start_ns, start_ns)))


def dispatch_gap(timelines: Sequence[Timeline], seed: int) -> Coefficient:
    """Median time from an op being ready (stream free, dependencies done) to its start."""
    gaps: list[float] = []
    for timeline in timelines:
        ended = {s.op.op_id: s.end_ns for s in timeline.spans}
        for spans in timeline.by_stream().values():
            gaps += [max(0, s.start_ns - r) / 1e9 for s, r in _ready(spans, ended)]
    values = np.array(gaps)
    draws = rng(seed, "bootstrap", DISPATCH_GAP)
    medians = [
        np.median(values[draws.integers(0, len(values), len(values))]) for _ in range(N_BOOTSTRAP)
    ]
    low, high = np.percentile(medians, [2.5, 97.5])
    return Coefficient(value=float(np.median(values)), unit="s", low=float(low), high=float(high))


def _ready(spans: Sequence[Span], ended: dict[int, int]) -> list[tuple[Span, int]]:
    out = []
    free_ns = 0
    for span in spans:
        deps = [ended[d] for d in span.op.deps if d in ended]
        out.append((span, max([span.submit_ns, free_ns, *deps])))
        free_ns = span.end_ns
    return out


def _unit(name: str) -> str:
    feature = name.split(".", 1)[1]
    if name.startswith("interference."):
        return "share of speed"
    if feature.endswith("flop"):
        return "s/flop"
    return "s/byte" if feature.endswith("byte") else "s"
