"""`cachetune bench serve`: the closed loop, real against simulated, at several utilisations."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

_Model = Annotated[str, typer.Option(help="Hugging Face folder, or a shape with random weights.")]
_Profile = Annotated[Path, typer.Option(help="Profile of this machine; made if it is missing.")]
_Tier = Annotated[str, typer.Option(help="Where the chunks lie.")]
_Requests = Annotated[int, typer.Option(min=20, help="Requests at each rate.")]
_Ratio = Annotated[float, typer.Option(min=0, max=1, help="Recompute ratio of the plan.")]
_Out = Annotated[Path, typer.Option(help="Where the result is written.")]
_MaxTokens = Annotated[int, typer.Option(min=32, help="Longest probe that made the profile.")]
_Seed = Annotated[int, typer.Option(min=0, help="Root of every random stream.")]

UTILISATIONS = (0.3, 0.6, 0.9)


def command(
    model: _Model = "llama-25m",
    profile: _Profile = Path("build/grid/profile.json"),
    tier: _Tier = "rho0.7",
    requests: _Requests = 200,
    ratio: _Ratio = 0.3,
    max_tokens: _MaxTokens = 1024,
    out: _Out = Path("results/cpu/serve.json"),
    seed: _Seed = 0,
) -> None:
    """Serve the same traffic for real and simulated; compare the distributions of TTFT and TPOT."""
    from ..calibration.calibrate import Settings, calibrate, open_runner
    from ..calibration.closed_loop import Load, capacity_rps, compare_at
    from ..calibration.probes import plan_with
    from ..calibration.speed import Speed, known_probes
    from ..core.hardware import HardwareProfile
    from ..core.record import check_writable, write_json
    from ..runtime.loaded_model import load_model
    from ..runtime.machine import provenance_here
    from .console import note, print_json_line, progress_bar

    check_writable(profile, out)
    loaded = load_model(model)
    load = Load(n_requests=requests)
    plan = plan_with("cachetune", ratio)
    rows: list[dict[str, Any]] = []
    with progress_bar() as tell:
        if not profile.exists():
            calibrate(loaded, Settings(max_tokens, seed=seed), tell).write(profile)
        machine = HardwareProfile.read(profile)
        with (
            tempfile.TemporaryDirectory(prefix="cachetune-") as folder,
            open_runner(machine, loaded, folder) as runner,
        ):
            capacity = capacity_rps(machine, load, plan, runner, tier)
            speed = Speed(machine, runner, known_probes(machine, max_tokens), tell)
            for i, share in enumerate(UTILISATIONS):
                speed.round()
                rate = share * capacity
                row = compare_at(runner, machine, speed.now(), load, plan, tier, rate, seed)
                rows.append({"utilisation": share, "slower": speed.factors(), **row})
                tell("utilisations", i + 1, len(UTILISATIONS))
    result = {
        "provenance": provenance_here(seed).model_dump(mode="json"),
        "model": model,
        "tier": tier,
        "capacity_rps": capacity,
        "plan": plan.model_dump(mode="json"),
        "rows": rows,
    }
    write_json(out, result)
    _print(rows)
    note(f"result: {out}")
    print_json_line({"command": "bench serve", "rows": [r["error"] for r in rows]})


def _print(rows: list[dict[str, Any]]) -> None:
    from .console import print_table

    table = [
        {
            "utilisation": row["utilisation"],
            "metric": metric,
            "as_calibrated": row["as_calibrated"][metric],
            "predicted": row["predicted"][metric],
            "measured": row["measured"][metric],
            "error": round(error, 4),
        }
        for row in rows
        for metric, error in row["error"].items()
    ]
    columns = ["utilisation", "metric", "as_calibrated", "predicted", "measured", "error"]
    print_table(table, columns, "closed loop: simulated against real")
