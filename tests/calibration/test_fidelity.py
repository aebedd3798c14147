"""A check predicts each run before it measures it, and follows the machine's speed."""

from __future__ import annotations

import pytest
from cachetune.calibration import fidelity
from cachetune.calibration.calibrate import Settings, calibrate
from cachetune.calibration.fidelity import Point
from cachetune.calibration.probes import Probe
from cachetune.core.ops import OpKind
from cachetune.core.timeline import Timeline
from cachetune.runtime.loaded_model import random_model
from cachetune.runtime.runner import Runner
from transformers import LlamaConfig

N_SCHEDULES, N_REPEATS, MAX_TOKENS = 4, 3, 128


def test_a_check_predicts_first_and_follows_the_speed(monkeypatch: pytest.MonkeyPatch):
    """A profile that says a tenth of what ops take is put right by the probes in between."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=128, max_position_embeddings=4096,
    )  # fmt: skip
    loaded = random_model(config)
    profile = calibrate(loaded, Settings(max_tokens=MAX_TOKENS, n_repeats=1, rhos=(0.5,)))
    fast = profile.replace(
        coefficients={
            name: c
            if name.startswith(("interference", "load", "link", "dispatch"))
            else c.replace(value=c.value / 10, low=c.low / 10, high=c.high / 10)
            for name, c in profile.coefficients.items()
        }
    )
    events: list[str] = []
    run_once = fidelity.run_once

    def run(runner: Runner, probe: Probe, *, prepare: bool = False) -> Timeline:
        events.append(f"run {probe.name}")
        return run_once(runner, probe, prepare=prepare)

    monkeypatch.setattr(fidelity, "run_once", run)
    kept: list[int] = []

    def keep(so_far: list[Point], drift: dict[OpKind, float]) -> None:
        """What a check that is ended leaves is whole."""
        assert fidelity.summarise(so_far, drift)["n_points"] == N_SCHEDULES
        kept.extend({len(p.ttft_ms_measured) for p in so_far})

    points, drift = fidelity.check(
        fast,
        loaded,
        seed=5,
        n_schedules=N_SCHEDULES,
        n_repeats=N_REPEATS,
        max_tokens=MAX_TOKENS,
        on_predicted=lambda p: events.append(f"{p['repeat']} {p['schedule']}"),
        keep=keep,
    )
    assert kept == list(range(2, N_REPEATS + 1))
    names = [p.name for p in points]
    expected = [f"None {name}" for name in names] + [f"run {name}" for name in names]
    for turn in range(1, N_REPEATS + 1):
        expected += [e for name in names for e in (f"{turn} {name}", f"run {name}")]
    assert events == expected
    assert 3 < drift["prefill"] < 30
    assert {len(p.ttft_ms_predicted) for p in points} == {N_REPEATS}
    assert {len(p.ttft_ms_measured) for p in points} == {N_REPEATS}
    summary = fidelity.summarise(points, drift)
    assert summary["n_points"] == N_SCHEDULES
    before = summary["as_calibrated"]["by_op"]["prefill"]
    assert before > 0.6
    assert summary["by_op"]["prefill"]["error_median"] < 0.75 * before


def test_errors_are_medians_over_the_repeats():
    point = Point(
        "a", "dram", False, "cachetune", 100, ttft_ms_as_calibrated=10,
        op_ms_as_calibrated={"prefill": 4}, ttft_ms_predicted=[11, 9, 40],
        ttft_ms_measured=[10, 10, 20], op_ms_predicted={"prefill": [4, 4, 4]},
        op_ms_measured={"prefill": [5, 2, 4]},
    )  # fmt: skip
    assert point.ttft_error == pytest.approx(0.1)
    assert point.a_a_error == pytest.approx(15 / 10 - 1)
    assert point.op_error("prefill") == 0
    summary = fidelity.summarise([point], {"prefill": 1.5})
    assert summary["ttft_error_p95"] == pytest.approx(0.1)
    assert summary["as_calibrated"]["ttft_error_median"] == 0
    assert summary["as_calibrated"]["by_op"] == {"prefill": 0}
    assert summary["drift"] == {"prefill": 1.5}
