"""`cachetune whatif`: what do I need, what does it cost, and what if something were different?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import fleet_options as options

if TYPE_CHECKING:
    from ..tuner.question import Question

_Traffic = Annotated[
    str,
    typer.Option(
        help="A trace file; rag:rate=,passages=,tokens=,chunks=,zipf=,question=,output=,spread=,"
        "cv=; chat:rate=,turns=,system=,systems=,message=,output=,think=,spread=,cv=."
    ),
]
_Counts = Annotated[
    str,
    typer.Option(help="GPUs of a replica, or of each of its stages (tensor parallel), by commas."),
]
_Stages = Annotated[str, typer.Option(help="Pipeline stages of a replica, by commas.")]
_Weights = Annotated[str, typer.Option(help="Weights, by commas: bfloat16, fp8.")]
_Target = Annotated[
    float | None, typer.Option(help="Requests per second to carry; default the traffic's own.")
]
_WhatIf = Annotated[
    str | None, typer.Option("--what-if", help="Changes to the best: disk=hdd-7200,shared=0.5,...")
]
_Seeds = Annotated[int, typer.Option(min=1, max=100, help="Samples of traffic.")]
_Horizon = Annotated[float, typer.Option(min=1, help="Seconds of traffic in a run.")]
_MaxRequests = Annotated[int, typer.Option(min=20, help="Most requests in a run.")]
_Workers = Annotated[int, typer.Option(min=1, help="Processes.")]
_Backend = Annotated[str, typer.Option(help="processes, or ray for a cluster.")]
_Fresh = Annotated[bool, typer.Option(help="Begin again; else what --out holds is taken.")]
_Out = Annotated[Path, typer.Option(help="Folder of table, JSON, page and journal.")]


def command(
    model: options.Model = "Llama-3.1-8B",
    traffic: _Traffic = "rag:",
    slo: options.Slo = "ttft_ms=1000,tpot_ms=50,share=0.99",
    class_slo: options.ClassSlo = None,
    priority: options.Priority = "",
    gpu: options.Gpus = "H100-SXM,L40S",
    n_gpus: _Counts = "1",
    stages: _Stages = "1",
    disk: options.Disks = "nvme-gen4",
    network: options.Networks = "none",
    policy: options.Policies = "full_recompute,prefix_cache,cachetune",
    format: options.Formats = "bf16",
    weights: _Weights = "bfloat16",
    router: options.Routers = "least_load",
    eviction: options.Evictions = "lru",
    dram_gib: options.DramGib = None,
    ratio: options.Ratio = 0.15,
    target_rps: _Target = None,
    what_if: _WhatIf = None,
    seeds: _Seeds = 5,
    horizon: _Horizon = 120.0,
    max_requests: _MaxRequests = 6000,
    workers: _Workers = 1,
    backend: _Backend = "processes",
    catalogue: options.Own = None,
    price: options.Prices = None,
    max_num_batched_tokens: options.Batch = 8192,
    max_num_seqs: options.Seqs = 256,
    gpu_memory_utilization: options.Memory = 0.9,
    overhead_ms: options.Overhead = 0.8,
    ids: options.Ids = "prefix",
    drop_empty: options.DropEmpty = False,
    fresh: _Fresh = False,
    out: _Out = Path("build/whatif"),
) -> None:
    """Which of these machines, and how many, for this traffic and service level; what if not."""
    from ..core.catalogue import load_catalogue
    from ..core.record import check_writable
    from ..tuner.traffic import traffic_of
    from .whatif_options import candidates, of_classes, warn_of_ticks, with_prices
    from .whatif_run import run

    rows = with_prices(load_catalogue(catalogue), price or [])
    engine = {"max_num_batched_tokens": max_num_batched_tokens, "max_num_seqs": max_num_seqs,
              "utilization": gpu_memory_utilization}  # fmt: skip
    chosen = candidates(
        rows, gpus=gpu, n_gpus=n_gpus, stages=stages, disks=disk, networks=network,
        policies=policy, formats=format, weights=weights, routers=router, evictions=eviction,
        dram_gib=dram_gib, ratio=ratio, engine=engine, overhead_ms=overhead_ms,
    )  # fmt: skip
    comes = traffic_of(traffic, ids=ids, zero_output="drop" if drop_empty else "refuse")
    warn_of_ticks(comes.tick_s)
    check_writable(out / "whatif.json")
    levels, first = of_classes(class_slo or [], priority, comes.classes)
    question = _question(model, slo, comes, target_rps, seeds, horizon, max_requests)
    question = question.replace(class_slo=levels, priority=first)
    run(question, chosen, rows, what_if, workers, backend, out, fresh)


def _question(
    model: str,
    slo: str,
    comes: Any,
    target_rps: float | None,
    seeds: int,
    horizon: float,
    max_requests: int,
) -> Question:
    from ..core.model_presets import model_of
    from ..core.record import made
    from ..core.workload import Slo
    from ..tuner.evaluate import RunLength
    from ..tuner.question import Question
    from .whatif_options import level

    limits, share = level(slo)
    return made(
        Question,
        "the question",
        model=model_of(model),
        slo=Slo(**limits),
        attainment=share,
        traffic=comes,
        target_rps=target_rps if target_rps is not None else comes.rate_rps,
        seeds=tuple(range(seeds)),
        length=RunLength(
            horizon_s=horizon,
            max_requests=max_requests,
            min_requests=min(max(400, round(20 / max(1 - share, 1e-3))), max_requests),
        ),
    )
