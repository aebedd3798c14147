"""Ledgers, ideals and the balance by hand: round numbers, no clock."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from cachetune.calibration.balance import Balanced, ComputeCurve, candidates, summarise
from cachetune.calibration.ceilings import Ceiling
from cachetune.calibration.ideal import Ideal, Work, ideal_speedup, load_rate, op_flops
from cachetune.calibration.ledgers import OnPath, Preparation, break_even
from cachetune.calibration.probes import Library, Shape, plan_with
from cachetune.calibration.ttft import Measured, Row, ledgers, policy_plans
from cachetune.core.engine import schedule_of
from cachetune.core.ops import Op, Schedule
from cachetune.core.warm_index import warm_index
from support import make_model, make_profile

MODEL = make_model()


def ceiling(name: str, rate: float) -> Ceiling:
    return Ceiling(name, rate, rate, rate, "1/s", 20, "by hand")


LIMITS = {"device_copy": ceiling("device_copy", 4e9), "matmul": ceiling("matmul", 1e9)}


def test_full_recompute_has_the_flops_of_a_prefill() -> None:
    workload = Library(MODEL, 0).workload(Shape(2, 32, 16))
    plan = plan_with("full_recompute", 1.0)
    index = warm_index(workload, make_profile(model=MODEL), ["dram"])
    _, ops = schedule_of(workload, workload.requests[0], MODEL, plan, index)
    work = Work.of(Schedule.of(ops), MODEL)
    head = 2 * MODEL.vocab_size * MODEL.hidden_size
    assert work.n_bytes == 0
    assert work.flops == pytest.approx(MODEL.prefill_flops(80, 0) + head, rel=0.02)
    _, ops = schedule_of(workload, workload.requests[0], MODEL, plan_with("cachetune", 0.25), index)
    reused = Work.of(Schedule.of(ops), MODEL)
    assert reused.n_bytes == sum(op.n_bytes for op in ops if op.kind == "load") > 0
    assert 0.25 < reused.flops / work.flops < 0.6


def test_an_op_without_arithmetic_has_no_flops() -> None:
    assert op_flops(Op(0, "load", "io.dram.0", (0,), 0, 4, n_bytes=100), MODEL) == 0


def test_ideal_is_the_longer_of_load_and_compute() -> None:
    ideal = Ideal.of(Work(flops=4_000_000, n_bytes=1_000_000), 1e9, 1e9)
    assert (ideal.load_ms, ideal.compute_ms, ideal.ms) == (1.0, 4.0, 4.0)
    assert ideal_speedup(100.0, Work(1000, 0), Work(100, 5), load_ms=1.0) == pytest.approx(10.0)
    assert ideal_speedup(100.0, Work(1000, 0), Work(100, 5), load_ms=50.0) == pytest.approx(2.0)


def test_load_rate_is_the_limit_of_the_medium() -> None:
    tiers = pytest.importorskip("cachetune.runtime.tiers", reason="needs the runtime")
    assert load_rate(tiers.TierConfig("dram", "dram"), LIMITS)[0] == 2e9
    slow = tiers.TierConfig("slow", "dram", limit_bytes_per_s=5.0)
    assert load_rate(slow, LIMITS) == (5.0, "its limiter")
    with_disk = {**LIMITS, "disk": ceiling("disk", 7.0), "h2d": ceiling("h2d", 9.0)}
    assert load_rate(tiers.TierConfig("file", "file"), with_disk) == (7.0, "disk")
    assert load_rate(tiers.TierConfig("dram", "dram"), with_disk) == (9.0, "h2d")


@pytest.mark.parametrize(
    ("prepare_ms", "path_ms", "expected"), [(30.0, 90.0, 3), (31.0, 90.0, 4), (1.0, 100.0, None)]
)
def test_break_even(prepare_ms: float, path_ms: float, expected: int | None) -> None:
    assert break_even(prepare_ms, path_ms, baseline_ms=100.0) == expected


def test_four_ledgers_of_a_row() -> None:
    tiers = pytest.importorskip("cachetune.runtime.tiers", reason="needs the runtime")
    full = Row("full_recompute", "dram", 1.0, Work(100_000_000, 0), {})
    full.runs = [OnPath(100.0, 1.0, 110.0)]
    reused = Row("cachetune", "dram", 0.15, Work(20_000_000, 2_000_000), {"a": 64, "b": 64})
    reused.runs = [OnPath(t, 1.0, t + 5) for t in (24.0, 25.0, 40.0)]
    prepared = {"low_pass": Preparation({"a": 0.1, "b": 0.05, "unused": 9.0}, {"encode_s": 0.1})}
    measured = Measured([full, reused], {"hf generate": [120.0, 105.0, 300.0]}, prepared)
    assert measured.baseline_ms("ttft_ms") == 100.0
    assert measured.baseline_ms("path_ms") == 110.0
    config = tiers.TierConfig("dram", "dram")
    base, row = ledgers(measured, policy_plans(0.15, 64), config, LIMITS)
    assert (row["ttft_ms"], row["path_ms"]) == (25.0, 30.0)
    assert (row["prepare_ms"], row["prepared_ms"]) == pytest.approx((150.0, 180.0))
    assert row["break_even"] == 2  # 150 / (110 - 30)
    assert row["speedup"] == pytest.approx(4.0)
    assert row["path_speedup"] == pytest.approx(110 / 30)
    assert row["flops_skipped"] == pytest.approx(0.8)
    assert (row["ideal_load_ms"], row["ideal_compute_ms"], row["ideal_ms"]) == (1.0, 20.0, 20.0)
    assert row["of_ideal"] == pytest.approx(0.8)
    assert row["ideal_speedup"] == pytest.approx(5.0)
    assert base["prepare_ms"] == 0.0 and base["break_even"] == 0 and base["n_bytes"] == 0


def line(*, load_exact: bool = False) -> ComputeCurve:
    """Compute of r seconds; 1 GB at r = 0, none at 1."""
    ratios = (0.0, 0.3, 0.6, 1.0)
    fine = tuple(i / 100 for i in range(101))
    return ComputeCurve(
        load_exact,
        ratios,
        tuple((1e3 * r,) * 3 for r in ratios),
        tuple(round(1e9 * (1 - r)) for r in ratios),
        fine,
        tuple(round(1e9 * (1 - r)) for r in fine),
    )


@pytest.mark.parametrize("rho", [0.1, 0.7, 4.0, 25.0])
def test_balance_is_where_load_and_compute_cross(rho: float) -> None:
    """Compute of r seconds, load of rho (1 - r): equal at rho / (1 + rho)."""
    limit = 1e9 / rho
    ratio, ms = line().balanced(limit)
    assert ratio == pytest.approx(rho / (1 + rho), abs=0.011)
    assert 1 <= ms / (1e3 * rho / (1 + rho)) < 1.1
    bounds = line().bounds_ms(limit)
    assert bounds[0] == pytest.approx(1e3 * rho) and bounds[-1] == 1e3
    assert min(bounds) >= 1e3 * rho / (1 + rho) - 1e-6


def test_a_curve_comes_back_from_its_file() -> None:
    assert ComputeCurve.from_json(json.loads(json.dumps(asdict(line())))) == line()


def test_the_bound_is_over_all_that_was_measured() -> None:
    one = Balanced("same", (0.4,), Work(1, 1), [460.0], [400.0], [420.0], [418.0], [380.0])
    curves = [line(), line(load_exact=True)]
    (row,) = summarise([one], curves, rho=1.0, limit_bytes_per_s=1e9, slower=1.0)
    assert row["bound_ms"] == 420.0  # the curves' best measured ratio gives 600
    assert row["factor"] == row["overlap"] == pytest.approx(460 / 420)
    assert row["slowdown"] == pytest.approx(1.1)
    assert row["speedup"] == pytest.approx(1000 / 460) and row["allowed_speedup"] == 2.0


@pytest.mark.parametrize(("slower", "bound_ms"), [(0.5, 400.0), (1.0, 600.0), (1.2, 700.0)])
def test_the_bound_is_of_the_minutes_of_the_rows(slower: float, bound_ms: float) -> None:
    """At 0.3 loads take 700 ms and at 0.6 400; computing takes `slower` times 300 and 600."""
    one = Balanced("same", (0.4,), Work(1, 1), [900.0], [400.0], [900.0], [900.0], [900.0])
    (row,) = summarise([one], [line()], rho=1.0, limit_bytes_per_s=1e9, slower=slower)
    assert row["bound_ms"] == pytest.approx(bound_ms)
    assert row["speedup"] == pytest.approx(slower * 1000 / 900)


def test_the_staged_plans_compute_as_much() -> None:
    plans = candidates(0.4, 4, 320, load_exact=False)
    falling = plans["falling"].rule("any", 1).ratios
    assert falling == (0.8, 0.5, 0.3, 0.0) and sum(falling) == pytest.approx(4 * 0.4)
    staged = plans["first layer whole"].rule("any", 1)
    assert staged.ratios[0] == 1.0 and sum(staged.ratios) == pytest.approx(4 * 0.4)
    assert plans["same in all layers"].rule("any", 1).ratios == (0.4,)
    assert not staged.load_exact
    least = candidates(0.1, 4, 320, load_exact=True)["first layer whole"].rule("any", 1)
    assert least.ratios == (1.0, 0.0, 0.0, 0.0) and least.load_exact
