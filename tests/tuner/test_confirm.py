"""Confirmation: the measured best wins, hopeless plans are not run, ranks stand side by side."""

from __future__ import annotations

import json

import pytest
from cachetune.core.errors import PlanError
from cachetune.core.hardware import HardwareProfile
from cachetune.core.plan import ReusePlan
from cachetune.core.workload import Workload
from cachetune.tuner import confirm as confirm_module
from cachetune.tuner.confirm import HOPELESS, confirm
from cachetune.tuner.measure import Bench
from cachetune.tuner.objective import Objective
from cachetune.tuner.search import Search, tune


class Contrary:
    """A machine on which the compute stream restores for nothing: the simulator cannot know."""

    interleaved = Bench.interleaved
    mode = "dag"
    objective: Objective
    seen: set[str]

    def __init__(self, *_: object) -> None:
        pass

    def once(self, plan: ReusePlan) -> float:
        Contrary.seen.add(plan.policy)
        simulated = Contrary.objective.score(plan).ttft_ms_mean
        return simulated * (0.8 if plan.restore_stream == "compute" else 1.0)


@pytest.fixture
def search(profile: HardwareProfile, workload: Workload, monkeypatch: pytest.MonkeyPatch) -> Search:
    objective = Objective(profile, workload, "mid", noise=0.0)
    Contrary.objective, Contrary.seen = objective, set()
    monkeypatch.setattr(confirm_module, "Bench", Contrary)
    found = Search(objective, objective.bounds(), 40)
    found.sample(0, 40)
    return found


def test_the_measured_best_wins(search: Search, workload: Workload) -> None:
    report = confirm(None, search, workload, 8, 3)  # type: ignore[arg-type]
    assert report.best.plan.restore_stream == "compute"
    assert report.best.feasible
    medians = [row.measured.median for row in report.rows if row.feasible]
    assert report.best.ttft_ms_median == min(medians)
    data = json.loads(json.dumps(report.to_json()))
    assert -1.0 <= data["spearman"] <= 1.0
    assert {r["rank_measured"] for r in data["rows"]} >= {1}
    assert sum(r["ttft_ms_final"] is not None for r in data["rows"]) == 3


def test_hopeless_plans_are_named_not_run(
    profile: HardwareProfile, workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    Contrary.objective, Contrary.seen = Objective(profile, workload, "slow", noise=0.0), set()
    monkeypatch.setattr(confirm_module, "Bench", Contrary)
    found = tune(profile, workload, "slow", n_trials=20, runner=object(), n_confirm=4)  # type: ignore[arg-type]
    confirmed = found.evidence["confirmed"]
    assert found.plan.policy == "full_recompute"
    assert any(name.startswith("cachetune_0.15") for name in confirmed["skipped"])
    fastest = min(r["ttft_ms_simulated"] for r in confirmed["rows"])
    assert all(r["ttft_ms_simulated"] <= 1.01 * HOPELESS * fastest for r in confirmed["rows"])
    assert found.objective["ttft_ms_measured"] > 0


def test_one_tier_only(profile: HardwareProfile, workload: Workload) -> None:
    objective = Objective(profile, workload, ("fast", "mid"), noise=0.0)
    with pytest.raises(PlanError, match="one tier"):
        confirm(None, Search(objective, objective.bounds(), 5), workload)  # type: ignore[arg-type]
