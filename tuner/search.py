"""The search: baselines first, then seeded TPE, then single steps around the best.

TPE (Optuna, in memory, ask and tell) finds the region; it is a sampler and leaves knobs a step
off, so a local search ends the job. Every plan is scored by simulation. Deterministic for a seed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from ..core.errors import PlanError
from ..core.hardware import HardwareProfile
from ..core.plan import ReusePlan, TunedPlan
from ..core.quality import QualityProfile
from ..core.workload import Workload
from .baselines import baselines, token_times
from .objective import Objective, Score
from .space import (
    Bounds,
    Mode,
    Params,
    group_edges,
    neighbours,
    params_with,
    plan_of,
    suggest_params,
)

if TYPE_CHECKING:
    from ..runtime.runner import Runner

N_STARTUP = 30
"""Trials before TPE models anything, the baselines among them."""

N_EDGES = 8
"""Ratios at row-group edges that are enqueued after the baselines, at most."""

SEARCHED = ("edge", "tpe", "step")
"""Origins of trials that are not baselines."""

SAME = 0.002
"""Plans this close in simulated TTFT are the same to the simulator: the plainer one wins."""

PATIENCE = 30
"""Asks in a row without a new plan that end the sampling: the space around the best is used up."""

N_STARTS = 3
"""Local searches, each from another structure."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Trial:
    """One scored plan."""

    number: int
    origin: str
    """Name of a baseline, or one of `SEARCHED`."""
    params: Params
    plan: ReusePlan
    score: Score

    def row(self) -> dict[str, Any]:
        """JSON for the evidence."""
        return {
            "number": self.number,
            "origin": self.origin,
            "feasible": self.score.feasible,
            "ttft_ms_mean": self.score.ttft_ms_mean,
            "ttft_ms_p95": self.score.ttft_ms_p95,
            "quality": self.score.quality,
            "shortfall": self.score.shortfall,
            "params": self.params,
        }


@dataclass
class Search:
    """The state of one search; `trials` holds each distinct plan once."""

    objective: Objective
    bounds: Bounds
    n_trials: int
    progress: Progress | None = None
    trials: list[Trial] = field(default_factory=list)
    _known: dict[str, Score] = field(default_factory=dict)

    def run(self, seed: int, profile: HardwareProfile, workload: Workload) -> Trial:
        """Baselines, row-group edges, TPE, then single steps from the best structures."""
        for known in baselines(self.bounds, profile, workload):
            self.score(known.params, known.name)
        self.edges()
        self.sample(seed, self.n_trials)
        for start in _starts(self):
            self.climb(start, self.n_trials // (2 * N_STARTS))
        return self.best()

    def score(self, params: Params, origin: str) -> tuple[Score, bool]:
        """(score, whether the plan is new); a plan that was scored before is not a trial."""
        plan = plan_of(params, self.bounds)
        key = plan.fingerprint()
        if key in self._known:
            return self._known[key], False
        score = self._known[key] = self.objective.score(plan)
        self.trials.append(Trial(len(self.trials), origin, dict(params), plan, score))
        if self.progress is not None:
            self.progress(min(len(self.trials), self.n_trials), self.n_trials)
        return score, True

    def edges(self) -> None:
        """Score some of the ratios that load whole row groups, with the default schedule."""
        edges = group_edges(self.bounds)
        step = max(1, -(-len(edges) // N_EDGES))
        for ratio in edges[::step] if "cachetune" in self.bounds.policies else ():
            self.score(params_with(self.bounds, policy="cachetune", ratio=ratio), "edge")

    def sample(self, seed: int, n_trials: int) -> None:
        """TPE until `n_trials` distinct plans were scored, or no new ones come."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(
            seed=seed % (1 << 32), n_startup_trials=N_STARTUP, multivariate=True
        )
        study = optuna.create_study(
            storage=optuna.storages.InMemoryStorage(), sampler=sampler, direction="minimize"
        )
        for trial in self.trials:
            study.enqueue_trial(trial.params)
        n_old = -len(self.trials)  # the baselines come first and are not new
        while len(self.trials) < n_trials and n_old < PATIENCE:
            asked = study.ask()
            score, is_new = self.score(suggest_params(asked, self.bounds), "tpe")
            n_old = 0 if is_new else n_old + 1
            asked.set_constraint("quality", score.shortfall)
            study.tell(asked, score.ttft_ms_mean)

    def climb(self, start: Trial, n_trials: int) -> None:
        """Take single steps from `start` while one is better, for at most `n_trials` plans."""
        params, score = start.params, start.score
        limit = len(self.trials) + n_trials
        improved = True
        while improved:
            improved = False
            for near in neighbours(params, self.bounds):
                if len(self.trials) >= limit:
                    return
                found, _ = self.score(near, "step")
                if found.feasible and found.ttft_ms_mean < score.ttft_ms_mean * (1 - SAME / 4):
                    params, score, improved = near, found, True

    def best(self) -> Trial:
        """The feasible trial with the least TTFT; among equals the plainest.

        Raises:
            PlanError: no plan keeps the floor.
        """
        feasible = [t for t in self.trials if t.score.feasible]
        if not feasible:
            raise PlanError(
                "at least one plan must keep the quality floor",
                values=f"none of {len(self.trials)}",
                remedy="lower the floor, or allow full_recompute",
            )
        limit = min(t.score.ttft_ms_mean for t in feasible) * (1 + SAME)
        close = [t for t in feasible if t.score.ttft_ms_mean <= limit]
        return min(close, key=lambda t: (oddity(t.plan), t.score.ttft_ms_mean, t.number))

    def curve(self) -> list[list[float]]:
        """[trial number, best feasible TTFT so far in ms] wherever it improved."""
        out: list[list[float]] = []
        for trial in self.trials:
            value = trial.score.ttft_ms_mean
            if trial.score.feasible and (not out or value < out[-1][1]):
                out.append([trial.number, value])
        return out


def tune(
    profile: HardwareProfile,
    workload: Workload,
    tier: str | Sequence[str],
    *,
    n_trials: int = 200,
    seed: int = 0,
    quality: QualityProfile | None = None,
    quality_floor: float = 0.95,
    ratio_min: float = 0.15,
    noise: float = 0.02,
    noise_seeds: Sequence[int] = (0, 1, 2),
    mode: Mode = "dag",
    runner: Runner | None = None,
    n_confirm: int = 8,
    n_repeats: int = 7,
    progress: Callable[[str, int, int], None] | None = None,
) -> TunedPlan:
    """The best plan for a machine, a workload and the tier its chunks lie in.

    Args:
        n_trials: distinct plans sampled; up to half as many local steps follow.
        quality: measured answers; None keeps the ratio at or above `ratio_min` instead.
        runner: confirms the best `n_confirm` plans and the baselines for real; None does not.
        n_repeats: measured repeats of each.
        progress: is told what, how much of it is done, and of how much.

    Raises:
        PlanError: no plan keeps the floor.
        ProfileError: a tier or coefficient is missing.
        WorkloadError: a request is longer than the model's context.
    """
    from ..runtime.machine import provenance_here  # no torch in it

    begin_s = time.perf_counter()
    objective = Objective(
        profile, workload, tier, quality, quality_floor, noise_seeds, noise,
        ratio_min=ratio_min, mode=mode,
    )  # fmt: skip
    tell = progress or (lambda what, done, of: None)
    search = Search(objective, objective.bounds(), n_trials, partial(tell, "trials"))
    best = search.run(seed, profile, workload)
    seconds = time.perf_counter() - begin_s
    evidence = _evidence(search, profile, workload, seed) | {"seconds": seconds}
    plan, values = best.plan, {"ttft_ms_mean": best.score.ttft_ms_mean}
    values["ttft_ms_p95"] = best.score.ttft_ms_p95
    if runner is not None:
        from .confirm import confirm

        report = confirm(
            runner, search, workload, n_confirm, n_repeats, seed=seed,
            progress=partial(tell, "confirm"),
        )  # fmt: skip
        plan = report.best.plan
        values["ttft_ms_mean"] = report.best.ttft_ms_simulated
        values["ttft_ms_p95"] = objective.score(plan).ttft_ms_p95
        values["ttft_ms_measured"] = report.best.ttft_ms_median
        evidence["confirmed"] = report.to_json()
    if (found := objective.score(plan).quality) is not None:
        values["quality"] = found
    return TunedPlan(
        plan=plan,
        hardware_fingerprint=profile.hardware_fingerprint,
        model_fingerprint=profile.model_fingerprint,
        quality=quality_label(quality, profile),
        quality_floor=quality_floor if quality is not None else None,
        objective=values,
        evidence=evidence,
        provenance=provenance_here(seed),
    )


def quality_label(
    quality: QualityProfile | None, profile: HardwareProfile
) -> Literal["measured", "borrowed", "unknown"]:
    """Whose quality it is: this model's, another's, or nobody's."""
    if quality is None:
        return "unknown"
    same = quality.model_fingerprint == profile.model_fingerprint
    return "measured" if same else "borrowed"


def oddity(plan: ReusePlan) -> int:
    """How far a plan is from plain: I/O workers, bands, and knobs that differ from the default."""
    plain = ReusePlan()
    schedule = ("layer_group", "look_ahead", "load_order", "restore_stream", "request_bytes")
    changed = sum(int(getattr(plan, name) != getattr(plain, name)) for name in schedule)
    return changed + plan.n_io_workers + max(len(rule.ratios) for rule in plan.rules)


def structure(plan: ReusePlan) -> tuple[object, ...]:
    """What a plan is apart from its numbers: a simulator errs alike on plans that share it."""
    return plan.policy, plan.load_order, plan.restore_stream


def ranked(trials: Iterable[Trial]) -> list[Trial]:
    """Feasible trials, the best first."""
    found = [t for t in trials if t.score.feasible]
    return sorted(found, key=lambda t: (t.score.ttft_ms_mean, oddity(t.plan), t.number))


def _starts(search: Search) -> list[Trial]:
    """The best trial of each structure, the best `N_STARTS` of them."""
    seen: dict[tuple[object, ...], Trial] = {}
    for trial in ranked(search.trials):
        seen.setdefault(structure(trial.plan), trial)
    return list(seen.values())[:N_STARTS]


def _evidence(
    search: Search, profile: HardwareProfile, workload: Workload, seed: int
) -> dict[str, Any]:
    objective = search.objective
    times = {t: token_times(profile, workload, t) for t in objective.tiers}
    return {
        "tiers": list(objective.tiers),
        "mode": objective.mode,
        "seed": seed,
        "noise": objective.noise,
        "noise_seeds": list(objective.seeds),
        "ratio_min": search.bounds.ratio_min,
        "profile": profile.name,
        "workload": workload.name,
        "workload_fingerprint": workload.fingerprint(),
        "policies": list(search.bounds.policies),
        "infeasible_policies": objective.rule.infeasible_policies(),
        "roofline": {
            name: {
                "compute_s_per_token": t.compute_s,
                "transfer_s_per_token": t.transfer_s,
                "rho": t.rho,
                "r0": t.ratio,
            }
            for name, t in times.items()
        },
        "n_simulated": objective.n_simulated,
        "best_curve": search.curve(),
        "trials": [t.row() for t in search.trials],
    }
