"""`cachetune validate`: the models against measurements that nobody here made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

command = typer.Typer(help="Hold cost models and simulations against measurements made by others.")

_Data = Annotated[Path, typer.Option(help="Folder above the measured tables, see README.")]
_Out = Annotated[Path | None, typer.Option(help="Where the result is written, JSON.")]
_Profiles = Annotated[Path | None, typer.Option(help="Operator profiles, if not beside the runs.")]
_Gpus = Annotated[str, typer.Option(help="Only these GPUs, by comma.")]


@command.command()
def tables(data: _Data, out: _Out = None, gpus: _Gpus = "") -> None:
    """Times of GPU kernels: rows, shapes, models and whole GPUs held out of the fits."""
    from .validate_tables import validate_tables

    validate_tables(data, out, tuple(g for g in gpus.split(",") if g))


@command.command()
def bundles(data: _Data, out: _Out = None, profiles: _Profiles = None) -> None:
    """Real vLLM runs, each predicted with the host overhead fitted on the others."""
    from .validate_end_to_end import validate_bundles

    validate_bundles(data, out, profiles)


@command.command()
def published(out: _Out = None) -> None:
    """Results of papers, each predicted from the settings that it states."""
    from .validate_published import validate_published

    validate_published(out)


@command.command()
def silicon(data: _Data, out: _Out = None) -> None:
    """TTFT and TPOT at fixed load on H100, one host overhead per engine."""
    from .validate_end_to_end import validate_silicon

    validate_silicon(data, out)
