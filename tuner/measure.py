"""TTFT of plans on the real runtime: one warm-up, then interleaved repeats in a seeded order.

Interleaving spreads a machine's slow moments over all plans; a block per plan would not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, geometric_mean, median
from typing import TYPE_CHECKING

from ..calibration.collect import run_once
from ..calibration.probes import Probe
from ..core.chunk_index import ChunkIndex
from ..core.metrics import per_request
from ..core.plan import ReusePlan
from ..core.rng import rng
from ..core.units import ns_to_ms
from ..core.workload import Workload
from .objective import cut, sample_requests
from .space import Mode

if TYPE_CHECKING:
    from ..runtime.runner import Runner

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Measured:
    """TTFT of one plan in each repeat, a mean over requests."""

    ttft_ms: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median over repeats, ms."""
        return median(self.ttft_ms)

    @property
    def spread(self) -> float:
        """Distance of the quartiles over the median, a fraction."""
        ordered = sorted(self.ttft_ms)
        n = len(ordered)
        return (ordered[(3 * n - 1) // 4] - ordered[n // 4]) / self.median


class Bench:
    """Measures plans over a few requests of a workload, all chunks in one tier.

    Args:
        runner: open, with that tier.
        workload: with token ids.
        tier: where every chunk lies.
        n_requests: requests of different length that make one measurement, each alone; in mode
            `serve` all do, with their arrivals.
    """

    def __init__(
        self,
        runner: Runner,
        workload: Workload,
        tier: str,
        n_requests: int = 1,
        mode: Mode = "dag",
    ) -> None:
        self.runner = runner
        self.tier = tier
        self.mode = mode
        self.workload = workload
        self.parts = [
            cut(workload, request)
            for request, _ in sample_requests(workload, ChunkIndex(), n_requests)
        ]
        self.n_runs = 0
        self._ready: set[str] = set()

    def once(self, plan: ReusePlan) -> float:
        """One measurement: mean TTFT in ms over the requests. The first of a plan also ingests."""
        is_new = plan.fingerprint() not in self._ready
        self._ready.add(plan.fingerprint())
        if self.mode == "serve":
            return self._serve_ms(plan, is_new)
        total = 0.0
        for part in self.parts:
            probe = Probe(plan.policy, part, plan, self.tier)
            timeline = run_once(self.runner, probe, prepare=is_new)
            self.n_runs += 1
            total += ns_to_ms(timeline.makespan_ns)
        return total / len(self.parts)

    def _serve_ms(self, plan: ReusePlan, is_new: bool) -> float:
        if is_new:
            self.runner.prepare(self.workload, plan, self.tier)
        index = self.runner.index(plan, self.tier)
        timeline = self.runner.serve(self.workload, plan, index).timeline
        self.n_runs += 1
        return fmean(m.ttft_ms for m in per_request(timeline, self.workload))

    def interleaved(
        self,
        plans: Sequence[ReusePlan],
        n_repeats: int,
        *,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> list[Measured]:
        """Warm each plan up once, then measure `n_repeats` rounds, each in its own order."""
        times: list[list[float]] = [[] for _ in plans]
        n_total = len(plans) * (n_repeats + 1)
        for turn in range(n_repeats + 1):
            for done, i in enumerate(order_of_turn(len(plans), turn, seed)):
                ttft_ms = self.once(plans[i])
                if turn > 0:
                    times[i].append(ttft_ms)
                if progress is not None:
                    progress(turn * len(plans) + done + 1, n_total)
        return [Measured(tuple(t)) for t in times]


def paired(measured: Sequence[Measured]) -> list[float]:
    """Each plan's median share of its turn's geometric mean: a slow moment hits a whole turn.

    Comparable within one interleaved run only.
    """
    turns = list(zip(*(m.ttft_ms for m in measured), strict=True))
    means = [geometric_mean(turn) for turn in turns]
    return [
        median(ttft_ms / mean for ttft_ms, mean in zip(m.ttft_ms, means, strict=True))
        for m in measured
    ]


def order_of_turn(n: int, turn: int, seed: int) -> list[int]:
    """A permutation of `n` plans that depends on the turn and the seed alone."""
    return [int(i) for i in rng(seed, "turn", turn).permutation(n)]
