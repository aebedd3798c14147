"""Spans to coefficients: non-negative least squares on relative residuals, bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from ..core.hardware import Coefficient, FitReport
from ..core.model_spec import ModelSpec
from ..core.ops import Op, OpKind, Span
from ..core.rng import rng
from ..core.timeline import Timeline
from ..simulator.cost import DISPATCH_GAP, FEATURES, features

N_BOOTSTRAP = 200
UNITS = {"op": "s", "layer": "s", "piece": "s", "row": "s", "row_layer": "s", "gap": "s"}


@dataclass(frozen=True)
class Sample:
    """One op and its duration: median over repeats, seconds."""

    op: Op
    seconds: float


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
    names = FEATURES[kind]
    rows = [features(s.op, model) for s in samples]
    x = np.array([[row[name] for name in names] for row in rows])
    y = np.array([s.seconds for s in samples])
    value = solve(x, y)
    draws = rng(seed, "bootstrap", kind)
    boot = np.array(
        [
            solve(x[pick], y[pick])
            for pick in (draws.integers(0, len(y), len(y)) for _ in range(N_BOOTSTRAP))
        ]
    )
    low, high = np.percentile(boot, [2.5, 97.5], axis=0)
    coefficients = {
        name: Coefficient(
            value=float(value[i]),
            unit=_unit(name),
            low=float(min(low[i], value[i])),
            high=float(max(high[i], value[i])),
        )
        for i, name in enumerate(names)
    }
    return Fit(coefficients, report(y, x @ value))


def solve(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Non-negative coefficients that minimise the sum of squared *relative* residuals."""
    scale = np.abs(x).max(axis=0)
    scale[scale == 0] = 1.0
    weight = 1.0 / np.maximum(y, 1e-9)
    found: NDArray[np.float64] = nnls(x / scale * weight[:, None], y * weight)[0] / scale
    return found


def report(y: NDArray[np.float64], predicted: NDArray[np.float64]) -> FitReport:
    """R² and median absolute relative error."""
    spread = float(((y - y.mean()) ** 2).sum())
    residual = float(((y - predicted) ** 2).sum())
    return FitReport(
        n_spans=len(y),
        r2=1.0 - residual / spread if spread > 0 else 1.0,
        error_median=float(median(np.abs(predicted - y) / y)),
    )


def dispatch_gap(timelines: Sequence[Timeline]) -> Coefficient:
    """Median time from an op being ready (stream free, dependencies done) to its start."""
    gaps: list[float] = []
    for timeline in timelines:
        ended = {s.op.op_id: s.end_ns for s in timeline.spans}
        for spans in timeline.by_stream().values():
            gaps += [max(0, s.start_ns - r) / 1e9 for s, r in _ready(spans, ended)]
    low, high = np.percentile(gaps, [2.5, 97.5])
    return Coefficient(value=median(gaps), unit=_unit(DISPATCH_GAP), low=low, high=high)


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
    if feature.endswith("flop"):
        return "s/flop"
    return "s/byte" if feature == "byte" else UNITS[feature]
