"""Scores: by hand on a small case, feasibility under each kind of floor, memory, common noise."""

from __future__ import annotations

import pytest
from cachetune.core.errors import PlanError, ProfileError
from cachetune.core.hardware import HardwareProfile
from cachetune.core.layout import chunk_bytes
from cachetune.core.plan import RatioRule, ReusePlan
from cachetune.core.quality import QualityProfile, QualityRow
from cachetune.core.workload import Workload
from cachetune.tuner.baselines import baselines, roofline_ratio, token_times
from cachetune.tuner.objective import Objective
from cachetune.tuner.space import params_with, plan_of
from support import make_workload

TOKEN_S = 1e-4


def plan(policy: str = "cachetune", ratio: float = 0.15, **knobs: object) -> ReusePlan:
    return ReusePlan(policy=policy, rules=(RatioRule(ratios=(ratio,)),), **knobs)  # type: ignore[arg-type]


def quality_of(scores: dict[tuple[str, float], float], fingerprint: str = "m") -> QualityProfile:
    rows = tuple(
        QualityRow(
            task="t", policy=policy, selector="low_pass" if policy == "cachetune" else "",  # type: ignore[arg-type]
            ratio=ratio, score=score, low=score, high=score, n=10,
        )
        for (policy, ratio), score in scores.items()
    )  # fmt: skip
    return QualityProfile(model_fingerprint=fingerprint, rows=rows)


QUALITY = quality_of(
    {
        ("full_reuse", 0.0): 0.2,
        ("cachetune", 0.2): 0.6,
        ("cachetune", 0.6): 0.96,
        ("cacheblend", 0.3): 0.7,
    }
)


def test_roofline_balance() -> None:
    assert roofline_ratio(3.0, 1.0) == 0.25
    assert roofline_ratio(1.0, 0.0) == 0.0


def test_token_times_follow_the_profile(profile: HardwareProfile, workload: Workload) -> None:
    times = token_times(profile, workload, "mid")
    assert times.compute_s == pytest.approx(TOKEN_S, rel=0.01)
    padding = chunk_bytes(profile.model, 256) / (256 * profile.model.kv_bytes_per_token)
    assert times.transfer_s == pytest.approx(0.7 * TOKEN_S * padding)
    assert times.ratio == roofline_ratio(times.compute_s, times.transfer_s)


def test_full_recompute_is_the_sum_of_its_ops(profile: HardwareProfile, workload: Workload) -> None:
    score = Objective(profile, workload, "fast", noise=0.0).score(plan("full_recompute", 1.0))
    n_prompt = 4 * 256 + 8
    expected_ms = (n_prompt * TOKEN_S + 4 * 3e-5 + 1e-5) * 1e3  # four groups, head, gaps
    assert score.ttft_ms_mean == pytest.approx(expected_ms, rel=1e-3)
    assert score.ttft_ms_p95 == pytest.approx(score.ttft_ms_mean)
    assert score.feasible and score.quality == 1.0


def test_scores_repeat_and_are_remembered(profile: HardwareProfile, workload: Workload) -> None:
    one = Objective(profile, workload, "mid", noise=0.05)
    first = one.score(plan())
    n = one.n_simulated
    assert one.score(plan()) == first and one.n_simulated == n
    # The request size of a read that is smaller anyway changes no op, so nothing is run.
    assert one.score(plan(request_bytes=1 << 22)) == first and one.n_simulated == n
    assert Objective(profile, workload, "mid", noise=0.05).score(plan()) == first


def test_noise_is_common_to_all_plans(profile: HardwareProfile, workload: Workload) -> None:
    """Plans with the same compute ops meet the same factors, so order is kept seed by seed."""
    for seed in range(5):
        objective = Objective(profile, workload, "fast", seeds=(seed,), noise=0.2)
        slow, fast = (objective.score(plan(ratio=r)).ttft_ms_mean for r in (0.32, 0.3))
        assert fast < slow


def test_without_quality_the_ratio_is_bounded(profile: HardwareProfile, workload: Workload) -> None:
    objective = Objective(profile, workload, "fast", ratio_min=0.3)
    assert objective.score(plan(ratio=0.3)).feasible
    assert objective.score(plan(ratio=0.3)).quality is None
    assert not objective.score(plan(ratio=0.29)).feasible
    assert not objective.score(plan("epic", epic_tokens=76)).feasible  # 76 / 256
    assert objective.score(plan("epic", epic_tokens=77)).feasible
    assert not objective.score(plan("full_reuse", 0.0)).feasible
    assert "full_reuse" not in objective.bounds().policies
    assert objective.bounds().ratio_min == 0.3


def test_with_quality_the_floor_decides(profile: HardwareProfile, workload: Workload) -> None:
    objective = Objective(profile, workload, "fast", QUALITY, quality_floor=0.95)
    at_half = objective.score(plan(ratio=0.4))
    assert at_half.quality == pytest.approx(0.78)
    assert at_half.shortfall == pytest.approx(0.17)
    assert not at_half.feasible
    assert objective.score(plan(ratio=0.6)).feasible
    assert objective.score(plan("prefix_cache", 1.0)).quality == 1.0
    assert objective.rule.infeasible_policies() == {
        "full_reuse": "best measured quality 0.200 is below 0.95",
        "cacheblend": "best measured quality 0.700 is below 0.95",
        "epic": "quality not measured",
    }
    assert objective.bounds().ratio_min == 0.0
    assert set(objective.bounds().policies) == {"cachetune", "full_recompute", "prefix_cache"}


def test_baselines_are_valid_points(profile: HardwareProfile, workload: Workload) -> None:
    objective = Objective(profile, workload, "mid", ratio_min=0.0)
    bounds = objective.bounds()
    found = {b.name: plan_of(b.params, bounds) for b in baselines(bounds, profile, workload)}
    assert set(found) == {
        "full_recompute", "prefix_cache", "full_reuse", "cachetune_0.15", "cacheblend_0.15",
        "epic_16", "roofline_r0",
    }  # fmt: skip
    r0 = token_times(profile, workload, "mid").ratio
    assert found["roofline_r0"].rules[0].ratios == (round(r0, 3),)
    assert found["epic_16"].epic_tokens == 16


def test_serve_mode_queues(profile: HardwareProfile, workload: Workload) -> None:
    """Both requests arrive at once, so the second waits; alone neither does."""
    alone = Objective(profile, workload, "fast", noise=0.0)
    together = Objective(profile, workload, "fast", noise=0.0, mode="serve")
    full = plan("full_recompute", 1.0)
    assert together.score(full).ttft_ms_mean > 1.3 * alone.score(full).ttft_ms_mean
    assert together.score(full).n_runs == 2
    assert together.bounds().mode == "serve"


def test_under_load_a_slow_tier_is_used_for_what_pays(profile: HardwareProfile) -> None:
    """A knob of mode `serve`: with it prompts do not wait behind loads that end too late."""
    burst = make_workload([("a", "b", "c", "d"), ("d", "a", "c", "b")] * 3, chunk_tokens=256)
    objective = Objective(profile, burst, "slow", noise=0.0, mode="serve")
    bounds = objective.bounds()
    assert bounds.rhos["slow"] == pytest.approx(25, rel=0.1)
    ttft_ms = {
        pays: objective.score(
            plan_of(params_with(bounds, ratio=0.2, load_what_pays=pays), bounds)
        ).ttft_ms_mean
        for pays in (False, True)
    }
    assert ttft_ms[True] < 0.5 * ttft_ms[False]


def test_bad_arguments(profile: HardwareProfile, workload: Workload) -> None:
    with pytest.raises(ProfileError, match="fast, mid, slow"):
        Objective(profile, workload, "tape")
    with pytest.raises(PlanError, match="quality floor"):
        Objective(profile, workload, "fast", quality_floor=1.5)
    with pytest.raises(PlanError, match="seed"):
        Objective(profile, workload, "fast", seeds=())
