"""Tiers as they are: the device's own memory is calibrated and served from when it is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
from cachetune.calibration.align import simulate_schedule
from cachetune.calibration.calibrate import Settings, calibrate, configs_of, open_runner
from cachetune.calibration.collect import run_once
from cachetune.calibration.ideal import load_rate
from cachetune.calibration.probes import Library, Probe, Shape, plan_with
from cachetune.core.errors import ProfileError
from cachetune.runtime.loaded_model import random_model
from transformers import LlamaConfig

CONFIG = LlamaConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=128, max_position_embeddings=4096,
)  # fmt: skip


def test_a_device_tier_is_calibrated_and_served_from(tmp_path: Path) -> None:
    loaded = random_model(CONFIG)
    settings = Settings(max_tokens=128, n_repeats=1, rhos=(), media=("dram", "device"))
    profile = calibrate(loaded, settings)
    assert {name: tier.medium for name, tier in profile.tiers.items()} == {
        "dram": "dram", "device": "device",
    }  # fmt: skip
    assert {"load.device.read", "load.device.byte", "load.device.link"} <= set(profile.coefficients)
    device = next(config for config in configs_of(profile) if config.name == "device")
    assert device.medium == "device" and load_rate(device, {})[0] == float("inf")
    workload = Library(loaded.spec, 0).workload(Shape(4, 64, 16))
    probe = Probe("hit", workload, plan_with("cachetune", 0.2), "device")
    with open_runner(profile, loaded, str(tmp_path)) as runner:
        timeline = run_once(runner, probe, prepare=True)
        index = runner.index(probe.plan, probe.tier)
        assert {entry.tier for entry in index.lookup(workload.contents) if entry} == {"device"}
        _, schedule = runner.batch_schedule(workload, probe.plan, index)
        counters = runner.store.counters
        assert counters.reads and counters.bytes_read == counters.requests == 0
    assert {s.op.tier for s in timeline.spans if s.op.kind == "load"} == {"device"}
    simulated = simulate_schedule(profile, schedule)
    assert [s.op for s in sorted(simulated.spans, key=lambda s: s.seq)] == list(schedule.ops)


@pytest.mark.parametrize("media", [(), ("device",), ("dram", "tape")])
def test_tiers_that_cannot_be_calibrated(media: tuple[str, ...]) -> None:
    with pytest.raises(ProfileError, match="dram among them"):
        Settings(media=media)
