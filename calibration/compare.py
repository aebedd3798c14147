"""Policies and plans side by side in every tier: the same schedules, predicted then measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import mean, median
from typing import TYPE_CHECKING

from ..core.hardware import HardwareProfile
from ..core.plan import ReusePlan
from ..core.workload import Workload
from .align import simulate_schedule
from .collect import run_once
from .probes import Probe

if TYPE_CHECKING:
    from ..runtime.runner import Runner

Progress = Callable[[str, int, int], None]

SLOW_MS = 1000.0
"""Runs predicted to take longer mostly wait on a rate limiter: no warm-up, two repeats."""
VERY_SLOW_MS = 4000.0
"""One measurement."""


@dataclass
class Row:
    """One plan in one tier over a few requests, each alone."""

    label: str
    tier: str
    rho: float
    """Transfer over recompute time per token."""
    plan: ReusePlan
    recompute_ratio: float
    ttft_ms_predicted: float = 0.0
    """Mean over the requests."""
    ttft_ms_measured: list[float] = field(default_factory=list)
    """One per repeat: mean over the requests."""
    speedup: float = 0.0
    """Median TTFT of the first row measured in turn with this one, over this one's."""
    quality: float | None = None

    @property
    def ttft_ms(self) -> float:
        """Median measured."""
        return median(self.ttft_ms_measured)

    @property
    def error(self) -> float:
        """Signed relative error of the prediction."""
        return (self.ttft_ms_predicted - self.ttft_ms) / self.ttft_ms


def single_requests(workload: Workload, n_requests: int) -> list[Workload]:
    """The first requests, each as a workload of its own over its own contents."""
    alone = []
    for request in workload.requests[:n_requests]:
        one = request.replace(request_id=0, arrival_ns=0, max_output_tokens=1, output_tokens=1)
        contents = {c: workload.contents[c] for c in request.chunks}
        alone.append(workload.replace(contents=contents, requests=(one,)))
    return alone


def predict_rows(
    runner: Runner, profile: HardwareProfile, workloads: Sequence[Workload], rows: Sequence[Row]
) -> None:
    """Fill in the predictions and have every chunk in its tier; nothing is measured."""
    for row in rows:
        times = []
        for workload in workloads:
            runner.prepare(workload, row.plan, row.tier)
            index = runner.index(row.plan, row.tier)
            _, schedule = runner.schedule(workload, workload.requests[0], row.plan, index)
            times.append(simulate_schedule(profile, schedule).makespan_ns / 1e6)
        row.ttft_ms_predicted = mean(times)


def turns_of(row: Row, n_repeats: int) -> range:
    """The turns in which a row runs; turn 0 warms up and is not counted."""
    if row.ttft_ms_predicted > VERY_SLOW_MS:
        return range(1, 2)
    if row.ttft_ms_predicted > SLOW_MS:
        return range(1, min(2, n_repeats) + 1)
    return range(n_repeats + 1)


def measure_rows(
    runner: Runner,
    workloads: Sequence[Workload],
    rows: Sequence[Row],
    n_repeats: int,
    progress: Progress | None = None,
) -> None:
    """Interleaved repeats after one warm-up; the first row is the baseline of the speed-ups."""
    for turn in range(n_repeats + 1):
        for i, row in enumerate(rows):
            if turn not in turns_of(row, n_repeats):
                continue
            probes = [Probe(row.label, w, row.plan, row.tier) for w in workloads]
            times = [run_once(runner, p).makespan_ns / 1e6 for p in probes]
            if turn:
                row.ttft_ms_measured.append(mean(times))
            if progress is not None:
                progress(f"tier {row.tier}", turn * len(rows) + i + 1, (n_repeats + 1) * len(rows))
    for row in rows:
        row.speedup = rows[0].ttft_ms / row.ttft_ms
