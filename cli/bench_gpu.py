"""`cachetune bench gpu`: all that a GPU is measured by, in steps that go on where they stopped."""

from __future__ import annotations

from typing import Annotated, Any

import typer

_Step = Annotated[str, typer.Option(help="Steps to run, by comma, also by their beginning; all.")]
_Fresh = Annotated[bool, typer.Option("--fresh", help="Run again what has been done.")]
_Within = Annotated[float, typer.Option(min=0, help="Seconds for this call; 0 for no limit.")]
_List = Annotated[bool, typer.Option("--list", help="Only list the steps.")]


def command(
    step: _Step = "", fresh: _Fresh = False, only_list: _List = False, within_s: _Within = 0.0
) -> None:
    """Correctness, limits, benchmarks and the whole loop on the GPU; a dry run without one.

    With --within-s, what is not done in that time is left to the next call.
    """
    import math
    import time

    from ..core.record import write_json
    from .bench_machine import pick_device, provenance, results_folder
    from .console import note, print_json_line, print_table, warn
    from .gpu_suite import (
        DRY_RUN,
        FIRST,
        LEAST_S,
        LIMIT_S,
        STAMPS,
        Stamps,
        chosen,
        proves_nothing,
        run_step,
        steps,
    )

    device = pick_device("auto")
    folder = results_folder(device) if device == "cuda" else DRY_RUN
    if device != "cuda":
        warn(f"no CUDA device: tiny shapes on the CPU, to {folder}; no figure of this is a result")
    every = steps(device, folder)
    wanted = chosen(every, step)
    stamps = Stamps(STAMPS / folder.name)
    rows: list[dict[str, Any]] = []
    stop_s = time.monotonic() + (within_s or math.inf)
    for i, one in enumerate(wanted):
        done = stamps.read(one)
        if only_list or (done is not None and not fresh):
            status = "done before" if done is not None else "to do"
            seconds = done["seconds"] if done is not None else None
            rows.append({"step": one.name, "status": status, "seconds": seconds})
            continue
        left_s = stop_s - time.monotonic()
        if left_s < LEAST_S:
            rows.append({"step": one.name, "status": "to do", "seconds": None})
            continue
        note(f"step {i + 1} of {len(wanted)}, {one.name}: python -m {' '.join(one.argv)}")
        status, seconds = run_step(one, stamps.log(one), min(left_s, LIMIT_S))
        if status.startswith("over") and left_s < LIMIT_S:
            rows.append({"step": one.name, "status": "to do", "seconds": seconds})
            continue
        if one.name == FIRST and status == "ok" and device == "cuda":
            status = proves_nothing(stamps.log(one)) or status
        rows.append(stamps.write(one, status, seconds))
        if one.name == FIRST and rows[-1]["status"] != "ok":
            warn("not all of it is correct: no figure of this run counts until that step is ok")
    print_table(rows, ("step", "status", "seconds"), f"steps on {device}, results in {folder}")
    failed = [r["step"] for r in rows if r["status"] not in ("ok", "done before", "to do")]
    if not only_list:
        last = [stamps.last(one) or {"step": one.name, "status": "to do"} for one in every]
        summary = {"provenance": provenance(0, device), "device": device, "steps": last}
        write_json(folder / "steps.json", summary)
    result = {"command": "bench gpu", "device": device, "folder": str(folder), "failed": failed}
    print_json_line(result)
    if failed:
        raise typer.Exit(1)
