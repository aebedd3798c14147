"""`cachetune bench grid`: is the tuned plan as good as the best of a measured grid?

For each tier: a fixed list of plans is written, then measured; the tuner searches the simulator
and confirms its best on the runtime; both meet again in one interleaved run. The paper's own
method, golden-section search on the real runtime, stands beside it with what it cost. What is
measured lies in a work folder, where a second call goes on; it is copied when all tiers are done.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..core.hardware import HardwareProfile
    from ..core.workload import Workload
    from ..runtime.runner import Runner

_Model = Annotated[str, typer.Option(help="Hugging Face folder, or a shape with random weights.")]
_Profile = Annotated[Path, typer.Option(help="Profile of this machine; made if it is missing.")]
_Tiers = Annotated[str, typer.Option(help="Tiers, by comma.")]
_ChunkTokens = Annotated[int, typer.Option(min=16, help="Tokens of each of the eight chunks.")]
_Trials = Annotated[int, typer.Option(min=20, help="Simulated plans per tier.")]
_Repeats = Annotated[int, typer.Option(min=2, help="Repeats of every plan of the grid.")]
_Work = Annotated[Path, typer.Option(help="Where it goes on from; remove it to start anew.")]
_Out = Annotated[Path, typer.Option(help="Folder of lists, rows, plans and the result.")]
_Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:<i>; default the profile's.")]
_Seed = Annotated[int, typer.Option(min=0, help="Root of every random stream.")]

RATIO_MIN = 0.15
"""The paper's quality floor, for grid, tuner and golden section alike."""
FINAL_REPEATS = (11, 61)
FINAL_S = 60.0
"""The last comparison repeats as often as fits into this time: a bound of 3 % asks for medians
that are good to 1 %, and short prompts are 8 % apart."""
COLUMNS = (
    "tier",
    "rho",
    "r_tuned",
    "r_golden",
    "tuned_ms",
    "grid_best_ms",
    "golden_ms",
    "tuned/grid",
    "low",
    "high",
    "rank_corr",
    "runs_tuner",
    "runs_golden",
)


def command(
    model: _Model = "llama-25m",
    profile: _Profile = Path("build/grid/profile.json"),
    tiers: _Tiers = "rho0.1,rho0.7,rho4,rho25",
    chunk_tokens: _ChunkTokens = 64,
    trials: _Trials = 150,
    repeats: _Repeats = 2,
    work: _Work = Path("build/grid"),
    out: _Out = Path("results/cpu/grid"),
    seed: _Seed = 0,
    device: _Device = "",
) -> None:
    """Hold tuned plans against a measured grid and against golden-section search."""
    from ..calibration.calibrate import Settings, calibrate, open_runner
    from ..calibration.probes import Library, Shape
    from ..core.hardware import HardwareProfile
    from ..core.record import check_writable, write_atomic, write_json
    from ..tuner.grid import relate
    from .bench_machine import checked_device, load_on, provenance
    from .console import note, print_json_line, print_table, progress_bar

    check_writable(profile, out / "grid.json", work / "grid.json")
    machine = HardwareProfile.read(profile) if profile.exists() else None
    device = checked_device(device, machine)
    like = machine.model if machine else None
    stored = like.stored if like else "native"
    loaded = load_on(model, device, like.dtype if like else "float32", stored=stored)
    with progress_bar() as tell:
        if machine is None:
            settings = Settings(max_tokens=8 * chunk_tokens, seed=seed, device=device)
            machine = calibrate(loaded, settings, tell)
            machine.write(profile)
        workload = Library(loaded.spec, seed).workload(Shape(8, chunk_tokens, 32))
        asked = {
            "profile": machine.fingerprint(),
            "workload": workload.fingerprint(),
            "trials": trials,
            "repeats": repeats,
            "seed": seed,
        }
        found = []
        with (
            tempfile.TemporaryDirectory(prefix="cachetune-") as folder,
            open_runner(machine, loaded, folder, device) as runner,
        ):
            for tier in tiers.split(","):
                machine.tier(tier)
                done = work / f"{tier}.result.json"
                raw = kept(done, asked)
                if raw is None:
                    raw = one_tier(runner, machine, workload, tier, trials, repeats, work, seed)
                    text = json.dumps({"settings": asked, **raw}, indent=1)
                    write_atomic(done, (text + "\n").encode())
                found.append(raw | relate(raw["tuned_ttft_ms"], raw["grid_ttft_ms"]))
                tell("tiers", len(found), len(tiers.split(",")))
    for tier in tiers.split(","):
        for name in ("list.json", "rows.jsonl", "plan.json"):
            write_atomic(out / f"{tier}.{name}", (work / f"{tier}.{name}").read_bytes())
    machine.write(out / "profile.json")
    result = {"provenance": provenance(seed, device), "model": model, "tiers": found}
    write_json(out / "grid.json", result)
    print_table([_cells(f) for f in found], COLUMNS, "tuned plan against the measured grid")
    note(f"result: {out}/grid.json")
    print_json_line(
        {"command": "bench grid", "tuned_over_grid": {f["tier"]: f["ratio"] for f in found}}
    )


def kept(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier run left of a tier, None if nothing.

    Raises:
        CacheTuneError: it was measured with other settings.
    """
    from ..core.errors import CacheTuneError
    from ..core.record import parse_json

    if not path.exists():
        return None
    try:
        found: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
        theirs = dict(found.pop("settings", {}))
    except (ValueError, TypeError, AttributeError):
        theirs = {}
    differs = [name for name, value in settings.items() if theirs.get(name) != value]
    if differs:
        raise CacheTuneError(
            "a run goes on only with the settings it began with",
            values=f"{path} of another {', '.join(differs)}",
            remedy="choose another --work, or remove it to start anew",
        )
    return found


def one_tier(
    runner: Runner,
    machine: HardwareProfile,
    workload: Workload,
    tier: str,
    n_trials: int,
    n_repeats: int,
    folder: Path,
    seed: int,
) -> dict[str, Any]:
    """Grid, then tuning, then both again; golden section last."""
    from ..tuner.baselines import token_times
    from ..tuner.golden import golden_on_runtime
    from ..tuner.grid import compare, grid_plans, run_grid, write_list
    from ..tuner.measure import Bench
    from ..tuner.search import tune

    listed = folder / f"{tier}.list.json"
    write_list(listed, grid_plans(RATIO_MIN, machine.model.n_layers), tier, workload, seed)
    grid = run_grid(runner, workload, listed, folder / f"{tier}.rows.jsonl", n_repeats=n_repeats)
    tuned = tune(
        machine, workload, tier, n_trials=n_trials, seed=seed, ratio_min=RATIO_MIN, runner=runner
    )
    tuned.write(folder / f"{tier}.plan.json")
    bench = Bench(runner, workload, tier)
    round_s = 4e-3 * max(grid["rows"][0]["ttft_ms_median"], 1.0)
    n_final = int(min(max(FINAL_S / round_s, FINAL_REPEATS[0]), FINAL_REPEATS[1]))
    final = compare(bench, grid, tuned.plan, n_repeats=n_final, seed=seed)
    times = token_times(machine, workload, tier)
    golden = golden_on_runtime(
        runner, workload, tier, times.ratio, ratio_min=RATIO_MIN, n_repeats=n_repeats
    )
    confirmed = tuned.evidence["confirmed"]
    return {
        "tier": tier,
        "rho": machine.tier(tier).rho,
        "n_grid_plans": grid["n_plans"],
        **final,
        "tuned_ratios": list(tuned.plan.rule(tier, 1).ratios),
        "tuned_policy": tuned.plan.policy,
        "tuned_seconds": tuned.evidence["seconds"],
        "confirm_spearman": confirmed["spearman"],
        "confirm_runs": sum(len(r["ttft_ms"]) for r in confirmed["rows"]),
        "golden": golden.to_json(),
    }


def _cells(found: dict[str, Any]) -> dict[str, Any]:
    from statistics import median

    return {
        "tier": found["tier"],
        "rho": found["rho"],
        "r_tuned": found["tuned_ratios"][0],
        "r_golden": found["golden"]["ratio"],
        "tuned_ms": median(found["tuned_ttft_ms"]),
        "grid_best_ms": min(median(times) for times in found["grid_ttft_ms"]),
        "golden_ms": found["golden"]["ttft_ms"],
        "tuned/grid": found["ratio"],
        "low": found["ratio_low"],
        "high": found["ratio_high"],
        "rank_corr": found["confirm_spearman"],
        "runs_tuner": found["confirm_runs"],
        "runs_golden": found["golden"]["n_runs"],
    }
