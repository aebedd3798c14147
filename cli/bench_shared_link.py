"""`cachetune bench shared-link`: replicas that share a link, requests as fluid beside layers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

_Requests = Annotated[int, typer.Option(min=20, help="Requests of a run.")]
_Replicas = Annotated[int, typer.Option(min=1, help="Replicas that share the link.")]
_Seeds = Annotated[int, typer.Option(min=1, help="Workloads of each row.")]
_Out = Annotated[Path, typer.Option(help="Where the result is written.")]
_Seed = Annotated[int, typer.Option(min=0, help="Seed of the first workload.")]

LOADS = (0.3, 0.5, 0.7)
SHARES = (2.0, 1.0, 0.5)
BOUNDS = {"error_p50": 0.02, "error_p99": 0.05}
"""What the two forms ask of each other up to 70 % utilisation."""
COLUMNS = ("load_over_compute", "load", "seed", "error_p50", "error_p99", "kept")


def command(
    requests: _Requests = 400,
    replicas: _Replicas = 16,
    seeds: _Seeds = 1,
    out: _Out = Path("results/cpu/shared-link.json"),
    seed: _Seed = 3,
) -> None:
    """TTFT of requests as fluid over that of layers, where several replicas load at once."""
    from ..core.record import check_writable, write_json
    from ..runtime.machine import provenance_here
    from ..simulator.shared_link import difference
    from .console import note, print_json_line, print_table, progress_bar

    check_writable(out)
    cases = [(w, x, s) for w in SHARES for x in LOADS for s in range(seed, seed + seeds)]
    rows: list[dict[str, Any]] = []
    with progress_bar() as tell:
        for share, load, of in cases:
            row: dict[str, Any] = {"seed": of}
            row |= difference(load, share, n_requests=requests, n_replicas=replicas, seed=of)
            row["kept"] = all(abs(row[name]) <= bound for name, bound in BOUNDS.items())
            rows.append(row)
            tell("runs", len(rows), len(cases))
    result = {
        "provenance": provenance_here(seed).model_dump(mode="json"),
        "requests": requests,
        "replicas": replicas,
        "bounds": BOUNDS,
        "rows": rows,
    }
    write_json(out, result)
    print_table(rows, COLUMNS, "requests as fluid over layers")
    note(f"result: {out}")
    kept = sum(row["kept"] for row in rows)
    print_json_line({"command": "bench shared-link", "n": len(rows), "kept": kept, "out": str(out)})
