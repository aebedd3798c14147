"""Alignment: a fitted profile replays its own probes; each kind of op is scaled to what they took.

A fit sees one op at a time, at its median, with the overlap that was measured. A simulation adds
ops up and makes its own overlap, so small biases of a kind add up too. One factor per kind, from
the probes alone, takes them out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from ..core.executor import execute
from ..core.hardware import HardwareProfile
from ..core.ops import OpKind, Schedule
from ..core.timeline import Timeline
from ..simulator.cost import FEATURES, wake_coefficient
from ..simulator.executor import SimExecutor
from .collect import Measured

N_ROUNDS = 2
ALIGNED: tuple[OpKind, ...] = ("prefill", "restore", "select", "head", "decode")
"""All but loads: they follow their tier's rate."""
LEAST_PROBES = 5
"""A kind that fewer probes have is scaled as `prefill`, whose stream it shares."""


def align(profile: HardwareProfile, measured: Sequence[Measured]) -> HardwareProfile:
    """The profile with the coefficients of each kind scaled to the probes' medians."""
    for _ in range(N_ROUNDS):
        profile = scaled(profile, factors_of(profile, measured))
    return profile


def scaled(profile: HardwareProfile, factors: Mapping[OpKind, float]) -> HardwareProfile:
    """The profile with ops of each kind taking `factors[kind]` times as long."""
    coefficients = dict(profile.coefficients)
    for kind, factor in factors.items():
        for name in (*FEATURES[kind], wake_coefficient(kind)):
            if (found := coefficients.get(name)) is not None:
                coefficients[name] = found.replace(
                    value=found.value * factor, low=found.low * factor, high=found.high * factor
                )
    return profile.replace(coefficients=coefficients)


def factors_of(profile: HardwareProfile, measured: Sequence[Measured]) -> dict[OpKind, float]:
    """By kind: median over the probes of what its ops took over what the simulation says.

    Kinds of too few probes follow `prefill`.
    """
    ratios: dict[OpKind, list[float]] = {}
    for one in measured:
        simulated = ms_by_kind(simulate_schedule(profile, Schedule.of(one.ops())))
        real = [ms_by_kind(t) for t in one.timelines]
        for kind in ALIGNED:
            if simulated.get(kind, 0.0) > 0.0:
                took = median(found[kind] for found in real)
                ratios.setdefault(kind, []).append(took / simulated[kind])
    return medians(ratios)


def medians(ratios: Mapping[OpKind, Sequence[float]]) -> dict[OpKind, float]:
    """By kind the median; kinds of too few probes follow `prefill`, whose stream they share."""
    return {
        kind: median(found if len(found) >= LEAST_PROBES else ratios.get("prefill", found))
        for kind, found in ratios.items()
    }


def simulate_schedule(profile: HardwareProfile, schedule: Schedule) -> Timeline:
    """One fixed DAG on the simulated executor, without noise."""
    return execute(schedule, SimExecutor(profile))


def ms_by_kind(timeline: Timeline) -> dict[str, float]:
    """Milliseconds of all ops of a kind."""
    total: dict[str, float] = {}
    for span in timeline.spans:
        total[span.op.kind] = total.get(span.op.kind, 0.0) + span.duration_ns / 1e6
    return total
