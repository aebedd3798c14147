"""End-to-end validation: real vLLM runs against the step loop on measured operator tables.

One scalar, the host overhead per step, is fitted per engine version, and each bundle is predicted
with the scalar fitted on the *other* bundles (leave one out). Errors are signed:
predicted / measured - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import WorkloadError
from ..simulator.step_loop import StepLoop
from ..simulator.step_profile import StepProfile
from .bundles import Bundle, profile_of, read_bundle

Floats = NDArray[np.float64]

BOUNDS = {
    ("ttft", "mean"): 0.04,
    ("tpot", "mean"): 0.015,
    ("e2e", "mean"): 0.015,
    ("ttft", "p99"): 0.03,
    ("tpot", "p99"): 0.03,
    ("e2e", "p99"): 0.03,
}
"""Largest |error| asked for, set before measuring; p50 and per-request errors are reported only."""

STATISTICS = ("mean", "p50", "p99")
LARGEST_OVERHEAD_S = 0.02
FIT_STEPS = 12  # bisections: 20 ms / 2^12 = 5 us


@dataclass(frozen=True)
class Run:
    """Seconds by request of one run, real or simulated."""

    ttft: Floats
    tpot: Floats
    e2e: Floats


def measured(bundle: Bundle) -> Run:
    """What the real engine did."""
    return _run(bundle, bundle.queued_s, bundle.first_token_s, bundle.last_token_s)


def predicted(bundle: Bundle, profile: StepProfile, overhead_s: float) -> Run:
    """What the step loop does with the same arrivals."""
    loop = StepLoop(bundle.limits, replace(profile, overhead_s=overhead_s), bundle.arrivals)
    lives = loop.run()
    return _run(
        bundle,
        np.array([x.queued_s for x in lives]),
        np.array([x.first_token_s for x in lives]),
        np.array([x.last_token_s for x in lives]),
    )


def fit_overhead_s(bundle: Bundle, profile: StepProfile) -> float:
    """Seconds per step that make the mean TPOT the measured one; 0 if the tables exceed it."""
    target = float(np.mean(measured(bundle).tpot))
    low, high = 0.0, LARGEST_OVERHEAD_S
    if float(np.mean(predicted(bundle, profile, low).tpot)) >= target:
        return 0.0
    for _ in range(FIT_STEPS):
        middle = (low + high) / 2
        if float(np.mean(predicted(bundle, profile, middle).tpot)) < target:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def compare(real: Run, simulated: Run) -> list[dict[str, Any]]:
    """Rows of metric, statistic, measured, predicted (seconds), error, bound, met."""
    rows: list[dict[str, Any]] = []
    for metric in ("ttft", "tpot", "e2e"):
        a, b = getattr(real, metric), getattr(simulated, metric)
        for statistic in STATISTICS:
            was, is_ = _statistic(a, statistic), _statistic(b, statistic)
            bound = BOUNDS.get((metric, statistic))
            error = is_ / was - 1
            rows.append(
                {
                    "metric": metric,
                    "statistic": statistic,
                    "measured_s": was,
                    "predicted_s": is_,
                    "error": error,
                    "bound": bound,
                    "met": None if bound is None else abs(error) <= bound,
                }
            )
        rows.append(
            {
                "metric": metric,
                "statistic": "per request",
                "measured_s": None,
                "predicted_s": None,
                "error": float(np.mean(np.abs(b / a - 1))),
                "bound": None,
                "met": None,
            }
        )
    return rows


def validate(
    folders: Sequence[str | Path], profiles: str | Path, workloads: str | Path | None = None
) -> list[dict[str, Any]]:
    """Rows for every bundle, each predicted with the overhead fitted on the others of its engine.

    Raises:
        WorkloadError: fewer than two bundles of an engine: nothing is left to fit on.
    """
    bundles = [read_bundle(folder, workloads) for folder in folders]
    with_profiles = [(b, profile_of(b, profiles)) for b in bundles]
    for bundle in bundles:
        if sum(b.engine == bundle.engine for b in bundles) < 2:
            raise WorkloadError(
                "the overhead is fitted on another bundle of the same engine version",
                values=f"only {bundle.name} is of {bundle.engine}",
                remedy="give at least two bundles of each engine version",
            )
    own = [fit_overhead_s(b, p) for b, p in with_profiles]
    rows: list[dict[str, Any]] = []
    for i, (bundle, profile) in enumerate(with_profiles):
        others = [j for j, b in enumerate(bundles) if j != i and b.engine == bundle.engine]
        overhead_s = float(np.mean([own[j] for j in others]))
        profile.beyond_grid.clear()
        found = compare(measured(bundle), predicted(bundle, profile, overhead_s))
        facts = {
            "bundle": bundle.name,
            "engine": bundle.engine,
            "overhead_ms": overhead_s * 1e3,
            "fitted_on": ", ".join(bundles[j].name for j in others),
            "own_overhead_ms": own[i] * 1e3,
            "assumed": list(bundle.assumed),
            "beyond_grid": dict(profile.beyond_grid),
        }
        rows += [{**facts, **row} for row in found]
    return rows


def find_bundles(root: str | Path) -> list[Path]:
    """Folders under `root` that hold `requests.jsonl`, in order of path."""
    found = sorted(p.parent for p in Path(root).rglob("requests.jsonl"))
    if not found:
        raise WorkloadError(
            "the folder must hold bundles",
            values=f"no requests.jsonl under {root}",
            remedy="give the folder that holds the bundles",
        )
    return found


def _run(bundle: Bundle, queued: Floats, first: Floats, last: Floats) -> Run:
    later = np.maximum(bundle.n_output - 1, 1)
    return Run(ttft=first - queued, tpot=(last - first) / later, e2e=last - queued)


def _statistic(values: Floats, name: str) -> float:
    return float(np.mean(values) if name == "mean" else np.percentile(values, float(name[1:])))
