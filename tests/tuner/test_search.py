"""The search: never worse than what it was given, right at both ends, repeatable, no torch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
from cachetune.core.errors import PlanError
from cachetune.core.hardware import HardwareProfile
from cachetune.core.plan import TunedPlan
from cachetune.core.quality import QualityProfile, QualityRow
from cachetune.core.workload import Workload
from cachetune.tuner.confirm import shortlist, spearman
from cachetune.tuner.objective import Objective
from cachetune.tuner.search import SEARCHED, Search, tune
from cachetune.tuner.space import params_with

Tuned = Callable[[str], TunedPlan]

WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers"):
            raise ImportError(f"{name} is not installed")
sys.meta_path.insert(0, Refuse())
from cachetune.core.hardware import HardwareProfile
from cachetune.core.workload import Workload
from cachetune.tuner.search import tune
plan = tune(HardwareProfile.read(sys.argv[1]), Workload.read(sys.argv[2]), "fast", n_trials=12)
print(plan.plan.policy, "torch" in sys.modules)
"""


def quality(fingerprint: str) -> QualityProfile:
    points = {("full_reuse", 0.0): 0.3, ("cachetune", 0.5): 0.97, ("cachetune", 0.2): 0.8}
    rows = tuple(
        QualityRow(
            task="t", policy=policy, selector="low_pass" if policy == "cachetune" else "",  # type: ignore[arg-type]
            ratio=ratio, score=s, low=s, high=s, n=9,
        )
        for (policy, ratio), s in points.items()
    )  # fmt: skip
    return QualityProfile(model_fingerprint=fingerprint, rows=rows)


@pytest.mark.parametrize("tier", ["fast", "mid", "slow"])
def test_never_worse_than_the_baselines(tuned: Tuned, tier: str) -> None:
    found = tuned(tier)
    trials = found.evidence["trials"]
    known = [t for t in trials if t["origin"] not in SEARCHED and t["feasible"]]
    assert len(known) >= 4
    assert found.objective["ttft_ms_mean"] <= 1.002 * min(t["ttft_ms_mean"] for t in known)
    curve = [value for _, value in found.evidence["best_curve"]]
    assert curve == sorted(curve, reverse=True)


def test_slow_tier_chooses_recompute(tuned: Tuned) -> None:
    assert tuned("slow").plan.policy == "full_recompute"


def test_fast_tier_chooses_the_smallest_ratio(tuned: Tuned) -> None:
    plan = tuned("fast").plan
    assert plan.policy == "cachetune"
    assert max(plan.rules[0].ratios) <= 0.2


def test_between_them_the_balance(tuned: Tuned) -> None:
    """rho 0.7 balances where 0.41 to 0.43 of all rows are computed, one of four chunks is exact."""
    plan = tuned("mid").plan
    assert plan.policy == "cachetune"
    rule = plan.rules[0]
    ratio = sum(rule.ratios) / len(rule.ratios)
    assert 0.15 < ratio < 0.75
    assert 0.3 < (3 * ratio + (not rule.load_exact)) / 4 < 0.55


def test_same_seed_same_plan(profile: HardwareProfile, workload: Workload) -> None:
    one, two = (tune(profile, workload, "mid", n_trials=25, seed=3) for _ in range(2))
    assert one.plan == two.plan and one.objective == two.objective
    assert one.evidence["trials"] == two.evidence["trials"]


def test_fingerprints_and_file(tuned: Tuned, profile: HardwareProfile) -> None:
    found = tuned("fast")
    assert found.hardware_fingerprint == profile.hardware_fingerprint
    assert found.quality == "unknown" and found.quality_floor is None
    again = TunedPlan.parse(found.to_json(), "plan.json")
    assert again.plan == found.plan
    again.check_fits(profile.hardware_fingerprint, profile.model_fingerprint)
    with pytest.raises(PlanError, match="tune again"):
        again.check_fits("other", profile.model_fingerprint)


def test_quality_floor_is_kept(profile: HardwareProfile, workload: Workload) -> None:
    known = quality(profile.model_fingerprint)
    found = tune(profile, workload, "fast", n_trials=30, quality=known, quality_floor=0.97)
    assert found.quality == "measured"
    assert found.objective["quality"] >= 0.97
    assert min(found.plan.rules[0].ratios) >= 0.5
    assert set(found.evidence["infeasible_policies"]) == {"full_reuse", "cacheblend", "epic"}
    lower = tune(profile, workload, "fast", n_trials=30, quality=known, quality_floor=0.8)
    assert min(lower.plan.rules[0].ratios) < 0.5
    assert lower.objective["ttft_ms_mean"] < found.objective["ttft_ms_mean"]


def test_borrowed_quality_is_marked(profile: HardwareProfile, workload: Workload) -> None:
    assert tune(profile, workload, "fast", n_trials=9, quality=quality("x")).quality == "borrowed"


def test_duplicates_are_not_trials(profile: HardwareProfile, workload: Workload) -> None:
    objective = Objective(profile, workload, "slow")
    search = Search(objective, objective.bounds(), 10)
    one = params_with(search.bounds, policy="full_recompute", layer_group=8)
    assert search.score(one, "a")[1]
    assert not search.score({**one, "n_io_workers": 4}, "b")[1]
    assert len(search.trials) == 1


def test_shortlist_differs_and_starts_with_the_best(
    profile: HardwareProfile, workload: Workload
) -> None:
    objective = Objective(profile, workload, "mid", noise=0.0)
    search = Search(objective, objective.bounds(), 40)
    search.sample(0, 40)
    chosen = shortlist(search, 8)
    assert len(chosen) == 8
    assert all(t.score.feasible for t in chosen)
    assert len({objective.effect(t.plan) for t in chosen}) == 8
    assert len({(t.plan.load_order, t.plan.restore_stream) for t in chosen}) >= 3
    best = min((t for t in search.trials if t.score.feasible), key=lambda t: t.score.ttft_ms_mean)
    assert chosen[0].score.ttft_ms_mean == best.score.ttft_ms_mean


def test_spearman() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1.0)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    assert spearman([1, 1, 1], [1, 2, 3]) is None


def test_tuning_needs_no_torch(
    profile: HardwareProfile, workload: Workload, tmp_path: object
) -> None:
    profile_path, workload_path = f"{tmp_path}/profile.json", f"{tmp_path}/workload.json"
    profile.write(profile_path)
    workload.write(workload_path)
    code = [sys.executable, "-c", WITHOUT_TORCH, profile_path, workload_path]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(code, capture_output=True, text=True, timeout=60, check=False, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["cachetune", "False"]
