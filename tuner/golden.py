"""The paper's method: golden-section search over r on the real runtime, warm-started by r0.

CacheTune 2605.24022, Algorithm 1. Two variants: `paper` keeps the surviving probe after the warm
pair; `reinitialised` (the later released code) places both probes anew inside the shrunk
bracket. Both measure the final midpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any, Literal

from ..core.errors import PlanError
from ..core.plan import RatioRule, ReusePlan
from ..core.workload import Workload
from .measure import Bench

if TYPE_CHECKING:
    from ..runtime.runner import Runner

PHI = 0.618
"""As the paper rounds it."""

Variant = Literal["reinitialised", "paper"]


@dataclass(frozen=True)
class GoldenResult:
    """The ratio found, and what finding it cost."""

    ratio: float
    ttft_ms: float
    n_measurements: int
    """Evaluations of the objective."""
    n_runs: int
    """Prompts run for them, the repeats and requests of each evaluation included."""
    seconds: float
    probes: tuple[tuple[float, float], ...]
    """(ratio, TTFT in ms) in the order measured."""

    def to_json(self) -> dict[str, Any]:
        """For reports."""
        return {**vars(self), "probes": [list(p) for p in self.probes]}


def golden_section(
    f: Callable[[float], float],
    r0: float,
    *,
    ratio_min: float = 0.15,
    ratio_max: float = 1.0,
    tol: float = 0.01,
    variant: Variant = "reinitialised",
) -> tuple[float, float, list[tuple[float, float]]]:
    """(ratio, f(ratio), every probe) of a search on [ratio_min, ratio_max].

    Args:
        f: TTFT at a ratio; each call is a measurement, none is remembered.
        r0: roofline balance; moved into the bracket.
        tol: ends when the bracket is no wider.

    Raises:
        PlanError: an empty bracket or a tolerance that is not positive.
    """
    if not 0.0 <= ratio_min < ratio_max <= 1.0 or tol <= 0.0:
        raise PlanError(
            "the search needs 0 <= ratio_min < ratio_max <= 1 and a positive tolerance",
            values=f"{ratio_min}, {ratio_max}, tol={tol}",
            remedy="correct the values",
        )
    probes: list[tuple[float, float]] = []

    def measure(ratio: float) -> float:
        probes.append((ratio, f(ratio)))
        return probes[-1][1]

    a, b = ratio_min, ratio_max
    r0 = min(max(r0, a), b)
    if r0 <= (a + b) / 2:
        x1, x2 = r0, a + PHI * (b - a)
    else:
        x1, x2 = b - PHI * (b - a), r0
    f1, f2 = measure(x1), measure(x2)
    if variant == "reinitialised":
        a, b = (a, x2) if f1 <= f2 else (x1, b)
        x1, x2 = b - PHI * (b - a), a + PHI * (b - a)
        f1, f2 = measure(x1), measure(x2)
    while b - a > tol:
        if f1 < f2:
            b, kept = x2, (x1, f1)
        else:
            a, kept = x1, (x2, f2)
        low, high = b - PHI * (b - a), a + PHI * (b - a)
        new, other = (low, high) if b == x2 else (high, low)
        # A warm probe does not sit at a golden point: the new one may meet it, or cross it.
        new = other if abs(new - kept[0]) < tol / 10 else new
        (x1, f1), (x2, f2) = sorted([kept, (new, measure(new))])
    middle = (a + b) / 2
    return middle, measure(middle), probes


def golden_on_runtime(
    runner: Runner,
    workload: Workload,
    tier: str,
    r0: float,
    *,
    base: ReusePlan | None = None,
    ratio_min: float = 0.15,
    tol: float = 0.01,
    n_requests: int = 1,
    n_repeats: int = 5,
    variant: Variant = "reinitialised",
) -> GoldenResult:
    """Search r with everything else as in `base`; one evaluation is a mean of `n_repeats` runs.

    The paper uses 5 to 10 samples for each evaluation. One untimed run warms up.
    """
    bench = Bench(runner, workload, tier, n_requests)
    plan = base or ReusePlan()
    bench.once(plan)
    warm_runs = bench.n_runs
    begin_s = time.perf_counter()

    def ttft_ms(ratio: float) -> float:
        at = with_ratio(plan, ratio)
        return mean(bench.once(at) for _ in range(n_repeats))

    ratio, best_ms, probes = golden_section(
        ttft_ms, r0, ratio_min=ratio_min, tol=tol, variant=variant
    )
    seconds = time.perf_counter() - begin_s
    n_runs = bench.n_runs - warm_runs
    return GoldenResult(ratio, best_ms, len(probes), n_runs, seconds, tuple(probes))


def with_ratio(plan: ReusePlan, ratio: float) -> ReusePlan:
    """`plan` with one ratio for every tier and layer."""
    load_exact = plan.rules[0].load_exact
    return plan.replace(rules=(RatioRule(ratios=(ratio,), load_exact=load_exact),))
