"""`cachetune validate tables`: the kernel cost model against tables it has not seen."""

from __future__ import annotations

from pathlib import Path

SEED = 0


def validate_tables(data: Path, out: Path | None, gpus: tuple[str, ...] = ()) -> None:
    """Fit the tables under `data` with parts held out; print errors, bounds and interval coverage.

    Args:
        data: folder above aiconfigurator/, llmservingsim/ and vidur/.
        out: JSON with provenance, or None.
        gpus: only these; all if empty.

    Raises:
        CacheTuneError: a malformed table, or an output that cannot be written.
    """
    from dataclasses import asdict

    from ..calibration.kernel_holdout import hold_outs, together, whole_gpus
    from ..calibration.kernel_tables import read_tables
    from ..core.record import check_writable, write_json
    from ..runtime.machine import provenance_here
    from .console import note, print_json_line, print_table

    check_writable(out)
    tables = read_tables(data)
    chosen = [t for t in tables if not gpus or t.gpu in gpus]
    parts = [*hold_outs(chosen, SEED, note)]
    found = [*parts, *together(parts), *whole_gpus(tables)]
    rows = [{**asdict(r), "passed": r.passed} for r in found]
    columns = ["gpu", "kind", "held_out", "n_rows", "error_mean", "error_median", "bound"]
    print_table(rows, [*columns, "coverage", "form_error_mean"], "kernel times, held out")
    if out is not None:
        result = {
            "provenance": provenance_here(SEED).model_dump(mode="json"),
            "sources": {f"{t.gpu} {t.kind}": t.source for t in tables},
            "rows": rows,
        }
        write_json(out, result)
        note(f"result: {out}")
    bounded = [r for r in found if r.bound is not None]
    missed = [f"{r.gpu} {r.kind}" for r in bounded if not r.passed]
    print_json_line(
        {"command": "validate tables", "bounds": len(bounded), "met": len(bounded) - len(missed)}
        | {"missed": missed}
    )
