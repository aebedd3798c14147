"""`cachetune tune`: search the simulator for a plan, confirm the best on the real runtime;
`cachetune tune fleet`: search fleets for a trace."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from . import tune_fleet

if TYPE_CHECKING:
    from ..core.hardware import HardwareProfile
    from ..core.plan import TunedPlan
    from ..core.workload import Workload
    from ..runtime.runner import Runner
    from ..tuner.space import Mode

N_CHUNKS = 8
CHUNK_TOKENS = 128
SUFFIX_TOKENS = 32
OUTPUT_TOKENS = 8

_Profile = Annotated[Path, typer.Option(help="Profile of the machine, from `calibrate`.")]
_Tier = Annotated[str, typer.Option(help="Where the chunks lie; several, joined by commas.")]
_Out = Annotated[Path, typer.Option(help="Write the plan here.")]
_Workload = Annotated[Path | None, typer.Option(help="Workload; without it, one is generated.")]
_Trials = Annotated[int, typer.Option(min=1, help="Plans to sample in the simulator.")]
_Quality = Annotated[Path | None, typer.Option(help="Measured quality, from `bench quality`.")]
_Floor = Annotated[
    float, typer.Option(min=0, max=1, help="Least quality, relative to full recompute.")
]
_RatioMin = Annotated[
    float, typer.Option(min=0, max=1, help="Least ratio where quality is not measured.")
]
_Mode = Annotated[
    str, typer.Option(help="dag: each request alone; serve: all of them, with their arrivals.")
]
_Confirm = Annotated[int, typer.Option(min=0, help="Plans to measure for real; needs --model.")]
_Model = Annotated[str | None, typer.Option(help="Folder of a Hugging Face model, or a shape.")]
_Repeats = Annotated[int, typer.Option(min=1, help="Measured repeats of each confirmed plan.")]
_Device = Annotated[str, typer.Option(help="Of --confirm: cpu, cuda or cuda:<i>.")]
_Seed = Annotated[int, typer.Option(min=0, help="Root of every random stream.")]


class _Tune(TyperGroup):
    """Its own options are those of a plan: they are required unless a sub-command follows."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.resilient_parsing = bool(args) and args[0] in self.commands
        try:
            return super().parse_args(ctx, args)
        finally:
            ctx.resilient_parsing = False


command = typer.Typer(cls=_Tune)
command.command("fleet")(tune_fleet.command)


@command.callback(invoke_without_command=True)
def plan(
    context: typer.Context,
    profile: _Profile,
    tier: _Tier,
    out: _Out = Path("plan.json"),
    workload: _Workload = None,
    trials: _Trials = 200,
    quality: _Quality = None,
    quality_floor: _Floor = 0.95,
    ratio_min: _RatioMin = 0.15,
    mode: _Mode = "dag",
    confirm: _Confirm = 0,
    model: _Model = None,
    repeats: _Repeats = 7,
    seed: _Seed = 0,
    device: _Device = "",
) -> None:
    """Find the fastest plan that keeps the quality floor, on the simulated machine."""
    if context.invoked_subcommand is not None:
        return
    from ..core.errors import PlanError
    from ..core.hardware import HardwareProfile
    from ..core.quality import QualityProfile
    from ..core.record import check_writable
    from ..core.workload import Workload
    from ..tuner.search import tune
    from .console import note, progress_bar, warn

    check_writable(out, inputs=[profile, workload, quality])
    if model is not None and not confirm:
        raise PlanError(
            "--model is what --confirm runs",
            values=model,
            remedy="add --confirm N, or leave it out",
        )
    checked_mode = _checked_mode(mode)
    machine = HardwareProfile.read(profile)
    if workload is not None:
        work = Workload.read(workload).by_content()
    else:
        work = sample_workload(machine, seed)
    if confirm:
        work.check_runnable(machine.model)
    measured = QualityProfile.read(quality) if quality is not None else None
    tiers = [name.strip() for name in tier.split(",")]
    for name in tiers:
        machine.tier(name)
    with _runner(machine, model, confirm, device) as runner, progress_bar() as tell:
        note(f"tuning for {', '.join(tiers)}: {trials} trials")
        tuned = tune(
            machine,
            work,
            tiers,
            n_trials=trials,
            seed=seed,
            quality=measured,
            quality_floor=quality_floor,
            ratio_min=ratio_min,
            mode=checked_mode,
            runner=runner,
            n_confirm=confirm,
            n_repeats=repeats,
            progress=tell,
        )
    tuned.write(out)
    if tuned.quality != "measured":
        warn(f"quality: {tuned.quality}")
    for policy, why in tuned.evidence["infeasible_policies"].items():
        note(f"infeasible: {policy}: {why}")
    _report(tuned, out)


def _checked_mode(mode: str) -> Mode:
    from ..core.errors import PlanError
    from ..tuner.space import MODES

    if mode not in MODES:
        raise PlanError("--mode must be one of " + ", ".join(MODES), values=mode)
    return mode


def sample_workload(machine: HardwareProfile, seed: int) -> Workload:
    """RAG requests with token ids, of the length that `calibrate` measures by default."""
    from ..core.generators import rag_workload

    model = machine.model
    room = (model.max_position - SUFFIX_TOKENS - OUTPUT_TOKENS) // N_CHUNKS
    return rag_workload(
        seed=seed,
        n_requests=8,
        n_contents=2 * N_CHUNKS,
        chunk_tokens=max(1, min(CHUNK_TOKENS, room)),
        chunks_per_request=N_CHUNKS,
        suffix_tokens=SUFFIX_TOKENS,
        output_tokens=OUTPUT_TOKENS,
        rate_rps=1.0,
        vocab_size=model.vocab_size,
    )


@contextmanager
def _runner(
    machine: HardwareProfile, model: str | None, n_confirm: int, device: str
) -> Iterator[Runner | None]:
    """A runner for confirmation, or None; its store lives as long as the tuning."""
    from ..core.errors import PlanError
    from .bench_machine import checked_device, load_on

    if device:
        checked_device(device, machine)
    if not n_confirm:
        yield None
        return
    if model is None:
        raise PlanError(
            "confirmation runs the model", values=f"--confirm {n_confirm}", remedy="add --model"
        )
    from ..calibration.calibrate import open_runner

    device = checked_device(device, machine)
    loaded = load_on(model, device, machine.model.dtype, stored=machine.model.stored)
    with (
        tempfile.TemporaryDirectory(prefix="cachetune-") as folder,
        open_runner(machine, loaded, folder, device) as runner,
    ):
        yield runner


def _report(tuned: TunedPlan, out: Path) -> None:
    from ..tuner.search import SEARCHED
    from .console import print_json_line, print_table

    plan, evidence = tuned.plan, tuned.evidence
    rows: list[dict[str, Any]] = [
        {"plan": t["origin"], "ttft_ms": t["ttft_ms_mean"], "feasible": str(t["feasible"])}
        for t in evidence["trials"]
        if t["origin"] not in SEARCHED
    ]
    rows.append({"plan": "tuned", "ttft_ms": tuned.objective["ttft_ms_mean"], "feasible": "True"})
    print_table(rows, ("plan", "ttft_ms", "feasible"), "simulated")
    confirmed = evidence.get("confirmed")
    if confirmed is not None:
        columns = (
            "name", "ttft_ms_simulated", "ttft_ms_median", "rank_simulated", "rank_measured",
        )  # fmt: skip
        print_table(sorted(confirmed["rows"], key=lambda r: r["ttft_ms_median"]), columns, "real")
    print_json_line(
        {
            "command": "tune",
            "out": str(out),
            "policy": plan.policy,
            "ratios": {rule.tier: list(rule.ratios) for rule in plan.rules},
            "plan_fingerprint": plan.fingerprint(),
            "quality": tuned.quality,
            "objective": tuned.objective,
            "roofline": evidence["roofline"],
            "n_trials": len(evidence["trials"]),
            "spearman": confirmed["spearman"] if confirmed else None,
            "seconds": evidence["seconds"],
        }
    )
