"""Options that commands about fleets and traces have in common: a name, a type, a help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Option(help="A known model or a config.json.")]
Slo = Annotated[
    str, typer.Option(help="ttft_ms=,tpot_ms= and share= of all requests that keep their level.")
]
ClassSlo = Annotated[
    list[str] | None,
    typer.Option(
        help="Of a class: NAME:ttft_ms=,tpot_ms=; --slo holds for the others. Repeatable."
    ),
]
Priority = Annotated[str, typer.Option(help="Classes that are admitted first, by commas.")]
Gpus = Annotated[str, typer.Option(help="GPUs, by commas: `cachetune catalogue list`.")]
Disks = Annotated[str, typer.Option(help="Disks, by commas; none for none.")]
Networks = Annotated[str, typer.Option(help="Networks to a shared store, by commas; none.")]
Policies = Annotated[str, typer.Option(help="Policies, by commas.")]
Formats = Annotated[str, typer.Option(help="By commas: bf16, fp8, int8, int4, int3, int2.")]
Evictions = Annotated[str, typer.Option(help="By commas: lru, lfu, cost, belady (a bound).")]
Routers = Annotated[
    str,
    typer.Option(help="By commas: round_robin, least_load, prefix_affinity, chunk_affinity."),
]
Ratio = Annotated[float, typer.Option(help="Recompute ratio of cacheblend and cachetune.")]
Overhead = Annotated[float, typer.Option(min=0, help="Host time per engine step, ms.")]
First = Annotated[int | None, typer.Option(help="At most so many requests.")]
Scale = Annotated[float, typer.Option(help="What if requests came so many times as often?")]
Ids = Annotated[str, typer.Option(help="Block hashes name the prefix, or the content alone.")]
DropEmpty = Annotated[bool, typer.Option(help="Leave out a trace's requests without output.")]
DramGib = Annotated[float | None, typer.Option(help="DRAM of the host, GiB; default of the row.")]
Batch = Annotated[int, typer.Option(min=1, help="max_num_batched_tokens of the engine.")]
Seqs = Annotated[int, typer.Option(min=1, help="max_num_seqs of the engine.")]
Memory = Annotated[float, typer.Option(help="gpu_memory_utilization of the engine.")]
Prices = Annotated[list[str] | None, typer.Option(help="NAME=USD_PER_H. Repeatable.")]
Own = Annotated[Path | None, typer.Option(help="JSON laid over the shipped catalogue.")]
