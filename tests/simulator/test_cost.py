"""Costs by hand, the contract of feature names, and errors for what a profile lacks."""

from __future__ import annotations

import pytest
from cachetune.core.errors import ProfileError
from cachetune.core.hardware import HardwareProfile
from cachetune.simulator.cost import COEFFICIENTS, FEATURES, CostModel, LoadParts, features
from cachetune.simulator.executor import SimExecutor
from support import COEFFICIENTS_S, NS, make_model, make_op, make_profile, make_tier

MODEL = make_model()
LAYERS = dict(layer_start=1, layer_stop=3)


def test_features_by_hand():
    """One layer has 2 x 16 x (2 x 16 + 16 + 96) = 4608 flops per row, 64 per pair."""
    prefill = make_op(0, "prefill", n_tokens=100, n_pairs=5, n_scored=7, **LAYERS)
    assert features(prefill, MODEL) == {
        "prefill.op": 1,
        "prefill.layer": 2,
        "prefill.sparse_layer": 2,
        "prefill.small_flop": 4608 * 64 * 2,
        "prefill.flop": 4608 * 36 * 2,
        "prefill.attention_flop": 64 * 7 * 2,
        "prefill.causal_flop": 0,
    }
    whole = features(make_op(0, "prefill", n_tokens=3, n_pairs=6, n_scored=6, **LAYERS), MODEL)
    assert (whole["prefill.sparse_layer"], whole["prefill.attention_flop"]) == (0, 0)
    assert whole["prefill.causal_flop"] == 64 * 6 * 2
    decode = make_op(0, "decode", n_tokens=3, n_pairs=50, **LAYERS)
    assert features(decode, MODEL) == {
        "decode.op": 1,
        "decode.layer": 2,
        "decode.batched_layer": 2,
        "decode.row_layer": 6,
        "decode.attention_flop": 64 * 50 * 2,
    }
    alone = make_op(0, "decode", n_tokens=1, n_pairs=50, **LAYERS)
    assert features(alone, MODEL)["decode.batched_layer"] == 0
    restore = make_op(0, "restore", n_tokens=5, n_reads=4, n_bytes=640, **LAYERS)
    assert features(restore, MODEL) == {
        "restore.op": 1,
        "restore.layer": 2,
        "restore.piece": 4,
        "restore.byte": 640,
    }
    select = make_op(0, "select", n_tokens=9, chunks=(0, 2))
    assert features(select, MODEL) == {"select.op": 1, "select.chunk": 2, "select.row": 9}
    assert features(make_op(0, "head", n_tokens=1), MODEL) == {"head.op": 1}
    assert features(make_op(0, "load", n_bytes=9), MODEL) == {"load.op": 1}


@pytest.mark.parametrize("kind", sorted(FEATURES))
def test_zero_rows_cost_the_overhead_only(kind: str):
    op = make_op(0, kind, layer_stop=4, tier="dram")
    found = features(op, MODEL)
    assert tuple(found) == FEATURES[op.kind]
    assert {name for name, value in found.items() if value} == {f"{kind}.op"}
    assert CostModel(make_profile()).alone_ns(op) == round(COEFFICIENTS_S[f"{kind}.op"] / NS)


def test_durations_by_hand():
    cost = CostModel(make_profile(coefficients_s={"prefill.flop": NS / 4608}))
    assert cost.duration_ns(make_op(0, "prefill", n_tokens=100, **LAYERS)) == 100 + 20 + 72
    assert cost.duration_ns(make_op(0, "select", n_tokens=9)) == 7 + 9
    assert cost.duration_ns(make_op(0, "decode", n_tokens=3, **LAYERS)) == 20 + 6


def test_a_load_has_a_fixed_part_and_bytes():
    tiers = {"disk": make_tier(1e9, worker=0.25e9, latency_s=100 * NS)}
    cost = CostModel(make_profile(tiers=tiers))
    op = make_op(0, "load", "io.disk.0", n_bytes=1000, n_reads=3, tier="disk")
    assert cost.load_ns(op) == LoadParts(fixed_ns=10 + 3 * 100, n_bytes=1000, alone_ns=4000)
    assert cost.alone_ns(op) == 4310


def test_coefficients_are_the_contract():
    assert set(COEFFICIENTS) == set(COEFFICIENTS_S)
    assert len(COEFFICIENTS) == len(set(COEFFICIENTS))


@pytest.mark.parametrize("name", sorted(COEFFICIENTS_S))
def test_a_missing_coefficient_is_named(name: str):
    profile = make_profile()
    rest = {k: v for k, v in profile.coefficients.items() if k != name}
    profile = profile.replace(coefficients=rest)
    kind = name.partition(".")[0]
    with pytest.raises(ProfileError, match=f"must hold the coefficient '{name}'.*calibrate again"):
        use(profile, kind)


def use(profile: HardwareProfile, kind: str) -> None:
    """Need each coefficient of `kind`."""
    op = make_op(0, "head" if kind == "dispatch" else kind, tier="dram")
    SimExecutor(profile).submit([op])


def test_a_missing_tier_lists_those_there_are():
    with pytest.raises(ProfileError, match="one of disk, dram, got 'tape'"):
        CostModel(make_profile()).load_ns(make_op(0, "load", tier="tape"))


def test_coefficients_of_other_kinds_are_not_needed():
    profile = make_profile()
    few = {k: v for k, v in profile.coefficients.items() if k.startswith(("head", "dispatch"))}
    executor = SimExecutor(profile.replace(coefficients=few))
    executor.submit([make_op(0, "head")])
    assert [s.end_ns for s in executor.wait(None)] == [50]
