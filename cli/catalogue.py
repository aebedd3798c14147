"""`cachetune catalogue`: hardware that questions can be about, each value with its source."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

command = typer.Typer(no_args_is_help=True, help="GPUs, links, memory, disks, networks.")

_File = Annotated[Path | None, typer.Option("--catalogue", help="JSON laid over the shipped rows.")]


@command.command("list")
def list_rows(catalogue: _File = None) -> None:
    """One line per row: its main figure, whether that was measured, its price."""
    from ..core.catalogue import Figure, load_catalogue
    from ..core.model_presets import PRESETS
    from .console import print_json_line, print_table

    found = load_catalogue(catalogue)
    rows = []
    for kind, row in found.rows():
        data = dict(row)
        name, figure = next((k, v) for k, v in data.items() if isinstance(v, Figure))
        measured = sum(v.kind == "measured" for v in data.values() if isinstance(v, Figure))
        price = data.get("price")
        rows.append(
            {
                "kind": kind,
                "name": data["name"],
                "figure": name,
                "value": f"{figure.value:.4g}",
                "is": figure.kind,
                "measured": measured,
                "usd_per_h": price.usd_per_h if price else None,
                "as of": price.as_of if price else None,
            }
        )
    print_table(rows, list(rows[0]))
    print_json_line({"command": "catalogue list", "rows": len(rows), "models": list(PRESETS)})


@command.command()
def show(name: str, catalogue: _File = None) -> None:
    """Every figure of a row with its source; of a GPU, its data sheet and its kernels too."""
    from ..core.catalogue import Figure, GpuRow, load_catalogue
    from ..tuner.candidate import data_sheet_of, kernels_of, sheet_of
    from .console import print_json_line, print_table

    row = _find(load_catalogue(catalogue), name)
    rows: list[dict[str, Any]] = []
    for field, value in dict(row).items():
        if isinstance(value, Figure):
            rows.append({"figure": field, "value": f"{value.value:.6g}", "is": value.kind})
            rows[-1]["source"] = value.source
        elif field == "price" and value is not None:
            where = f"{value.source}, {value.as_of}, {value.terms}"
            rows.append({"figure": "price_usd_per_h", "value": f"{value.usd_per_h:.6g}"})
            rows[-1] |= {"is": "price", "source": where}
        elif field != "peaks":
            rows.append({"figure": field, "value": str(value), "is": "", "source": ""})
    if isinstance(row, GpuRow):
        sheet, used = data_sheet_of(row), sheet_of(row)
        for field in ("bf16_flops", "fp8_flops", "memory_bytes_per_s", "n_sms", "link_bytes_per_s"):
            value = getattr(sheet, field)
            text = "-" if value is None else f"{value:.6g}"
            rows.append({"figure": field, "value": text, "is": "spec", "source": sheet.source})
        if used != sheet:
            rows.append({"figure": "bf16_flops used", "value": f"{used.bf16_flops:.6g}"})
            where = "so that the borrowed matmul ends at matmul_flops"
            rows[-1] |= {"is": "derived", "source": where}
        for kernel in kernels_of(row):
            rows.append({"figure": kernel["figure"], "value": f"{kernel['value']} rows"})
            rows[-1] |= {"is": kernel["kind"], "source": kernel["source"]}
    print_table(rows, ("figure", "value", "is", "source"))
    print_json_line({"command": "catalogue show", **row.model_dump(mode="json")})


def _find(found: Any, name: str) -> Any:
    from ..core.catalogue import key_of, nearest
    from ..core.errors import ProfileError

    rows = {row.name: row for _, row in found.rows()}
    by_key = {key_of(n): row for n, row in rows.items()}
    if key_of(name) in by_key:
        return by_key[key_of(name)]
    near = nearest(name, rows)
    raise ProfileError(
        "the name must be one of the catalogue",
        values=repr(name),
        remedy=f"did you mean {' or '.join(near)}?" if near else "`cachetune catalogue list`",
    )
