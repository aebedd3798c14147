"""`cachetune calibrate`: measure this machine with one model; check the result on held-out runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..calibration.fidelity import Point
    from ..core.hardware import HardwareProfile
    from ..core.ops import OpKind
    from ..runtime.loaded_model import LoadedModel

_Model = Annotated[str, typer.Option(help="Hugging Face folder, or a shape with random weights.")]
_Out = Annotated[Path, typer.Option(help="Where the profile is written.")]
_MaxTokens = Annotated[int, typer.Option(min=128, help="Longest probe prompt, tokens.")]
_Repeats = Annotated[int, typer.Option(min=1, help="Interleaved repeats of each probe.")]
_Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
_Stored = Annotated[str, typer.Option(help="Of chunks: native, fp8, int8, int4, int3, int2.")]
_Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:<i>.")]
_Threads = Annotated[int, typer.Option(min=1, help="Threads of a compute op.")]
_Tiers = Annotated[str, typer.Option(help="Of dram (always), file and device, by comma.")]
_Seed = Annotated[int, typer.Option(min=0, help="Root of every random stream.")]
_Check = Annotated[bool, typer.Option("--check", help="Predict and measure held-out schedules.")]
_Profile = Annotated[Path | None, typer.Option(help="With --check: test this profile instead.")]
_Schedules = Annotated[int, typer.Option(min=30, help="With --check: held-out schedules.")]
_CheckRepeats = Annotated[int, typer.Option(min=5, help="With --check: repeats of each.")]
_CheckOut = Annotated[Path, typer.Option(help="With --check: folder for predictions and raw data.")]


def command(
    model: _Model = "llama-25m",
    out: _Out = Path("build/profile.json"),
    max_tokens: _MaxTokens = 1024,
    repeats: _Repeats = 6,
    dtype: _Dtype = "float32",
    stored: _Stored = "native",
    device: _Device = "cpu",
    threads: _Threads = 1,
    tiers: _Tiers = "dram,file",
    seed: _Seed = 0,
    check: _Check = False,
    profile: _Profile = None,
    schedules: _Schedules = 30,
    check_repeats: _CheckRepeats = 5,
    check_out: _CheckOut = Path("build/fidelity"),
) -> None:
    """Measure this machine: probe schedules on the real runtime become a profile."""
    from ..calibration.calibrate import Settings, calibrate
    from ..core.errors import CacheTuneError
    from ..core.hardware import HardwareProfile
    from ..core.record import check_writable
    from .bench_machine import checked_device, load_on
    from .console import note, print_json_line, progress_bar

    check_writable(out if profile is None else None)
    if check:
        check_writable(check_out / "predicted.jsonl")
    machine = HardwareProfile.read(profile) if profile is not None else None
    device = checked_device(device, machine)
    media: Any = tuple(t.strip() for t in tiers.split(",") if t.strip())
    settings = Settings(
        max_tokens=max_tokens,
        n_repeats=repeats,
        compute_threads=threads,
        seed=seed,
        device=device,
        media=media,
    )
    if machine is not None and not check:
        raise CacheTuneError(
            "--profile is what --check predicts with", values=str(profile), remedy="add --check"
        )
    kept: Any = machine.model.stored if machine is not None else stored
    as_made = machine.model.dtype if machine is not None else dtype
    loaded = load_on(model, device, as_made, stored=kept)
    if machine is None:
        with progress_bar() as tell:
            machine = calibrate(loaded, settings, tell)
        machine.write(out)
        note(f"profile: {out}")
        print_profile(machine)
    result: dict[str, Any] = {"command": "calibrate", "profile": machine.name}
    result["hardware_fingerprint"] = machine.hardware_fingerprint
    result["fits"] = {k: f.model_dump() for k, f in machine.fits.items()}
    if check:
        result["fidelity"] = run_check(
            machine, loaded, device, seed, schedules, check_repeats, max_tokens, check_out
        )
    print_json_line(result)


def print_profile(machine: HardwareProfile) -> None:
    """Coefficients with intervals, fits and tiers, as tables."""
    from .console import print_table

    rows = [
        {"coefficient": k, "value": c.value, "low": c.low, "high": c.high, "unit": c.unit}
        for k, c in sorted(machine.coefficients.items())
    ]
    print_table(rows, ["coefficient", "value", "low", "high", "unit"], "coefficients, 95 %")
    fits = [{"op": k, **f.model_dump()} for k, f in sorted(machine.fits.items())]
    print_table(fits, ["op", "n_spans", "r2", "error_median"], "fit on the probes")
    tiers = [
        {
            "tier": name,
            "medium": t.medium,
            "GB/s": t.link_bytes_per_s / 1e9,
            "read_us": t.read_latency_s * 1e6,
            "limited": t.limited,
            "rho": t.rho,
            "unbuffered": t.unbuffered,
        }
        for name, t in machine.tiers.items()
    ]
    columns = ["tier", "medium", "GB/s", "read_us", "limited", "rho", "unbuffered"]
    print_table(tiers, columns, "tiers")


def run_check(
    machine: HardwareProfile,
    loaded: LoadedModel,
    device: str,
    seed: int,
    n_schedules: int,
    n_repeats: int,
    max_tokens: int,
    folder: Path,
) -> dict[str, Any]:
    """Predictions written first, then measured; raw values kept beside the summary."""
    from dataclasses import asdict

    from ..calibration import fidelity
    from ..core.record import append_line, write_atomic, write_json
    from ..runtime.machine import provenance_here
    from .console import note, progress_bar

    predicted = folder / "predicted.jsonl"
    write_atomic(predicted, b"")
    provenance = provenance_here(seed).model_dump(mode="json")

    def keep(points: list[Point], drift: dict[OpKind, float]) -> dict[str, Any]:
        summary = fidelity.summarise(points, drift)
        raw = {"provenance": provenance, "summary": summary, "points": [asdict(p) for p in points]}
        write_json(folder / "measured.json", raw)
        return summary

    with progress_bar() as tell:
        points, drift = fidelity.check(
            machine,
            loaded,
            device=device,
            seed=seed,
            n_schedules=n_schedules,
            n_repeats=n_repeats,
            max_tokens=max_tokens,
            on_predicted=lambda found: append_line(predicted, json.dumps(found)),
            progress=tell,
            keep=keep,
        )
    summary = keep(points, drift)
    note(f"predictions, written before measuring: {predicted}; all values: {folder}/measured.json")
    print_points(points, summary)
    return summary


def print_points(points: list[Point], summary: dict[str, Any]) -> None:
    """One row per schedule, limited and unlimited tiers apart; then errors beside their bounds."""
    from statistics import median

    from .console import print_table

    columns = ["schedule", "n_prompt", "ttft_ms_predicted", "ttft_ms_measured", "error", "a_a"]
    for limited in (False, True):
        rows = [
            {
                "schedule": p.name,
                "n_prompt": p.n_prompt,
                "ttft_ms_predicted": median(p.ttft_ms_predicted),
                "ttft_ms_measured": median(p.ttft_ms_measured),
                "error": round(p.ttft_error, 4),
                "a_a": round(p.a_a_error, 4),
            }
            for p in points
            if p.limited is limited
        ]
        if rows:
            print_table(rows, columns, "rate-limited tiers" if limited else "tiers as they are")
    bounds = summary["bounds"]
    rows = [
        {
            "error": f"|TTFT|, {label}",
            "reached": summary[f"ttft_error_{label}"],
            "bound": bounds[f"ttft_error_{label}"],
            "A/A": summary[f"a_a_error_{label}"],
            "as calibrated": summary["as_calibrated"][f"ttft_error_{label}"],
        }
        for label in ("median", "p95")
    ]
    errors = dict(summary["by_op"])
    if "load_unlimited" in summary:
        errors["load of tiers as they are"] = summary["load_unlimited"]
    for kind, error in errors.items():
        rows.append(
            {
                "error": f"|{kind}|, median",
                "reached": error["error_median"],
                "signed": error["signed_median"],
                "bound": bounds["op_error_median"],
                "A/A": error["a_a_error_median"],
                "as calibrated": summary["as_calibrated"]["by_op"].get(kind),
                "time now": summary["drift"].get(kind),
            }
        )
    columns = ["error", "reached", "signed", "bound", "A/A", "as calibrated", "time now"]
    print_table(rows, columns, "fidelity, fractions; time now: the probes', over calibration's")
