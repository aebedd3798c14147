"""`cachetune bench simulator`: CPU seconds and memory of the serving simulator, a study's time.

Each case runs in a process of its own, so that cold start and peak memory are that case's. A trace
is served several times there: the first run also fills the tables of step times, the median of the
others is the speed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

_Trace = Annotated[Path | None, typer.Option(help="A trace; else one like Mooncake's is made.")]
_Replicas = Annotated[str, typer.Option(help="Sizes of the fleet, by comma.")]
_Series = Annotated[str, typer.Option(help="Counts of short requests, by comma.")]
_Repeats = Annotated[int, typer.Option(min=1, help="Runs of the trace after the first.")]
_Trials = Annotated[int, typer.Option(min=0, help="Trials of a study over the trace; 0: none.")]
_Workers = Annotated[int, typer.Option(min=1, help="Processes of the study.")]
_First = Annotated[int | None, typer.Option(help="At most so many requests of the trace.")]
_Out = Annotated[Path, typer.Option(help="The result; the plot is written beside it, as SVG.")]
_Seed = Annotated[int, typer.Option(min=0, help="Root of every random stream.")]

LIMITS = {
    "trace, 1 replica: CPU s": 2.0,
    "trace, 16 replicas: CPU s": 4.0,
    "trace: peak MiB": 300.0,
    "1,000,000 short: CPU s": 180.0,
    "1,000,000 short: peak MiB": 1536.0,
    "cold start: CPU s": 5.0,
    "200 trials: s": 300.0,
}
"""What this project asks of itself, on one core (the study: two)."""

ANCHORS = (
    ("DynoSim 1.2.1 (Rust), Mooncake conversation trace, 1 worker", "3856"),
    ("Vidur, 1,000 requests of splitwise_conv, warm", "463"),
    ("BLIS (Go), 1,000 to 20,000 requests, roofline", "278 to 395"),
    ("TokenSim (SimPy), 500 requests, loop alone", "175"),
)
"""Requests per CPU second of others, as published in a survey; not measured by this command."""

COLUMNS = ("case", "n_requests", "cpu_s", "requests_per_cpu_s", "cold_start_cpu_s", "peak_mib")


def command(
    trace: _Trace = None,
    replicas: _Replicas = "1,16",
    series: _Series = "1000,10000,100000,1000000",
    repeats: _Repeats = 3,
    trials: _Trials = 200,
    workers: _Workers = 2,
    first: _First = None,
    out: _Out = Path("results/cpu/simulator.json"),
    seed: _Seed = 0,
) -> None:
    """Serve a trace and more and more short requests; time a study; write figures and a plot."""
    from ..core.record import check_writable, write_atomic, write_json
    from ..core.trace_files import read_trace, write_trace
    from ..runtime.machine import provenance_here
    from .bench_simulator_case import made_trace, measured, study
    from .console import counts, note, print_json_line, print_table, progress_bar

    check_writable(out)
    check_writable(out.with_suffix(".svg"))
    fleets, lengths = counts(replicas, "--replicas"), counts(series, "--series")
    with tempfile.TemporaryDirectory(prefix="cachetune-") as folder, progress_bar() as tell:
        if trace is None:
            table = made_trace(first, seed)
            path = Path(folder, "made.jsonl")
            write_trace(table, path)
        else:
            path, table = trace, read_trace(trace, first=first)
        cases: list[dict[str, Any]] = [
            {"trace": str(path), "first": first, "replicas": n, "repeats": repeats} for n in fleets
        ]
        cases += [{"short": n, "seed": seed, "repeats": 0} for n in lengths]
        rows = []
        for i, case in enumerate(cases):
            rows.append(measured(case))
            tell("cases", i + 1, len(cases))
        found = study(path, table, trials, workers, seed, tell) if trials else None
    checks = _checks(rows, found)
    result = {
        "provenance": provenance_here(seed).model_dump(mode="json"),
        "trace": table.provenance,
        "rows": rows,
        "study": found,
        "checks": checks,
        "published": [{"what": what, "requests_per_cpu_s": rate} for what, rate in ANCHORS],
    }
    write_json(out, result)
    short = [(r["n_requests"], r["cpu_s"]) for r in rows if r["case"] == "short"]
    write_atomic(out.with_suffix(".svg"), _plot(short).encode())
    print_table(rows, COLUMNS, "simulator")
    print_table(checks, ("what", "value", "limit", "kept"), "asked for")
    note(f"result: {out} and {out.with_suffix('.svg')}")
    rates = [r["requests_per_cpu_s"] for r in rows]
    print_json_line({"command": "bench simulator", "requests_per_cpu_s": rates, "study": found})


def _checks(rows: list[dict[str, Any]], study: dict[str, Any] | None) -> list[dict[str, Any]]:
    """What was measured beside what is asked for; what was not measured is not judged."""
    values: dict[str, float] = {"cold start: CPU s": max(r["cold_start_cpu_s"] for r in rows)}
    for row in rows:
        if row["case"] == "short" and row["n_requests"] == 1_000_000:
            values["1,000,000 short: CPU s"] = row["cpu_s"]
            values["1,000,000 short: peak MiB"] = row["peak_mib"]
        elif row["case"] != "short":
            values[f"trace, {row['case']}: CPU s"] = row["cpu_s"]
            peak = values.get("trace: peak MiB", 0.0)
            values["trace: peak MiB"] = max(peak, row["peak_mib"])
    if study is not None and study["n_trials"] == 200:
        values["200 trials: s"] = study["wall_s"]
    return [
        {"what": k, "value": values[k], "limit": limit, "kept": values[k] <= limit}
        for k, limit in LIMITS.items()
        if k in values
    ]


def _plot(points: list[tuple[int, float]]) -> str:
    """CPU seconds over requests, both logarithmic; the dashed line is linear, through the last."""
    from math import floor, log10

    points = sorted(points)
    n, s = points[-1]
    line = [(float(m), s * m / n) for m, _ in points]
    shown = [*points, *line]
    (left, right), (low, high) = (
        (floor(log10(min(v))), floor(log10(max(v))) + 1) for v in zip(*shown, strict=True)
    )

    def at(m: float, seconds: float) -> str:
        x = 60 + 540 * (log10(m) - left) / (right - left)
        return f"{x:.1f},{360 - 330 * (log10(seconds) - low) / (high - low):.1f}"

    parts = [f'<polyline points="{" ".join(at(*p) for p in line)}" stroke-dasharray="4" />']
    parts += [f'<polyline points="{" ".join(at(*p) for p in points)}" stroke="#06c" />']
    text = []
    for power in range(left, right + 1):
        x, _ = at(10**power, 10**low).split(",")
        text.append(f'<text x="{x}" y="380">1e{power}</text>')
    for power in range(low, high + 1):
        _, y = at(10**left, 10**power).split(",")
        text.append(f'<text x="20" y="{y}">1e{power}</text>')
    for m, seconds in points:
        x, y = at(m, seconds).split(",")
        text.append(f'<circle cx="{x}" cy="{y}" r="3" fill="#06c" />')
        text.append(f'<text x="{x}" y="{float(y) - 8:.1f}">{seconds:.3g} s</text>')
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 660 410" font-family="sans-serif" '
        f'font-size="12"><g fill="none" stroke="#888">{"".join(parts)}</g>{"".join(text)}'
        '<text x="240" y="400">requests (dashed: linear)</text>'
        '<text x="20" y="20">CPU seconds</text></svg>\n'
    )
