"""Measure this machine with one model: probes on the real executor become a `HardwareProfile`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from ..core.errors import ProfileError
from ..core.hardware import Coefficient, FitReport, HardwareProfile, Tier
from ..core.model_spec import ModelSpec
from ..core.ops import OpKind
from ..simulator.cost import DISPATCH_GAP
from .align import align
from .collect import Measured, collect, run_once
from .fit import Sample, dispatch_gap, fit_kind, samples_of
from .media import fit_media, measure_media, tiers_of
from .probes import Library, Probe, Shape, ladder, plan_with

if TYPE_CHECKING:
    from ..runtime.loaded_model import LoadedModel
    from ..runtime.runner import Runner
    from ..runtime.tiers import Medium, TierConfig

RHOS = (0.1, 0.7, 4.0, 25.0)
"""Transfer over recompute time per token: an H200 with PCIe, NVMe, 10 Gbps and HDD."""

MEDIA: tuple[Medium, ...] = ("dram", "file", "device")
"""Tiers as they are that may be measured; DRAM always is."""

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
    device: str = "cpu"
    """cpu, cuda or cuda:<i>."""
    media: tuple[Medium, ...] = ("dram", "file")
    """Tiers as they are, of `MEDIA`."""

    def __post_init__(self) -> None:
        if "dram" not in self.media or not set(self.media) <= set(MEDIA):
            raise ProfileError(
                f"the tiers to calibrate must be of {', '.join(MEDIA)}, dram among them",
                values=", ".join(self.media) or "none",
                remedy="name dram and any of the others, each once",
            )


def tier_configs(
    model: ModelSpec, token_s: float, rhos: Sequence[float], media: Sequence[Medium] = MEDIA[:2]
) -> list[TierConfig]:
    """A tier of each medium as it is, by its name, and DRAM limited to each rho.

    Args:
        token_s: seconds to recompute one token at the reference length.
    """
    from ..runtime.tiers import TierConfig

    configs = [TierConfig(medium, medium) for medium in dict.fromkeys(media)]
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
            "dram" if tier.medium == "remote" else tier.medium,
            limit_bytes_per_s=tier.link_bytes_per_s if tier.limited else None,
            capacity_bytes=tier.capacity_bytes,
        )
        for name, tier in profile.tiers.items()
    ]


def open_runner(
    profile: HardwareProfile, loaded: LoadedModel, store_dir: str, device: str = ""
) -> Runner:
    """A runner whose tiers are the profile's, on a device of its kind.

    Args:
        device: cpu, cuda or cuda:<i>; by default the first of the profile's kind.

    Raises:
        ProfileError: the profile was measured with another model.
    """
    from ..runtime.runner import Runner

    if profile.model_fingerprint != loaded.fingerprint:
        raise ProfileError(
            "the profile must be of this model",
            values=f"profile {profile.model_fingerprint}, model {loaded.fingerprint}",
            remedy="calibrate with this model",
        )
    return Runner(
        loaded,
        store_dir,
        configs_of(profile),
        compute_threads=profile.device.compute_threads,
        device=device or profile.device.kind,
    )


def calibrate(
    loaded: LoadedModel, settings: Settings, progress: Progress | None = None
) -> HardwareProfile:
    """Probe, fit, assemble. Takes about `n_repeats` x 88 prompts of up to `max_tokens`."""
    from ..runtime.machine import device_here, provenance_here
    from ..runtime.runner import Runner

    tell = progress or (lambda what, done, total: None)
    library = Library(loaded.spec, settings.seed)
    threads = settings.compute_threads
    with tempfile.TemporaryDirectory(prefix="cachetune-") as folder:
        plain = tier_configs(loaded.spec, 1.0, (), settings.media)
        with Runner(loaded, folder, plain, compute_threads=threads, device=settings.device) as r:
            token_s = recompute_s_per_token(r, library, settings)
            loads = measure_media(r, library, [c.name for c in plain], settings.max_tokens)
        configs = tier_configs(loaded.spec, token_s, settings.rhos, settings.media)
        with Runner(
            loaded, folder, configs, compute_threads=threads, device=settings.device
        ) as runner:
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
            copy_from = float(runner.device.copy_from_bytes)
    device = device_here(threads, settings.device)
    media = fit_media([*loads, *measured], {c.name: c.medium for c in plain}, settings.seed)
    tiers = tiers_of(configs, media.coefficients, settings.rhos, unbuffered)
    load_op_s = media.coefficients["load.op"].value
    coefficients, fits = fit_all(measured, loaded.spec, tiers, settings.seed, load_op_s)
    coefficients |= media.coefficients
    if copy_from:  # a measured crossover, not a fit: its interval is itself
        coefficients["link.copy_from"] = Coefficient(
            value=copy_from, unit="bytes", low=copy_from, high=copy_from
        )
    fits["load"] = media.report
    fitted = HardwareProfile(
        name=f"{device.kind}-{loaded.spec.name}",
        device=device,
        model=loaded.spec,
        model_fingerprint=loaded.fingerprint,
        tiers=tiers,
        coefficients=coefficients,
        fits=fits,
        provenance=provenance_here(settings.seed),
    )
    return align(fitted, measured)


def recompute_s_per_token(runner: Runner, library: Library, settings: Settings) -> float:
    """t_c: median time of a full recompute at the longest probe, over its tokens."""
    shape = Shape(8, settings.max_tokens // 8, 16)
    probe = Probe("t_c", library.workload(shape), plan_with("full_recompute", 1.0), "dram")
    run_once(runner, probe)
    times = [run_once(runner, probe).makespan_ns / 1e9 for _ in range(3)]
    return median(times) / probe.n_prompt


def fit_all(
    measured: Sequence[Measured],
    model: ModelSpec,
    tiers: Mapping[str, Tier],
    seed: int,
    load_op_s: float = 0.0,
) -> tuple[dict[str, Coefficient], dict[str, FitReport]]:
    """Every kind but load. Interference is fitted where there is most of it."""
    samples: dict[OpKind, list[Sample]] = {}
    for one in measured:
        for sample in samples_of(one, tiers, load_op_s):
            if sample.op.kind != "load" and (sample.op.n_tokens or sample.op.kind == "head"):
                samples.setdefault(sample.op.kind, []).append(sample)
    coefficients: dict[str, Coefficient] = {}
    fits: dict[str, FitReport] = {}
    for kind, found in sorted(samples.items()):
        fit = fit_kind(kind, found, model, seed)
        coefficients |= fit.coefficients
        fits[kind] = fit.report
    coefficients[DISPATCH_GAP] = dispatch_gap([t for m in measured for t in m.timelines], seed)
    return coefficients, fits
