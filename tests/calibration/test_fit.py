"""The fits find what was put in: probes run on the simulator, whose coefficients are known."""

from __future__ import annotations

import pytest
from cachetune.calibration.align import align
from cachetune.calibration.calibrate import fit_all
from cachetune.calibration.collect import Measured
from cachetune.calibration.media import fit_media
from cachetune.calibration.probes import Library, Probe, Shape, held_out, ladder, plan_with
from cachetune.core.engine import batch_schedule_of
from cachetune.core.executor import execute
from cachetune.core.hardware import HardwareProfile
from cachetune.core.ops import Schedule
from cachetune.core.standalone import LOADING, part_of
from cachetune.core.timeline import Timeline
from cachetune.core.warm_index import warm_index
from cachetune.simulator.executor import SimExecutor
from support import make_model, make_profile, make_tier

US = 1e-6
KNOWN = {
    "load.op": 30 * US,
    "restore.op": 90 * US,
    "restore.layer": 60 * US,
    "restore.piece": 15 * US,
    "restore.byte": 6e-10,
    "select.op": 500 * US,
    "select.chunk": 40 * US,
    "select.row": 2 * US,
    "prefill.op": 50 * US,
    "prefill.layer": 1200 * US,
    "prefill.sparse_layer": 300 * US,
    "prefill.small_flop": 2e-9,
    "prefill.flop": 1e-9,
    "prefill.attention_flop": 1.5e-9,
    "prefill.causal_flop": 1e-9,
    "head.op": 900 * US,
    "decode.op": 1000 * US,
    "decode.layer": 500 * US,
    "decode.batched_layer": 265 * US,
    "decode.row_layer": 100 * US,
    "decode.attention_flop": 1e-9,
    "dispatch.gap": 50 * US,
}
SHARES = {
    "interference.compute.restore": 0.4,
    "interference.compute.dram": 0.3,
    "interference.restore.compute": 0.2,
    "interference.io.compute": 0.25,
}
MODEL = make_model(max_position=1 << 16)
TIERS = {"dram": make_tier(8e9, worker=8e9, latency_s=10 * US)}


def machine(shares: dict[str, float]) -> HardwareProfile:
    return make_profile(model=MODEL, tiers=TIERS, coefficients_s=KNOWN | shares)


def run(profile: HardwareProfile, probe: Probe, loads_only: bool = False) -> Timeline:
    index = warm_index(probe.workload, profile, [probe.tier])
    _, ops = batch_schedule_of(probe.workload, MODEL, probe.plan, index, probe.n_decode)
    schedule = Schedule.of(ops)
    if loads_only:
        schedule = part_of(schedule, LOADING)
    return execute(schedule, SimExecutor(profile))


def probes_on(profile: HardwareProfile) -> list[Measured]:
    return [Measured(p, [run(profile, p)]) for p in ladder(Library(MODEL, 3), ["dram"], 1024)]


def media_on(profile: HardwareProfile) -> list[Measured]:
    library = Library(MODEL, 3)
    probes = [
        Probe("m", library.workload(Shape(n, t, 16)), plan_with("full_reuse", 0.0), "dram")
        for n in (1, 8)
        for t in (64, 256)
    ]
    several = plan_with("full_reuse", 0.0, n_io_workers=3)
    probes += [Probe("m", p.workload, several, "dram") for p in probes]
    return [Measured(p, [run(profile, p, loads_only=True)]) for p in probes]


@pytest.mark.parametrize(("shares", "worst"), [({}, 0.01), (SHARES, 0.05)], ids=["alone", "beside"])
def test_what_was_fitted_predicts_what_was_not(shares: dict[str, float], worst: float):
    """Held-out schedules on the machine that is known, and on the one its probes tell of."""
    known = machine(shares)
    measured = probes_on(known)
    media = fit_media([*media_on(known), *measured], {"dram": "dram"}, seed=0)
    coefficients, fits = fit_all(measured, MODEL, TIERS, seed=0)
    found = align(known.replace(coefficients=coefficients | media.coefficients), measured)
    assert all(c.low <= c.value <= c.high for c in found.coefficients.values())
    assert min(fits[kind].r2 for kind in ("prefill", "restore", "decode")) > 0.98
    for probe in held_out(Library(MODEL, 7), {"dram": None}, 1024, 30, seed=7):
        real, predicted = run(known, probe), run(found, probe)
        assert predicted.makespan_ns == pytest.approx(real.makespan_ns, rel=worst), probe.name


def test_alignment_takes_out_a_bias_of_a_kind():
    """A restore that costs three tenths more than the profile says; nothing else moves."""
    known = machine({})
    cheap = {
        name: c.replace(value=c.value / 1.3) if name.startswith("restore.") else c
        for name, c in known.coefficients.items()
    }
    aligned = align(known.replace(coefficients=cheap), probes_on(known)).coefficients
    for name, c in known.coefficients.items():
        assert aligned[name].value == pytest.approx(c.value, rel=0.002), name


def test_the_held_out_draw_reaches_every_tier_and_policy():
    tiers = {"dram": None, "file": None, "rho0.1": 0.1, "rho0.7": 0.7, "rho4": 4.0, "rho25": 25.0}
    drawn = held_out(Library(MODEL, 5), tiers, 512, 30, seed=5)
    assert {p.tier for p in drawn} == set(tiers)
    assert {p.plan.policy for p in drawn} == {
        "cachetune", "epic", "full_reuse", "full_recompute", "cacheblend", "prefix_cache",
    }  # fmt: skip
    assert drawn == held_out(Library(MODEL, 5), tiers, 512, 30, seed=5)
    assert drawn != held_out(Library(MODEL, 5), tiers, 512, 30, seed=6)
