"""Four ledgers of one reused prompt, because each alone can be made to look well.

1. The request alone: its operations. 2. Everything on its path: lookup, decision, allocation,
threads, checks. 3. With the preparation of the chunks it loads: prefill, scoring, packing, writing.
4. How often they must be reused until that has paid.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..core.policies import order_of
from .ideal import Work
from .probes import Probe

if TYPE_CHECKING:
    from ..runtime.runner import Runner

PARTS = ("encode_s", "score_s", "write_s")


@dataclass
class Preparation:
    """Seconds that chunks took to prepare in one stored order."""

    by_content: dict[str, float] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)

    def of(self, contents: Mapping[str, int]) -> float:
        """Milliseconds for the contents that are loaded."""
        return 1e3 * sum(self.by_content.get(c, 0.0) for c in contents)


@dataclass(frozen=True)
class OnPath:
    """One run of a request from the lookup to the first token, milliseconds."""

    ttft_ms: float
    """Ledger 1: from the first op submitted to the end of the last one."""
    lookup_ms: float
    """Finding the chunks, deciding on every token, lowering to ops."""
    path_ms: float
    """Ledger 2: all of it by the wall clock."""


def prepare(runner: Runner, probe: Probe, known: dict[str, Preparation]) -> None:
    """Have the chunks of `probe` in its tier; what that took lands in `known` by order."""
    ledger = runner.ingestor.ledger
    before = {part: getattr(ledger, part) for part in PARTS}
    n_before = ledger.n_chunks
    runner.prepare(probe.workload, probe.plan, probe.tier)
    if ledger.n_chunks > n_before:
        spent = {part: getattr(ledger, part) - before[part] for part in PARTS}
        known[order_of(probe.plan)] = Preparation(dict(ledger.by_content), spent)


def loaded_contents(runner: Runner, probe: Probe) -> tuple[dict[str, int], Work]:
    """Contents that the first request loads, with their tokens; and the work of the schedule."""
    index = runner.index(probe.plan, probe.tier)
    decisions, schedule = runner.batch_schedule(probe.workload, probe.plan, index)
    request = probe.workload.requests[0]
    fates = decisions[request.request_id].chunks
    contents = {
        content: fate.n_tokens
        for content, fate in zip(request.chunks, fates, strict=True)
        if fate.is_loaded
    }
    return contents, Work.of(schedule, runner.spec)


def run_on_path(runner: Runner, probe: Probe) -> OnPath:
    """Serve the probe's request once, everything by the clock; the chunks lie in their tier."""
    runner.index(probe.plan, probe.tier)
    gc.collect(0)
    gc.disable()
    try:
        began = time.perf_counter_ns()
        index = runner.index(probe.plan)
        decisions, schedule = runner.batch_schedule(probe.workload, probe.plan, index)
        found = time.perf_counter_ns()
        timeline = runner.execute_schedule(probe.workload, probe.plan, decisions, schedule).timeline
        ended = time.perf_counter_ns()
    finally:
        gc.enable()
    return OnPath(timeline.makespan_ns / 1e6, (found - began) / 1e6, (ended - began) / 1e6)


def break_even(prepare_ms: float, path_ms: float, baseline_ms: float) -> int | None:
    """Uses of the chunks until preparing them has paid; None if it never does."""
    if path_ms >= baseline_ms:
        return None
    return math.ceil(prepare_ms / (baseline_ms - path_ms))
