"""`validate` against real serving runs: bundles of vLLM runs, and the silicon sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def validate_bundles(data: Path, out: Path | None = None, profiles: Path | None = None) -> None:
    """Predict every bundle under `data` with the host overhead fitted on the others.

    Args:
        data: a folder of bundles; or one that holds `bench`, `profiles` and, if at hand, the
            prompts that were sent in `workloads`.
        out: where the result is written as JSON.
        profiles: the tree of operator profiles; unless given `profiles`, or LLMServingSim's
            `profiler/perf`, in `data` or a folder above it.
    """
    from ..calibration.end_to_end import find_bundles, validate
    from ..core.record import check_writable
    from .console import note

    check_writable(out)
    bench = data / "bench" if (data / "bench").is_dir() else data
    workloads = data / "workloads"
    rows, left_out = validate(
        find_bundles(bench),
        profiles or _profiles_near(data),
        workloads if workloads.is_dir() else None,
    )
    for row in rows:
        row["data"] = "real vLLM runs of casys-kaist/LLMServingSim (MIT)"
    for assumed in sorted({f"{r['bundle']}: {a}" for r in rows for a in r["assumed"]}):
        note(f"assumed: {assumed}")
    for one in left_out:
        note(f"not predicted: {one['bundle']}: {one['why']}")
    columns = ["bundle", "metric", "statistic", "measured_s", "predicted_s", "error", "bound"]
    _report(
        rows, [*columns, "met", "overhead_ms", "fitted_on"], "end to end", "bundles", out, left_out
    )


def _profiles_near(data: Path) -> Path:
    """The tree of operator profiles in `data` or above, where it may be one run of many."""
    home = data.resolve()
    near = (f / name for f in (home, *home.parents[:4]) for name in ("profiles", "profiler/perf"))
    return next((f for f in near if f.is_dir()), data / "profiles")


def validate_silicon(data: Path, out: Path | None = None) -> None:
    """Predict the dense H100 rows of the silicon sample with one overhead per engine.

    Args:
        data: `silicon_sample_subset.csv`, or the folder that holds it.
        out: where the result is written as JSON.
    """
    from ..calibration.silicon import summary, validate
    from ..core.record import check_writable

    check_writable(out)
    path = data if data.is_file() else data / "silicon_sample_subset.csv"
    rows = summary(validate(path))
    columns = ["engine", "model", "rows", "metric", "median_error", "bound", "met"]
    _report(rows, [*columns, "overhead_ms", "fitted_on"], "silicon sample, H100", "silicon", out)


def _report(
    rows: list[dict[str, Any]],
    columns: list[str],
    title: str,
    what: str,
    out: Path | None,
    not_predicted: list[dict[str, str]] | None = None,
) -> None:
    from ..core.record import write_json
    from ..runtime.machine import provenance_here
    from .console import note, print_json_line, print_table

    print_table(rows, columns, title)
    checked = [r for r in rows if r["met"] is not None]
    result = {
        "command": f"validate {what}",
        "bounds": len(checked),
        "met": sum(bool(r["met"]) for r in checked),
    }
    if out is not None:
        provenance = provenance_here(0).model_dump(mode="json")
        data = {"provenance": provenance, **result, "rows": rows}
        if not_predicted is not None:
            data["not_predicted"] = not_predicted
        write_json(out, data)
        note(f"result: {out}")
    print_json_line(result)
