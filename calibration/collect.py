"""Run probes on the real executor: warm-up left out, repeats interleaved."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import mean, median
from typing import TYPE_CHECKING

from ..core.ops import Op, Span
from ..core.timeline import Timeline
from .probes import Probe

if TYPE_CHECKING:
    from ..runtime.runner import Runner


@dataclass
class Measured:
    """All repeats of one probe."""

    probe: Probe
    timelines: list[Timeline] = field(default_factory=list)

    def ops(self) -> list[Op]:
        """The DAG, in submission order."""
        return [s.op for s in sorted(self.timelines[0].spans, key=lambda s: s.seq)]

    def spans_of(self, op_id: int) -> list[Span]:
        """One op's execution in each repeat."""
        return [s for t in self.timelines for s in t.spans if s.op.op_id == op_id]

    def median_ns(self, op_id: int) -> float:
        """Median duration of one op."""
        return median(s.duration_ns for s in self.spans_of(op_id))


def collect(
    runner: Runner,
    probes: Sequence[Probe],
    n_repeats: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Measured]:
    """Ingest what the probes need, warm each up once, then run `n_repeats` interleaved rounds."""
    measured = [Measured(p) for p in probes]
    total = len(probes) * (n_repeats + 1)
    for turn in range(n_repeats + 1):
        for i, one in enumerate(measured):
            timeline = run_once(runner, one.probe, prepare=turn == 0)
            if turn > 0:
                one.timelines.append(timeline)
            if progress is not None:
                progress(turn * len(probes) + i + 1, total)
    return measured


def run_once(runner: Runner, probe: Probe, *, prepare: bool = False) -> Timeline:
    """One real execution of a probe; the garbage collector waits."""
    if prepare:
        runner.prepare(probe.workload, probe.plan, probe.tier)
    index = runner.index(probe.plan, probe.tier)
    decisions, schedule = runner.batch_schedule(probe.workload, probe.plan, index, probe.n_decode)
    gc.collect(0)
    gc.disable()
    try:
        return runner.execute_schedule(probe.workload, probe.plan, decisions, schedule).timeline
    finally:
        gc.enable()


def ttft_ms(timeline: Timeline) -> float:
    """Mean time from the start to the first token, over the requests of a fixed DAG."""
    heads = [s.end_ns - timeline.start_ns for s in timeline.spans if s.op.kind == "head"]
    return mean(heads) / 1e6
