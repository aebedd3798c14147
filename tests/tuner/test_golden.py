"""Golden-section search on functions with a known minimum; every evaluation is counted."""

from __future__ import annotations

import pytest
from cachetune.core.errors import PlanError
from cachetune.core.plan import RatioRule, ReusePlan
from cachetune.core.workload import Workload
from cachetune.tuner import golden
from cachetune.tuner.golden import Variant, golden_on_runtime, golden_section, with_ratio

VARIANTS: tuple[Variant, ...] = ("reinitialised", "paper")


def layer_time(r: float) -> float:
    """max(r t_c, (1 - r) t_i) with rho 1.5: the least at 0.6."""
    return max(r, (1 - r) * 1.5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("r0", [0.0, 0.2, 0.5, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("tol", [0.01, 0.001])
def test_finds_the_minimum_from_any_start(variant: Variant, r0: float, tol: float) -> None:
    ratio, value, probes = golden_section(layer_time, r0, tol=tol, variant=variant)
    assert ratio == pytest.approx(0.6, abs=tol)
    assert value == layer_time(ratio) == probes[-1][1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_counts_every_measurement(variant: Variant) -> None:
    calls = []
    _, _, probes = golden_section(lambda r: calls.append(r) or layer_time(r), 0.6, variant=variant)
    assert [r for r, _ in probes] == calls
    # 0.85 shrinks by 0.618 a probe to 0.01: 10 or so, with the pairs and the last midpoint.
    assert 10 <= len(calls) <= 15


def test_warm_probe_comes_first_and_stays_inside() -> None:
    _, _, probes = golden_section(layer_time, 0.3)
    assert probes[0][0] == 0.3
    _, _, probes = golden_section(layer_time, 0.02, ratio_min=0.15)
    assert probes[0][0] == 0.15
    _, _, probes = golden_section(layer_time, 0.8)
    assert probes[1][0] == 0.8


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_minimum_at_either_end(variant: Variant) -> None:
    low, _, _ = golden_section(lambda r: r, 0.4, variant=variant)
    high, _, _ = golden_section(lambda r: -r, 0.4, variant=variant)
    assert low == pytest.approx(0.15, abs=0.01)
    assert high == pytest.approx(1.0, abs=0.01)


def test_bad_bracket() -> None:
    with pytest.raises(PlanError, match="tolerance"):
        golden_section(layer_time, 0.5, tol=0.0)
    with pytest.raises(PlanError, match="ratio_min"):
        golden_section(layer_time, 0.5, ratio_min=0.9, ratio_max=0.9)


class FakeBench:
    """`layer_time` of a plan's ratio; two requests make one measurement."""

    def __init__(self, *_: object) -> None:
        self.n_runs = 0

    def once(self, plan: ReusePlan) -> float:
        self.n_runs += 2
        return layer_time(plan.rules[0].ratios[0])


def test_runs_on_the_runtime_are_counted(
    monkeypatch: pytest.MonkeyPatch, workload: Workload
) -> None:
    monkeypatch.setattr(golden, "Bench", FakeBench)
    found = golden_on_runtime(None, workload, "mid", 0.41, n_repeats=5)  # type: ignore[arg-type]
    assert found.ratio == pytest.approx(0.6, abs=0.01)
    assert found.n_measurements == len(found.probes)
    assert found.n_runs == found.n_measurements * 5 * 2
    assert found.to_json()["probes"][0] == [0.41, layer_time(0.41)]


def test_only_the_ratio_changes() -> None:
    base = ReusePlan(layer_group=4, rules=(RatioRule(tier="x", load_exact=False), RatioRule()))
    plan = with_ratio(base, 0.4)
    assert plan.layer_group == 4
    assert plan.rule("x", 10).ratios == (0.4,)
    assert plan.rule("x", 10).load_exact is False
