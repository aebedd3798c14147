"""`cachetune validate published`: results of papers, predicted from the settings they state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..calibration.published import Study

COLUMNS = {
    "rows": ("study", "point", "unit", "published", "predicted", "error", "role", "settings"),
    "fitted": ("study", "name", "value", "unit", "n_points"),
    "claims": ("study", "name", "published", "predicted", "holds", "why"),
    "not_matched": ("study", "published", "why"),
    "disorder": ("study", "first", "second", "published_gap", "settings", "why"),
    "summary": ("study", "settings", "points", "median_error", "p90_error", "max_error", "scalars",
                "fitted_points", "met"),
}  # fmt: skip
TITLES = {
    "rows": "published results",
    "fitted": "fitted scalars",
    "claims": "inequalities",
    "not_matched": "not matched",
    "disorder": "pairs in another order than published",
    "summary": "points no scalar saw",
}


def validate_published(out: Path | None = None) -> None:
    """Predict published results; print each beside its prediction, what was fitted and assumed.

    Args:
        out: where the result is written as JSON, or None.

    Raises:
        CacheTuneError: an output that cannot be written.
    """
    from ..calibration.published import studies
    from ..core.record import check_writable, write_json
    from ..runtime.machine import provenance_here
    from .console import note, print_json_line, print_table

    check_writable(out)
    found = studies()
    tables = _tables(found)
    for name, columns in COLUMNS.items():
        print_table(tables[name], columns, TITLES[name])
    for study in found:
        for assumed in study.assumed:
            note(f"assumed, {study.name}: {assumed}")
    result = {"command": "validate published", **_result(found, tables)}
    if out is not None:
        about = {
            "provenance": provenance_here(0).model_dump(mode="json"),
            "sources": {s.name: s.paper for s in found},
            "assumed": {s.name: list(s.assumed) for s in found},
        }
        write_json(out, {**about, **result, **tables})
        note(f"result: {out}")
    print_json_line(result)


def _tables(found: Sequence[Study]) -> dict[str, list[dict[str, Any]]]:
    """Everything that is printed and kept, by name."""
    from dataclasses import asdict

    from ..calibration.published import claim_rows, disorder_rows, rows_of, summary

    return {
        "rows": [row for s in found for row in rows_of(s)],
        "fitted": [
            {"study": s.name, **asdict(x), "n_points": x.n_points} for s in found for x in s.scalars
        ],
        "claims": [row for s in found for row in claim_rows(s)],
        "not_matched": [
            {"study": s.name, "published": what, "why": why}
            for s in found
            for what, why in s.unmatched
        ],
        "disorder": [row for s in found for row in disorder_rows(s)],
        "summary": summary(found),
    }


def _result(found: Sequence[Study], tables: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The figures of the last line; the bounds are asked of points with stated settings."""
    from ..calibration.published import MEDIAN_BOUND, P90_BOUND, ordered_pairs

    overall = [r for r in tables["summary"] if r["study"] == "all" and r["settings"] == "stated"]
    return {
        **{k: overall[0][k] for k in ("points", "median_error", "p90_error", "met")},
        "median_bound": MEDIAN_BOUND,
        "p90_bound": P90_BOUND,
        "scalars": len(tables["fitted"]),
        "pairs": sum(ordered_pairs(s.points)[0] for s in found),
        "pairs_wrong": len(tables["disorder"]),
        "pairs_wrong_stated": sum(d["settings"] == "stated" for d in tables["disorder"]),
        "inequalities": len(tables["claims"]),
        "inequalities_broken": sum(not c["holds"] for c in tables["claims"]),
        "unmatched": len(tables["not_matched"]),
    }
