"""Measure this machine with one model: probes on the real executor become a `HardwareProfile`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import TYPE_CHECKING

import numpy as np

from ..core.hardware import Coefficient, FitReport, HardwareProfile, Tier
from ..core.model_spec import ModelSpec
from ..core.ops import OpKind
from ..core.standalone import LOADING, part_of
from ..core.timeline import Timeline
from ..simulator.cost import DISPATCH_GAP
from .collect import Measured, collect, run_once
from .fit import Sample, dispatch_gap, extras_of, fit_kind, intervals, report
from .probes import Library, Probe, Shape, ladder, plan_with

if TYPE_CHECKING:
    from ..runtime.loaded_model import LoadedModel
    from ..runtime.runner import Runner
    from ..runtime.tiers import TierConfig

RHOS = (0.1, 0.7, 4.0, 25.0)
"""Transfer over recompute time per token: an H200 with PCIe, NVMe, 10 Gbps and HDD."""

N_MEDIA_RUNS = 5
LINK_WORKERS = 3
PROBED_RHO = 1.0
"""Slower tiers are not probed: their loads follow from the limit."""

Progress = Callable[[str, int, int], None]


def rho_tier(rho: float) -> str:
    """Name of the tier limited to `rho`."""
    return f"rho{rho:g}"


@dataclass(frozen=True)
class Settings:
    """How thoroughly to measure."""

    max_tokens: int = 1024
    """Longest probe prompt; held-out checks go to twice it."""
    n_repeats: int = 6
    rhos: tuple[float, ...] = RHOS
    compute_threads: int = 1
    seed: int = 0


def tier_configs(model: ModelSpec, token_s: float, rhos: Sequence[float]) -> list[TierConfig]:
    """DRAM and file as they are, and DRAM limited to each rho.

    Args:
        token_s: seconds to recompute one token at the reference length.
    """
    from ..runtime.tiers import TierConfig

    configs = [TierConfig("dram", "dram"), TierConfig("file", "file")]
    for rho in rhos:
        limit = model.kv_bytes_per_token / (rho * token_s)
        configs.append(TierConfig(rho_tier(rho), "dram", limit_bytes_per_s=limit))
    return configs


def configs_of(profile: HardwareProfile) -> list[TierConfig]:
    """The tiers of a profile as the runtime opens them: the same limits."""
    from ..runtime.tiers import TierConfig

    return [
        TierConfig(
            name,
            "file" if tier.medium == "file" else "dram",
            limit_bytes_per_s=tier.link_bytes_per_s if tier.limited else None,
            capacity_bytes=tier.capacity_bytes,
        )
        for name, tier in profile.tiers.items()
    ]


def open_runner(profile: HardwareProfile, loaded: LoadedModel, store_dir: str) -> Runner:
    """A runner whose tiers are the profile's.

    Raises:
        ProfileError: the profile was measured with another model.
    """
    from ..core.errors import ProfileError
    from ..runtime.runner import Runner

    if profile.model_fingerprint != loaded.fingerprint:
        raise ProfileError(
            "the profile must be of this model",
            values=f"profile {profile.model_fingerprint}, model {loaded.fingerprint}",
            remedy="calibrate with this model",
        )
    threads = profile.device.compute_threads
    return Runner(loaded, store_dir, configs_of(profile), compute_threads=threads)


def calibrate(
    loaded: LoadedModel, settings: Settings, progress: Progress | None = None
) -> HardwareProfile:
    """Probe, fit, assemble. Takes about `n_repeats` x 64 prompts of up to `max_tokens`."""
    from ..runtime.machine import device_here, provenance_here
    from ..runtime.runner import Runner

    tell = progress or (lambda what, done, total: None)
    library = Library(loaded.spec, settings.seed)
    threads = settings.compute_threads
    with tempfile.TemporaryDirectory(prefix="cachetune-") as folder:
        plain = tier_configs(loaded.spec, 1.0, ())
        with Runner(loaded, folder, plain, compute_threads=threads) as r:
            token_s = recompute_s_per_token(r, library, settings)
            loads = measure_media(r, library, [c.name for c in plain], settings.max_tokens)
        configs = tier_configs(loaded.spec, token_s, settings.rhos)
        with Runner(loaded, folder, configs, compute_threads=threads) as runner:
            fast = [c.name for c in plain]
            # Limited tiers too: an op that waited finds other things in the caches.
            waiting = [rho_tier(rho) for rho in settings.rhos if rho < PROBED_RHO]
            probes = ladder(library, [*fast, *waiting], settings.max_tokens)
            measured = collect(
                runner,
                probes,
                settings.n_repeats,
                lambda done, total: tell("probes", done, total),
            )
            unbuffered = {c.name: runner.store.is_unbuffered(c.name) for c in configs}
    device = device_here(threads)
    media, load_fit = fit_media(loads, {c.name: c.medium for c in plain}, settings.seed)
    tiers = tiers_of(configs, media, settings.rhos, unbuffered)
    coefficients, fits = fit_all(measured, loaded.spec, tiers, settings.seed)
    coefficients |= media
    fits["load"] = load_fit
    return HardwareProfile(
        name=f"{device.kind}-{loaded.spec.name}",
        device=device,
        model=loaded.spec,
        model_fingerprint=loaded.fingerprint,
        tiers=tiers,
        coefficients=coefficients,
        fits=fits,
        provenance=provenance_here(settings.seed),
    )


def recompute_s_per_token(runner: Runner, library: Library, settings: Settings) -> float:
    """t_c: median time of a full recompute at the longest probe, over its tokens."""
    shape = Shape(8, settings.max_tokens // 8, 16)
    probe = Probe("t_c", library.workload(shape), plan_with("full_recompute", 1.0), "dram")
    run_once(runner, probe)
    times = [run_once(runner, probe).makespan_ns / 1e9 for _ in range(3)]
    return median(times) / probe.n_prompt


def fit_all(
    measured: Sequence[Measured], model: ModelSpec, tiers: Mapping[str, Tier], seed: int
) -> tuple[dict[str, Coefficient], dict[str, FitReport]]:
    """Every kind but load. Interference is fitted where there is most of it."""
    samples: dict[OpKind, list[Sample]] = {}
    for one in measured:
        extras = [extras_of(t, tiers) for t in one.timelines]
        for op in one.ops():
            if op.kind != "load" and (op.n_tokens or op.kind == "head"):
                names = {name for found in extras for name in found[op.op_id]}
                beside = {n: mean(f[op.op_id].get(n, 0.0) for f in extras) for n in names}
                sample = Sample(op, one.median_ns(op.op_id) / 1e9, beside)
                samples.setdefault(op.kind, []).append(sample)
    coefficients: dict[str, Coefficient] = {}
    fits: dict[str, FitReport] = {}
    for kind, found in sorted(samples.items()):
        fit = fit_kind(kind, found, model, seed)
        coefficients |= fit.coefficients
        fits[kind] = fit.report
    coefficients[DISPATCH_GAP] = dispatch_gap([t for m in measured for t in m.timelines], seed)
    return coefficients, fits


def measure_media(
    runner: Runner, library: Library, tiers: Sequence[str], max_tokens: int
) -> dict[str, list[Timeline]]:
    """Loads with nothing beside them, by tier: two sizes, one worker and several."""
    found: dict[str, list[Timeline]] = {}
    for tier in tiers:
        for tokens in (max_tokens // 16, max_tokens // 4):
            workload = library.workload(Shape(8, max(16, tokens), 16), shelf=50)
            for n_workers in (1, LINK_WORKERS):
                plan = plan_with("full_reuse", 0.0, n_io_workers=n_workers)
                runner.prepare(workload, plan, tier)
                decisions, whole = runner.batch_schedule(workload, plan, runner.index(plan, tier))
                part = part_of(whole, LOADING)
                for turn in range(N_MEDIA_RUNS + 1):
                    timeline = runner.execute_schedule(workload, plan, decisions, part).timeline
                    if turn:
                        found.setdefault(tier, []).append(timeline)
    return found


def fit_media(
    loads: Mapping[str, Sequence[Timeline]], media: Mapping[str, str], seed: int
) -> tuple[dict[str, Coefficient], FitReport]:
    """`load.op`, and for each medium `load.<medium>.read`, `.byte` and `.link`.

    Args:
        loads: what `measure_media` found.
        media: medium by tier, DRAM first: an op's own overhead shows most there.
    """
    found: dict[str, Coefficient] = {}
    seen: list[tuple[float, float]] = []
    for tier, medium in media.items():
        alone = [t for t in loads[tier] if len(t.by_stream()) == 1]
        spans = [s for t in alone for s in t.spans]
        names = [f"load.{medium}.read", f"load.{medium}.byte"]
        x = np.array([[s.op.n_reads, s.op.n_bytes] for s in spans], dtype=float)
        y = np.array([s.duration_ns / 1e9 for s in spans])
        if "load.op" not in found:
            x_op = np.hstack([x, np.ones((len(y), 1))])
            found |= intervals(x_op, y, [*names, "load.op"], seed)
        else:
            found |= intervals(x, np.maximum(y - found["load.op"].value, 1e-9), names, seed)
        found[f"load.{medium}.link"] = _link(loads[tier], found[names[1]])
        predicted = found["load.op"].value + x @ [found[name].value for name in names]
        seen += list(zip(y, predicted, strict=True))
    y, predicted = np.array(seen).T
    return found, report(y, predicted)


def _link(timelines: Sequence[Timeline], worker: Coefficient) -> Coefficient:
    """Seconds per byte with several workers at once; never slower than one of them."""
    several = [
        t.makespan_ns / 1e9 / sum(s.op.n_bytes for s in t.spans)
        for t in timelines
        if len(t.by_stream()) > 1
    ]
    value = min(worker.value, median(several))
    low, high = min(value, *several), max(value, *several)
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
