"""Every suggested plan is valid, and the list of knobs is whole."""

from __future__ import annotations

import optuna
import pytest
from cachetune.core.plan import RatioRule, ReusePlan
from cachetune.core.policies import n_recomputed
from cachetune.tuner.space import (
    KNOBS,
    Bounds,
    dimensions,
    group_edges,
    neighbours,
    params_with,
    plan_of,
    suggest,
)

BOUNDS = Bounds(tiers=("dram", "disk"), n_layers=8, chunk_tokens=64, ratio_min=0.15)
NOT_SEARCHED = {"rules", "pipeline_stages", "prefill_batch"}
"""Made of the per-tier knobs; given by the machine; for serving, not for one request's TTFT."""


def random_plans(bounds: Bounds, n: int) -> list[ReusePlan]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    return [suggest(study.ask(), bounds) for _ in range(n)]


def test_every_knob_of_the_plan_is_in_the_space() -> None:
    names = {knob.name for knob in KNOBS}
    assert set(ReusePlan.model_fields) - NOT_SEARCHED <= names
    assert {"ratio", "second_band", "load_exact"} <= names
    assert all(knob.why for knob in KNOBS)


def test_suggested_plans_are_valid_and_inside() -> None:
    for plan in random_plans(BOUNDS, 300):
        assert ReusePlan.model_validate_json(plan.model_dump_json()) == plan
        assert plan.layer_group <= 8 and plan.epic_tokens <= 64
        assert [rule.tier for rule in plan.rules] == ["dram", "disk", "*"]
        if plan.policy == "cachetune":
            for rule in plan.rules:
                assert 1 <= len(rule.ratios) <= 2
                assert all(0.15 <= r <= 1.0 for r in rule.ratios)


def test_random_plans_cover_both_bands_and_all_policies() -> None:
    plans = random_plans(BOUNDS, 300)
    assert {p.policy for p in plans} == set(BOUNDS.policies)
    assert {len(r.ratios) for p in plans for r in p.rules} == {1, 2}
    assert {r.load_exact for p in plans for r in p.rules} == {True, False}


@pytest.mark.parametrize(
    ("load_exact", "policy"), [(True, "prefix_cache"), (False, "full_recompute")]
)
def test_a_ratio_of_one_is_recompute(load_exact: bool, policy: str) -> None:
    params = params_with(BOUNDS, policy="cachetune", ratio=1.0, load_exact=load_exact)
    plan = plan_of(params, BOUNDS)
    assert plan.policy == policy
    assert plan.rule("disk", 100).load_exact is load_exact


def test_knobs_without_effect_are_plain() -> None:
    params = params_with(BOUNDS, policy="full_recompute", n_io_workers=4, look_ahead=7)
    plan = plan_of(params, BOUNDS)
    assert plan.n_io_workers == 1
    assert plan.look_ahead == ReusePlan().look_ahead
    assert plan.rules[0].ratios == (1.0,)


def test_deep_band_recomputes_no_more_and_keeps_the_floor() -> None:
    params = params_with(BOUNDS, ratio=0.5, n_bands=2, second_band=0.0)
    assert plan_of(params, BOUNDS).rules[0].ratios == (0.5, 0.15)
    params = params_with(BOUNDS, ratio=0.5, n_bands=2, second_band=1.0)
    assert plan_of(params, BOUNDS).rules[0].ratios == (0.5,)


def test_edges_load_whole_row_groups() -> None:
    bounds = Bounds(tiers=("dram",), n_layers=8, chunk_tokens=120, ratio_min=0.15)
    edges = group_edges(bounds)
    assert edges == [0.2, 0.467, 0.734]
    assert [120 - n_recomputed(e, 120) for e in edges] == [96, 64, 32]
    ratios = {p["ratio.dram"] for p in neighbours(params_with(bounds, ratio=0.3), bounds)}
    assert {0.2, 0.467} <= ratios


def test_prefix_cache_that_loads_nothing_is_recompute() -> None:
    params = params_with(BOUNDS, policy="prefix_cache", load_exact=False)
    assert plan_of(params, BOUNDS).policy == "full_recompute"


def test_ratio_differs_by_tier() -> None:
    params = params_with(BOUNDS)
    plan = plan_of({**params, "ratio.dram": 0.2, "ratio.disk": 0.8}, BOUNDS)
    assert plan.rule("dram", 10).ratios == (0.2,)
    assert plan.rule("disk", 10).ratios == (0.8,)


def test_neighbours_differ_in_one_dimension_and_make_valid_plans() -> None:
    params = params_with(BOUNDS)
    near = list(neighbours(params, BOUNDS))
    for one in near:
        assert sum(one[name] != params[name] for name in params) == 1
        plan_of(one, BOUNDS)
    assert {name for one in near for name in params if one[name] != params[name]} == {
        name for name, knob in dimensions(BOUNDS) if len(knob.choices) != 1
    }


def test_serving_knobs_are_searched_in_mode_serve_only() -> None:
    serve = Bounds(tiers=("dram",), n_layers=8, chunk_tokens=64, mode="serve")
    only = {name for name, _ in dimensions(serve)} - {name for name, _ in dimensions(BOUNDS)}
    assert {"prefill_chunk_tokens", "max_num_seqs"} <= only


def test_loads_are_limited_where_the_tier_is_slower_than_computing() -> None:
    bounds = Bounds(
        tiers=("dram", "disk"), n_layers=8, chunk_tokens=64, mode="serve",
        rhos={"dram": 0.2, "disk": 7.0},
    )  # fmt: skip
    params = params_with(bounds, load_what_pays=True)
    plan = plan_of(params, bounds)
    assert plan.rule("disk", 10).rho == 7.0 and plan.rule("dram", 10).rho is None
    assert all(r.rho is None for r in plan_of(params_with(bounds), bounds).rules)
    assert all(r.rho is None for r in plan_of({**params, "policy": "full_recompute"}, bounds).rules)


def test_rules_hold_for_unnamed_tiers() -> None:
    plan = plan_of(params_with(BOUNDS, ratio=0.3), BOUNDS)
    assert plan.rule("elsewhere", 10) == RatioRule(tier="*", ratios=(0.3,))
