"""Confirmation: the best simulated plans and the baselines on the real runtime.

Two rounds: all candidates, then the fastest few again with twice the repeats, because the
minimum of many noisy medians is too good to be true.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from ..core.errors import PlanError
from ..core.plan import ReusePlan
from ..core.workload import Workload
from .measure import Bench, Measured, Progress, paired
from .search import SEARCHED, Search, Trial, ranked, structure

if TYPE_CHECKING:
    from ..runtime.runner import Runner

N_FINALISTS = 3

NOISY = 0.05
"""Spread of the finalists above which the second round is longer, up to `FINAL_S` seconds; not in
mode `serve`, where every measurement lasts as long as the requests' arrivals."""

FINAL_S = 15.0

HOPELESS = 3.0
"""Simulated this many times slower than the best, a plan is not run: the simulator errs by far
less, and on a slow tier such a run takes minutes."""


@dataclass(frozen=True)
class Confirmed:
    """One plan, predicted and measured."""

    name: str
    plan: ReusePlan
    feasible: bool
    ttft_ms_simulated: float
    measured: Measured
    share: float = 0.0
    """Of its turn's mean, see `measure.paired`: what the measured rank goes by."""
    final: Measured | None = None
    """Second round, for finalists."""
    final_share: float | None = None

    @property
    def ttft_ms_median(self) -> float:
        """Median of the last round it took part in."""
        return (self.final or self.measured).median


@dataclass(frozen=True)
class Report:
    """All confirmed plans; `best` is the measured best among the feasible."""

    rows: tuple[Confirmed, ...]
    best: Confirmed
    skipped: tuple[str, ...] = ()
    """Baselines that were hopeless by simulation."""

    @property
    def spearman(self) -> float | None:
        """Rank correlation of simulated and measured TTFT; None where ranks are undefined."""
        return spearman([r.ttft_ms_simulated for r in self.rows], [r.share for r in self.rows])

    def to_json(self) -> dict[str, Any]:
        """For the evidence: a row per plan with both ranks."""
        simulated = _ranks([r.ttft_ms_simulated for r in self.rows])
        real = _ranks([r.share for r in self.rows])
        rows = [
            {
                "name": row.name,
                "feasible": row.feasible,
                "ttft_ms_simulated": row.ttft_ms_simulated,
                "ttft_ms_median": row.measured.median,
                "spread": row.measured.spread,
                "rank_simulated": simulated[i],
                "rank_measured": real[i],
                "error": row.ttft_ms_simulated / row.measured.median - 1,
                "ttft_ms": list(row.measured.ttft_ms),
                "ttft_ms_final": list(row.final.ttft_ms) if row.final else None,
                "plan": row.plan.model_dump(mode="json"),
            }
            for i, row in enumerate(self.rows)
        ]
        return {
            "spearman": self.spearman,
            "best": self.best.name,
            "skipped": list(self.skipped),
            "rows": rows,
        }


def confirm(
    runner: Runner,
    search: Search,
    workload: Workload,
    n_confirm: int = 8,
    n_repeats: int = 7,
    *,
    n_requests: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Measure a shortlist and the baselines; the best is the fastest feasible one.

    Raises:
        PlanError: the search spans several tiers: the runtime places all chunks in one.
        WorkloadError: the workload lacks token ids.
    """
    tiers = search.objective.tiers
    if len(tiers) != 1:
        raise PlanError(
            "plans are confirmed with all chunks in one tier",
            values=", ".join(tiers),
            remedy="tune for one tier, or without confirmation",
        )
    trials = shortlist(search, n_confirm)
    limit_ms = HOPELESS * search.best().score.ttft_ms_mean
    known = [t for t in search.trials if t.origin not in SEARCHED and t not in trials]
    trials += [t for t in known if t.score.ttft_ms_mean <= limit_ms]
    skipped = tuple(_name(t) for t in known if t.score.ttft_ms_mean > limit_ms)
    bench = Bench(runner, workload, tiers[0], n_requests, search.objective.mode)
    measured = bench.interleaved([t.plan for t in trials], n_repeats, seed=seed, progress=progress)
    rows = [
        Confirmed(_name(t), t.plan, t.score.feasible, t.score.ttft_ms_mean, m, share)
        for t, m, share in zip(trials, measured, paired(measured), strict=True)
    ]
    rows = _final_round(bench, rows, n_repeats, seed)
    finalists = [r for r in rows if r.final_share is not None]
    best = min(finalists, key=lambda r: r.final_share or 0.0)
    return Report(tuple(rows), best, skipped)


def shortlist(search: Search, n: int) -> list[Trial]:
    """Half the best plans that differ visibly, half the best of each other structure.

    What the simulator does not see (contention for cores, an overhead of one stream) shifts all
    plans of a structure alike, so the runners-up of other structures hedge against it.
    """
    chosen: list[Trial] = []
    effects: set[object] = set()
    limit_ms = HOPELESS * search.best().score.ttft_ms_mean
    ordered = [t for t in ranked(search.trials) if t.score.ttft_ms_mean <= limit_ms]
    for key_of, room in ((_look, (n + 1) // 2), (_hedge, n), (_look, n)):
        seen = {key_of(t.plan) for t in chosen}
        for trial in ordered:
            effect = search.objective.effect(trial.plan)
            if len(chosen) >= room:
                break
            if effect in effects or key_of(trial.plan) in seen:
                continue
            seen.add(key_of(trial.plan))
            effects.add(effect)
            chosen.append(trial)
    return chosen


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Rank correlation, ties by mean rank; None for fewer than three or constant values."""
    if len(a) < 3 or len(set(a)) == 1 or len(set(b)) == 1:
        return None
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic)


def _final_round(bench: Bench, rows: list[Confirmed], n_repeats: int, seed: int) -> list[Confirmed]:
    feasible = [i for i, r in enumerate(rows) if r.feasible]
    finalists = sorted(feasible, key=lambda i: rows[i].share)[:N_FINALISTS]
    n_final = 2 * n_repeats
    noisy = median(rows[i].measured.spread for i in finalists) > NOISY
    if noisy and bench.mode == "dag":
        turn_s = sum(rows[i].measured.median for i in finalists) / 1e3
        n_final = int(min(max(FINAL_S / turn_s, 2 * n_final), 4 * n_final))
    again = bench.interleaved([rows[i].plan for i in finalists], n_final, seed=seed + 1)
    for i, measured, share in zip(finalists, again, paired(again), strict=True):
        rows[i] = replace(rows[i], final=measured, final_share=share)
    return rows


def _look(plan: ReusePlan) -> tuple[object, ...]:
    """Plans that share it are near twins."""
    ratios = tuple(round(r, 1) for r in plan.rules[0].ratios)
    return (*_hedge(plan), ratios, plan.layer_group, plan.rules[0].load_exact)


def _hedge(plan: ReusePlan) -> tuple[object, ...]:
    return (*structure(plan), plan.n_io_workers)


def _name(trial: Trial) -> str:
    return f"{trial.origin}#{trial.number}"


def _ranks(values: Sequence[float]) -> list[int]:
    ordered = sorted(values)
    return [ordered.index(v) + 1 for v in values]
