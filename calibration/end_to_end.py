"""End-to-end validation: real vLLM runs against the step loop on measured operator tables.

One scalar, the host overhead per step, is fitted per engine version, and each bundle is predicted
with the scalar fitted on *other* bundles (leave one out; `host_overhead.py` says on which). Errors
are signed: predicted / measured - 1. A bundle that cannot be predicted is named with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import ModelError, ProfileError, WorkloadError
from ..simulator.step_loop import StepLoop
from ..simulator.step_profile import StepProfile
from .bundle_profile import profile_of
from .bundles import Bundle, read_bundle
from .host_overhead import HostOverhead, evidence_for, kept, overhead_s

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
OVERHEADS_S = (-0.002, 0.02)
"""Where the fit looks: below zero the tables are slower than the run."""
FIT_STEPS = 12  # bisections: 22 ms / 2^12 = 5 us


@dataclass(frozen=True)
class Run:
    """Seconds by request of one run, real or simulated."""

    ttft: Floats
    tpot: Floats
    """Of requests with more than one token."""
    e2e: Floats


def measured(bundle: Bundle) -> Run:
    """What the real engine did."""
    return _run(bundle, bundle.queued_s, bundle.first_token_s, bundle.last_token_s)


def predicted(bundle: Bundle, profile: StepProfile, overhead_s: float) -> Run:
    """What the step loop does with the same arrivals."""
    seconds = replace(profile, overhead_s=overhead_s).steps_s
    loop = StepLoop(bundle.limits, seconds, bundle.arrivals, bundle.n_engines)
    lives = loop.run()
    return _run(
        bundle,
        np.array([x.queued_s for x in lives]),
        np.array([x.first_token_s for x in lives]),
        np.array([x.last_token_s for x in lives]),
    )


def fit_overhead_s(bundle: Bundle, profile: StepProfile) -> float:
    """Seconds per step that bring the median signed error of TPOT over requests to zero.

    Negative if the tables exceed the run: alone that is no overhead, but the mean over bundles
    needs it. The median, as for the silicon sample: requests of the beginning and the end, whose
    steps hold few sequences of unequal lengths, do not decide.
    """
    real = measured(bundle).tpot
    low, high = OVERHEADS_S
    for _ in range(FIT_STEPS):
        middle = (low + high) / 2
        ratio = predicted(bundle, profile, middle).tpot / real
        if float(np.median(ratio)) < 1:
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
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Rows for every bundle, each predicted with the overhead fitted on others of its engine.

    Returns:
        The rows, and the bundles that are not predicted with the reason: several engines, a model
        or operator tables that are not known, or nothing to fit the overhead on.

    Raises:
        WorkloadError: a malformed bundle, or none that can be predicted.
    """
    known, left_out = _known(folders, profiles, workloads)
    own = [HostOverhead.of(b, fit_overhead_s(b, p)) for b, p in known]
    before = [k for k in kept() if not any(k.is_of(b) for b, _ in known)]
    rows: list[dict[str, Any]] = []
    for i, (bundle, profile) in enumerate(known):
        evidence = evidence_for(bundle, own + before)
        if not evidence:
            why = f"no other bundle of {bundle.engine} to fit the overhead on"
            left_out.append({"bundle": bundle.name, "why": why})
            continue
        seconds = overhead_s(evidence)
        profile.beyond_grid.clear()
        found = compare(measured(bundle), predicted(bundle, profile, seconds))
        facts = {
            "bundle": bundle.name,
            "engine": bundle.engine,
            "overhead_ms": seconds * 1e3,
            "fitted_on": ", ".join(e.bundle for e in evidence),
            "own_overhead_ms": own[i].overhead_ms,
            "assumed": list(bundle.assumed),
            "beyond_grid": dict(profile.beyond_grid),
        }
        rows += [{**facts, **row} for row in found]
    if not rows:
        raise WorkloadError(
            "a bundle is predicted with the overhead fitted on another of its engine version",
            values="; ".join(f"{x['bundle']}: {x['why']}" for x in left_out),
            remedy="give at least two bundles of an engine version, and their operator profiles",
        )
    return rows, left_out


def _known(
    folders: Sequence[str | Path], profiles: str | Path, workloads: str | Path | None
) -> tuple[list[tuple[Bundle, StepProfile]], list[dict[str, str]]]:
    """Bundles with their step profile, and those that have none with the reason."""
    known: list[tuple[Bundle, StepProfile]] = []
    left_out: list[dict[str, str]] = []
    for folder in folders:
        try:
            bundle = read_bundle(folder, workloads)
            if not (bundle.n_output > 1).any():
                raise ModelError("some request must have a TPOT", values="one token each")
            known.append((bundle, profile_of(bundle, profiles)))
        except (ModelError, ProfileError) as e:
            left_out.append({"bundle": str(folder), "why": str(e)})
    return known, left_out


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
    later, several = bundle.n_output - 1, bundle.n_output > 1
    tpot = (last - first)[several] / later[several]
    return Run(ttft=first - queued, tpot=tpot, e2e=last - queued)


def _statistic(values: Floats, name: str) -> float:
    return float(np.mean(values) if name == "mean" else np.percentile(values, float(name[1:])))
