"""`cachetune run`: serve a workload on the real runtime with a plan."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..core.hardware import HardwareProfile
    from ..core.plan import ReusePlan, TunedPlan
    from ..core.timeline import Timeline
    from ..core.workload import Workload
    from ..runtime.loaded_model import LoadedModel

_Model = Annotated[str, typer.Option(help="Folder of a Hugging Face model, or a shape.")]
_Plan = Annotated[Path, typer.Option(help="Plan, from `tune`.")]
_Profile = Annotated[Path, typer.Option(help="Profile of the machine, from `calibrate`.")]
_Workload = Annotated[Path | None, typer.Option(help="Workload; without it, one is generated.")]
_Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:<i>; default the profile's.")]
_Tier = Annotated[str | None, typer.Option(help="Where the chunks lie; default the plan's.")]
_Mismatch = Annotated[bool, typer.Option(help="Take a plan made for another machine or model.")]
_Trace = Annotated[Path | None, typer.Option(help="Write a Chrome trace here.")]
_Store = Annotated[Path | None, typer.Option(help="Keep chunks here; default until the end.")]
_Seed = Annotated[int, typer.Option(min=0, help="Of the generated workload.")]


def command(
    model: _Model,
    plan: _Plan,
    profile: _Profile,
    workload: _Workload = None,
    tier: _Tier = None,
    allow_mismatch: _Mismatch = False,
    trace: _Trace = None,
    store: _Store = None,
    seed: _Seed = 0,
    device: _Device = "",
) -> None:
    """Serve a workload for real: TTFT, throughput and bytes moved."""
    from ..core.hardware import HardwareProfile
    from ..core.plan import TunedPlan
    from ..core.record import check_writable
    from ..core.trace import write_chrome
    from ..core.workload import Workload
    from .bench_machine import checked_device, load_on
    from .console import note, print_metrics, warn
    from .tune import sample_workload

    check_writable(trace, inputs=[profile, plan, workload])
    machine = HardwareProfile.read(profile)
    tuned = TunedPlan.read(plan)
    if workload is not None:
        work = Workload.read(workload).by_content()
    else:
        work = sample_workload(machine, seed)
    where = tier or _tier_of(tuned, machine)
    machine.tier(where)
    device = checked_device(device, machine)
    loaded = load_on(model, device, machine.model.dtype, stored=machine.model.stored)
    check_here(tuned, machine, loaded, device, allow_mismatch=allow_mismatch)
    if tuned.quality == "borrowed":
        warn("quality: borrowed (measured with another model)")
    result, timeline = serve(work, machine, loaded, tuned.plan, where, store, device)
    if trace is not None:
        write_chrome(trace, timeline)
        note(f"trace: {trace} (open it in ui.perfetto.dev)")
    print_metrics({**result, "quality": tuned.quality})


def check_here(
    tuned: TunedPlan,
    machine: HardwareProfile,
    loaded: LoadedModel,
    device: str,
    *,
    allow_mismatch: bool,
) -> None:
    """Refuse a plan, or a profile, of another machine or model; warn if it is allowed.

    Raises:
        PlanError: the plan's fingerprints differ from this machine's or model's.
        ProfileError: the profile's machine is another one.
    """
    from ..core.errors import ProfileError
    from ..runtime.machine import device_here
    from .console import warn

    here = device_here(machine.device.compute_threads, device).fingerprint()
    differs = tuned.check_fits(here, loaded.fingerprint, allow_mismatch=allow_mismatch)
    if differs:
        warn(differs)
    if machine.hardware_fingerprint != here:
        values = f"the profile's machine is {machine.hardware_fingerprint}, this one is {here}"
        if not allow_mismatch:
            raise ProfileError(
                "the profile must be of this machine",
                values=values,
                remedy="calibrate here, or pass --allow-mismatch",
            )
        warn(values)


def serve(
    work: Workload,
    machine: HardwareProfile,
    loaded: LoadedModel,
    plan: ReusePlan,
    tier: str,
    store: Path | None = None,
    device: str = "",
) -> tuple[dict[str, Any], Timeline]:
    """(metrics and what they are of, timeline) of `work` served for real."""
    from ..calibration.calibrate import open_runner
    from ..core import invariants, metrics
    from ..runtime.rope_gate import check_rope
    from ..runtime.runner import tenants_of

    work.check_runnable(loaded.spec)
    with (
        tempfile.TemporaryDirectory(prefix="cachetune-") as folder,
        open_runner(machine, loaded, str(store or folder), device) as runner,
    ):
        runner.use_stages(plan.pipeline_stages)
        check_rope(runner.transformer)
        runner.prepare(work, plan, tier)
        served = runner.serve(work, plan, runner.index(plan, tier, tenants_of(work)))
    invariants.check(served.timeline, work)
    result = {
        "command": "run",
        "profile": machine.name,
        "hardware_fingerprint": machine.hardware_fingerprint,
        "model_fingerprint": loaded.fingerprint,
        "workload": work.name,
        "workload_fingerprint": work.fingerprint(),
        "policy": plan.policy,
        "plan_fingerprint": plan.fingerprint(),
        "tier": tier,
        "limited": machine.tier(tier).limited,
        "n_fallbacks": served.n_fallbacks,
        "n_read_failures": served.n_read_failures,
        **metrics.summary(served.timeline, work),
    }
    return result, served.timeline


def _tier_of(tuned: TunedPlan, machine: HardwareProfile) -> str:
    """The first tier the plan names that this machine has, else its fastest."""
    from .simulate import fastest_tier

    named = [rule.tier for rule in tuned.plan.rules if rule.tier in machine.tiers]
    return named[0] if named else fastest_tier(machine)
