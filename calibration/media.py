"""Media: what loads cost from DRAM and from files, alone, side by side and beside other ops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

from ..core.hardware import Coefficient, Tier
from ..core.standalone import LOADING, part_of
from ..core.timeline import Timeline
from .collect import Measured
from .fit import Fit, fit_loads, samples_of
from .probes import Library, Probe, Shape, plan_with

if TYPE_CHECKING:
    from ..runtime.runner import Runner
    from ..runtime.tiers import Medium, TierConfig

N_RUNS = 5
WORKERS = (1, 3)
N_CHUNKS = (1, 8)


def measure_media(
    runner: Runner, library: Library, tiers: Sequence[str], max_tokens: int
) -> list[Measured]:
    """Loads with nothing but loads beside them: two sizes, few and many, one worker and several."""
    found = []
    for tier in tiers:
        for tokens in (max_tokens // 16, max_tokens // 4):
            for n_chunks in N_CHUNKS:
                workload = library.workload(Shape(n_chunks, max(16, tokens), 16), shelf=50)
                for n_workers in WORKERS:
                    plan = plan_with("full_reuse", 0.0, n_io_workers=n_workers)
                    probe = Probe(f"media.{tier}.{n_chunks}x{tokens}", workload, plan, tier)
                    found.append(Measured(probe, _load_only(runner, probe)))
    return found


def _load_only(runner: Runner, probe: Probe) -> list[Timeline]:
    """The loads of a probe, `N_RUNS` times after a warm-up."""
    runner.prepare(probe.workload, probe.plan, probe.tier)
    index = runner.index(probe.plan, probe.tier)
    decisions, whole = runner.batch_schedule(probe.workload, probe.plan, index)
    part = part_of(whole, LOADING)
    return [
        runner.execute_schedule(probe.workload, probe.plan, decisions, part).timeline
        for _ in range(N_RUNS + 1)
    ][1:]


def fit_media(measured: Sequence[Measured], media: Mapping[str, Medium], seed: int) -> Fit:
    """`load.op`, by medium `load.<medium>.read`, `.byte`, `.link`, and `interference.io.*`.

    Args:
        measured: `measure_media`, then probes; only tiers that are not limited count.
        media: medium by tier, of these tiers.
    """
    # Whoever loads from a medium as it is uses all of it.
    whole = {
        name: Tier(medium=medium, link_bytes_per_s=1, worker_bytes_per_s=1, read_latency_s=0)
        for name, medium in media.items()
    }
    plain = [m for m in measured if m.probe.tier in media]
    samples = [
        sample
        for one in plain
        for sample in samples_of(one, whole)
        if sample.op.kind == "load" and sample.op.n_tokens
    ]
    fit = fit_loads(samples, media, seed)
    for tier, medium in media.items():
        byte = fit.coefficients[f"load.{medium}.byte"]
        several = [
            t
            for m in plain
            if m.probe.tier == tier and {s.op.kind for s in m.timelines[0].spans} == {"load"}
            for t in m.timelines
            if len(t.by_stream()) > 1
        ]
        fit.coefficients[f"load.{medium}.link"] = _link(several, byte)
    return fit


def _link(several: Sequence[Timeline], worker: Coefficient) -> Coefficient:
    """Seconds per byte with several workers at once; never slower than one of them."""
    seconds = [t.makespan_ns / 1e9 / sum(s.op.n_bytes for s in t.spans) for t in several]
    value = min(worker.value, median(seconds))
    low, high = min(value, *seconds), max(value, *seconds)
    return Coefficient(value=value, unit="s/byte", low=low, high=high)


def tiers_of(
    configs: Sequence[TierConfig],
    media: Mapping[str, Coefficient],
    rhos: Sequence[float],
    unbuffered: Mapping[str, bool | None],
) -> dict[str, Tier]:
    """Tiers with the rate and latency of their medium; a limited one has its limit as the link."""
    tiers = {}
    limits = [c for c in configs if c.limit_bytes_per_s is not None]
    for config in configs:
        worker = 1.0 / max(media[f"load.{config.medium}.byte"].value, 1e-12)
        link = 1.0 / max(media[f"load.{config.medium}.link"].value, 1e-12)
        limited = config.limit_bytes_per_s is not None
        tiers[config.name] = Tier(
            medium=config.medium,
            link_bytes_per_s=config.limit_bytes_per_s or link,
            worker_bytes_per_s=worker,
            read_latency_s=media[f"load.{config.medium}.read"].value,
            capacity_bytes=config.capacity_bytes,
            limited=limited,
            rho=rhos[limits.index(config)] if limited else None,
            unbuffered=unbuffered[config.name],
        )
    return tiers
