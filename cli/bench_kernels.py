"""`cachetune bench kernels`: every kernel beside its peers and this run's limits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..kernels.benchmark import Ceilings, Timing, Trouble
    from ..kernels.registry import KernelCase

_Device = Annotated[str, typer.Option(help="cuda, cpu, or auto: cuda where there is one.")]
_Only = Annotated[str, typer.Option(help="Cases whose name holds one of these texts, by comma.")]
_Peers = Annotated[str, typer.Option(help="Peers for: first (of each kernel), all or none.")]
_Repeats = Annotated[int, typer.Option(min=3, help="Timed runs of each contender.")]
_By = Annotated[int, typer.Option(min=1, help="On a CPU: cases with this many times fewer tokens.")]
_Out = Annotated[Path | None, typer.Option(help="The result; by default below results/.")]
_Seed = Annotated[int, typer.Option(min=0, help="Recorded with the result.")]

COLUMNS = (
    "case", "contender", "us", "q25", "q75", "GB/s", "Tflop/s", "of_limit", "must", "goal",
    "vs_ours",
)  # fmt: skip


def command(
    device: _Device = "auto",
    only: _Only = "",
    peers: _Peers = "first",
    repeats: _Repeats = 20,
    smaller_by: _By = 16,
    out: _Out = None,
    seed: _Seed = 0,
) -> None:
    """Time the kernels against limits and peers of the same run; wrong ones get no speed.

    The result is written after each case, so that a run that is ended leaves what it has.
    """
    from ..calibration import ceilings as limits
    from ..core.errors import CacheTuneError
    from ..core.record import check_writable, write_json
    from .bench_machine import device_name, pick_device, provenance, results_folder
    from .console import note, print_json_line, print_table, progress, warn

    device = pick_device(device)
    out = out or results_folder(device) / "kernels.json"
    check_writable(out)
    if peers not in ("first", "all", "none"):
        raise CacheTuneError("--peers must be first, all or none", values=peers)
    cases = _cases(device, only, smaller_by)
    if not cases:
        raise CacheTuneError("--only must name a kernel or a case", values=only)
    if device == "cpu":
        warn("no CUDA device: this times the torch reference, which is the CPU path, not Triton")
    found = limits.measure(device)
    print_table(limits.as_rows(found), limits.COLUMNS, f"limits of this run, {device_name(device)}")
    ceilings = _ceilings(found)
    rows: list[dict[str, Any]] = []
    missing = [case.name for case, _ in cases]
    result = {
        "provenance": provenance(seed, device),
        "device": device_name(device),
        "path": "triton" if device == "cuda" else "torch reference",
        "ceilings": limits.as_json(found),
        "missing": missing,
        "rows": rows,
    }
    for case, first in progress(cases, "cases"):
        wanted = peers == "all" or (peers == "first" and first)
        rows += _rows(case, device, ceilings, wanted, repeats)
        missing.remove(case.name)
        write_json(out, result)
    print_table(rows, COLUMNS, "kernels")
    for row in rows:
        if row["trouble"]:
            note(f"{row['case']}, {row['contender']}: {row['trouble']}")
    note(f"result: {out}")
    wrong = [r["case"] for r in rows if r["trouble"] and r["contender"].startswith("ours")]
    missed = [f"{r['case']}, {r['contender']}" for r in rows if r["met"] is False]
    print_json_line({"command": "bench kernels", "wrong": wrong, "below_must": missed})
    if wrong:
        raise typer.Exit(1)


def _cases(device: str, only: str, by: int) -> list[tuple[KernelCase, bool]]:
    """Cases for this device, each with whether it is the first of its kernel."""
    from ..kernels.benchmark import smaller
    from ..kernels.registry import all_cases, representatives

    first = {c.name for c in representatives()}
    words = [w.strip() for w in only.split(",") if w.strip()] or [""]
    found = [c for c in all_cases() if not c.tiny and any(w in c.name for w in words)]
    return [(c if device == "cuda" else smaller(c, by), c.name in first) for c in found]


def _ceilings(found: dict[str, Any]) -> Ceilings:
    from ..kernels.benchmark import Ceilings

    copy = found["device_copy"].rate
    link = found["h2d"].rate if "h2d" in found else copy / 2
    sm = found["h2d_sm"].rate if "h2d_sm" in found else None
    return Ceilings(copy, found["matmul"].rate, link, sm)


def _rows(
    case: KernelCase, device: str, ceilings: Ceilings, peers: bool, repeats: int
) -> list[dict[str, Any]]:
    from ..kernels.benchmark import goals, time_case

    rows = [_row(t) for t in time_case(case, device, ceilings, peers=peers, n=repeats)]
    ours = next((r["us"] for r in rows if r["contender"].startswith("ours")), None)
    for row in rows:
        mine = row["contender"].startswith("ours")
        row["vs_ours"] = row["us"] / ours if ours and row["us"] else None
        name = "ours" if mine else row["contender"]
        must, goal = goals(case, name) if device == "cuda" else (None, None)
        reached = row["of_limit" if mine else "vs_ours"]
        met = reached >= must if must is not None and reached is not None else None
        row |= {"must": must, "goal": goal, "met": met}
    return rows


def _row(found: Timing | Trouble) -> dict[str, Any]:
    from ..kernels.benchmark import Trouble

    row: dict[str, Any] = {"case": found.name, "contender": found.contender}
    if isinstance(found, Trouble):
        empty = ("us", "q25", "q75", "GB/s", "Tflop/s", "of_limit")
        return row | dict.fromkeys(empty) | {"trouble": found.why}
    return row | {
        "us": found.median * 1e6,
        "q25": found.low * 1e6,
        "q75": found.high * 1e6,
        "n": found.n,
        "GB/s": found.bytes_per_second / 1e9,
        "Tflop/s": found.flops_per_second / 1e12,
        "of_limit": found.fraction_of_limit,
        "trouble": None,
    }
