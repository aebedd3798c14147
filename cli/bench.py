"""`cachetune bench`: one sub-command per module `bench_<name>.py`, each with a `command`."""

from __future__ import annotations

import importlib
from pathlib import Path

import typer

BENCHES = (
    "quality",
    "ttft",
    "throughput",
    "kernels",
    "io",
    "grid",
    "serve",
    "simulator",
    "capacity",
    "shared_link",
    "gpu",
)
"""In the order of `--help`; those whose module is there are offered."""

command = typer.Typer(help="Measure kernels, I/O, TTFT, throughput, quality and plans, to files.")

for _name in BENCHES:
    if (Path(__file__).parent / f"bench_{_name}.py").is_file():
        _module = importlib.import_module(f".bench_{_name}", __package__)
        command.command(_name.replace("_", "-"))(_module.command)
