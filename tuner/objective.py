"""The objective: TTFT of a plan by simulation, and whether its answers are good enough.

Every plan meets the same requests and the same noise (common random numbers: a noise factor
belongs to a stream, a seed and a request, see simulator/executor.py), so differences are the
plans'. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..core.block_pool import BlockPool
from ..core.chunk_index import ChunkIndex
from ..core.engine import Engine, schedule_of
from ..core.errors import PlanError
from ..core.executor import execute, serve
from ..core.hardware import HardwareProfile
from ..core.metrics import per_request
from ..core.ops import Op, Schedule
from ..core.plan import ReusePlan
from ..core.policies import order_of
from ..core.quality import EXACT_POLICIES, QualityProfile, smallest_ratio
from ..core.units import ns_to_ms
from ..core.warm_index import warm_index
from ..core.workload import Request, Workload
from ..simulator.executor import SimExecutor
from .baselines import token_times
from .space import POLICIES, Bounds, Mode

KV_BLOCKS = (1 << 17) // 16
"""Blocks of 16 tokens that the runtime gives the KV cache by default; for mode `serve`."""

NOT_MEASURED = 1.0
"""Shortfall of a plan whose quality nobody measured: as far below the floor as can be."""


@dataclass(frozen=True)
class Score:
    """What a plan is worth. Times over requests and noise seeds."""

    ttft_ms_mean: float
    ttft_ms_p95: float
    quality: float | None
    """Relative to full recompute; None where unknown."""
    shortfall: float
    """How far below the floor, in the floor's unit; at most 0 is feasible."""
    n_runs: int

    @property
    def feasible(self) -> bool:
        """Whether the quality floor is kept."""
        return self.shortfall <= 0.0


@dataclass(frozen=True)
class QualityRule:
    """The floor. Without a profile the smallest ratio is bounded instead (paper: 0.15)."""

    profile: QualityProfile | None
    floor: float
    ratio_min: float
    chunk_tokens: int

    def judge(self, plan: ReusePlan) -> tuple[float | None, float]:
        """(quality or None, shortfall) of a plan."""
        if plan.policy in EXACT_POLICIES or smallest_ratio(plan, self.chunk_tokens) >= 1.0:
            return 1.0, self.floor - 1.0
        if self.profile is None:
            return None, self.ratio_min - smallest_ratio(plan, self.chunk_tokens)
        score = self.profile.score(plan, self.chunk_tokens)
        return (None, NOT_MEASURED) if score is None else (score, self.floor - score)

    def infeasible_policies(self) -> dict[str, str]:
        """Policies that meet the floor at no measured ratio below 1, with the reason."""
        if self.profile is None:
            return {"full_reuse": "ratio 0"} if self.ratio_min > 0 else {}
        out = {}
        for policy in (p for p in POLICIES if p not in EXACT_POLICIES):
            best = self._best_measured(policy)
            if best is None:
                out[policy] = "quality not measured"
            elif best < self.floor:
                out[policy] = f"best measured quality {best:.3f} is below {self.floor:g}"
        return out

    def selectors(self) -> tuple[str, ...]:
        """Stored orders with a measured `cachetune` row, or the default one."""
        rows = self.profile.rows if self.profile is not None else ()
        known = {
            r.selector for r in rows if r.policy == "cachetune" and r.selector and r.is_deployable
        }
        return tuple(sorted(known)) or ("low_pass",)

    def _best_measured(self, policy: str) -> float | None:
        """Best over selectors and ratios of the worst task's score; None without rows."""
        assert self.profile is not None
        measured = [row for row in self.profile.rows if row.is_deployable]
        rows = [row for row in measured if row.policy == policy and row.ratio < 1.0]
        tasks = {row.task for row in self.profile.rows}
        worst: dict[tuple[str, float], list[float]] = {}
        for row in rows:
            worst.setdefault((row.selector, row.ratio), []).append(row.score)
        complete = [min(scores) for scores in worst.values() if len(scores) == len(tasks)]
        return max(complete, default=None)


class Objective:
    """Scores plans for one machine, workload and place of the chunks.

    Args:
        profile: the machine.
        workload: requests; in mode `dag` at most `max_requests` different shapes are run.
        tier: where all chunks lie, or several that they lie in by turns.
        quality: measured answers; None bounds the ratio from below by `ratio_min`.
        quality_floor: least score relative to full recompute.
        seeds: noise seeds; one is enough without noise.
        noise: log deviation of durations.
        mode: `dag` runs each request alone, `serve` the closed loop with its arrivals.
    """

    def __init__(
        self,
        profile: HardwareProfile,
        workload: Workload,
        tier: str | Sequence[str],
        quality: QualityProfile | None = None,
        quality_floor: float = 0.95,
        seeds: Sequence[int] = (0, 1, 2),
        noise: float = 0.02,
        *,
        ratio_min: float = 0.15,
        mode: Mode = "dag",
        max_requests: int = 8,
    ) -> None:
        _check(quality_floor, ratio_min, seeds)
        workload.check_fits(profile.model)
        self.profile = profile
        self.workload = workload
        self.tiers = (tier,) if isinstance(tier, str) else tuple(tier)
        self.mode = mode
        self.noise = noise
        self.seeds = tuple(seeds) if noise else tuple(seeds)[:1]
        longest = max((c.n_tokens for c in workload.contents.values()), default=1)
        self.rule = QualityRule(quality, quality_floor, ratio_min, longest)
        self.n_simulated = 0
        self._index = warm_index(workload, profile, self.tiers)
        self._parts = [
            (cut(workload, request), count)
            for request, count in sample_requests(workload, self._index, max_requests)
        ]
        self._ttft_ms: dict[object, tuple[float, ...]] = {}

    def bounds(self) -> Bounds:
        """The search space of this objective."""
        infeasible = self.rule.infeasible_policies()
        return Bounds(
            tiers=self.tiers,
            n_layers=self.profile.model.n_layers,
            chunk_tokens=self.rule.chunk_tokens,
            policies=tuple(p for p in POLICIES if p not in infeasible),
            selectors=self.rule.selectors(),
            ratio_min=self.rule.ratio_min if self.rule.profile is None else 0.0,
            mode=self.mode,
            rhos=self._rhos() if self.mode == "serve" else {},
        )

    def _rhos(self) -> dict[str, float]:
        return {t: token_times(self.profile, self.workload, t).rho for t in self.tiers}

    def score(self, plan: ReusePlan) -> Score:
        """Simulated TTFT and feasibility; a plan that lowers to ops seen before is not run."""
        times_ms = self._serve_ms(plan) if self.mode == "serve" else self._dag_ms(plan)
        quality, shortfall = self.rule.judge(plan)
        data = np.asarray(times_ms)
        return Score(
            float(data.mean()), float(np.percentile(data, 95)), quality, shortfall, len(times_ms)
        )

    def effect(self, plan: ReusePlan) -> tuple[object, str]:
        """What a plan does: its ops and its stored order. Plans that share it are the same."""
        if self.mode == "serve":
            return plan.fingerprint(), ""
        return tuple(self._ops(plan, part) for part, _ in self._parts), order_of(plan)

    def _ops(self, plan: ReusePlan, part: Workload) -> tuple[Op, ...]:
        request = part.requests[0]
        return tuple(schedule_of(part, request, self.profile.model, plan, self._index)[1])

    def _dag_ms(self, plan: ReusePlan) -> list[float]:
        times: list[float] = []
        for part, count in self._parts:
            ops = self._ops(plan, part)
            if ops not in self._ttft_ms:
                self.n_simulated += 1
                self._ttft_ms[ops] = tuple(
                    self._run_ms(ops, seed, part.requests[0].request_id) for seed in self.seeds
                )
            times += self._ttft_ms[ops] * count
        return times

    def _run_ms(self, ops: tuple[Op, ...], seed: int, request_id: int) -> float:
        executor = SimExecutor(self.profile, seed=seed * 1_000_003 + request_id, noise=self.noise)
        return ns_to_ms(execute(Schedule(ops), executor).makespan_ns)

    def _serve_ms(self, plan: ReusePlan) -> tuple[float, ...]:
        key = plan.fingerprint()
        if key not in self._ttft_ms:
            self.n_simulated += 1
            times: list[float] = []
            for seed in self.seeds:
                index = warm_index(self.workload, self.profile, self.tiers)
                model, pool = self.profile.model, BlockPool(KV_BLOCKS)
                engine = Engine(self.workload, model, plan, index, pool)
                executor = SimExecutor(self.profile, seed=seed, noise=self.noise)
                timeline = serve(self.workload, engine, executor)
                times += [m.ttft_ms for m in per_request(timeline, self.workload)]
            self._ttft_ms[key] = tuple(times)
        return self._ttft_ms[key]


def sample_requests(workload: Workload, index: ChunkIndex, n: int) -> list[tuple[Request, int]]:
    """At most `n` requests, evenly by length; those of equal shape once, with their count."""
    ordered = sorted(workload.requests, key=workload.prompt_tokens)
    picked: Iterable[Request] = ordered
    if len(ordered) > n:
        picked = [ordered[(2 * i + 1) * len(ordered) // (2 * n)] for i in range(n)]
    shapes: dict[tuple[object, ...], list[Request]] = {}
    for request in picked:
        places = tuple(e and e.tier for e in index.lookup(request.chunks, request.tenant))
        shape = (workload.chunk_tokens(request), places, request.suffix_tokens)
        shapes.setdefault(shape, []).append(request)
    return [(found[0], len(found)) for found in shapes.values()]


def cut(workload: Workload, request: Request) -> Workload:
    """The workload with one request and its contents alone: cheap to lower again and again."""
    contents = {c: workload.contents[c] for c in request.chunks}
    return workload.replace(contents=contents, requests=(request,))


def _check(quality_floor: float, ratio_min: float, seeds: Sequence[int]) -> None:
    for name, value in (("quality floor", quality_floor), ("smallest ratio", ratio_min)):
        if not 0.0 <= value <= 1.0:
            raise PlanError(
                f"the {name} must lie in [0, 1]", values=str(value), remedy="correct the value"
            )
    if not seeds:
        raise PlanError("scoring needs at least one seed", values="none", remedy="pass seeds=(0,)")
