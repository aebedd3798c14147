"""`cachetune tune fleet`: which fleet for a trace? A search by Optuna, dollars against TTFT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import CacheTuneError
from . import fleet_options as options

if TYPE_CHECKING:
    from ..core.catalogue import Catalogue
    from ..tuner.candidate import Candidate
    from ..tuner.trace_study import Space, StudyQuestion

_File = Annotated[
    str, typer.Argument(metavar="TRACE", help="A trace, or traffic as of `cachetune whatif`.")
]
_Slo = Annotated[
    str, typer.Option(help="ttft_ms=,tpot_ms= and share= of every class's requests that keep it.")
]
_Counts = Annotated[str, typer.Option(help="GPUs per replica (tensor parallel), by commas.")]
_Replicas = Annotated[str, typer.Option(help="Fewest and most replicas: LOW,HIGH.")]
_Dram = Annotated[str, typer.Option(help="DRAM of a host, GiB, by commas.")]
_Batch = Annotated[str, typer.Option(help="max_num_batched_tokens of the engine, by commas.")]
_Rate = Annotated[float | None, typer.Option(help="Requests per second; default the trace's own.")]
_Requests = Annotated[int | None, typer.Option(min=20, help="At most so many requests.")]
_Trials = Annotated[int, typer.Option(min=1, help="Fleets to simulate.")]
_Workers = Annotated[int, typer.Option(min=1, help="Processes; the result is the same.")]
_Seed = Annotated[int, typer.Option(min=0, help="Root of every random stream.")]
_Out = Annotated[Path, typer.Option(help="Every trial, JSON; its journal lies beside it.")]

COLUMNS = (
    "usd_per_h", "ttft_ms_p99", "share", "n_replicas", "n_gpus", "gpu", "policy", "stored", "ratio",
    "dram_gib", "disk", "network", "eviction", "router", "batch_tokens",
)  # fmt: skip
DEFAULT_REQUESTS = 5000
"""Of traffic that has no end of its own."""


def command(
    trace: _File,
    model: options.Model = "Llama-3.1-8B",
    slo: _Slo = "ttft_ms=2000,tpot_ms=50,share=0.99",
    gpu: options.Gpus = "A100-SXM-80GB,H100-SXM,L40S",
    n_gpus: _Counts = "1",
    replicas: _Replicas = "1,16",
    disk: options.Disks = "nvme-gen4,sata-ssd",
    network: options.Networks = "none,25g-rdma,100g-rdma",
    dram_gib: _Dram = "64,128,256,512",
    policy: options.Policies = "prefix_cache,cachetune",
    format: options.Formats = "bf16,int8,int4",
    eviction: options.Evictions = "lru,lfu,cost",
    router: options.Routers = "round_robin,least_load,prefix_affinity,chunk_affinity",
    batch: _Batch = "2048,4096,8192,16384",
    rate_rps: _Rate = None,
    requests: _Requests = None,
    ids: options.Ids = "prefix",
    drop_empty: options.DropEmpty = False,
    catalogue: options.Own = None,
    price: options.Prices = None,
    trials: _Trials = 200,
    workers: _Workers = 1,
    seed: _Seed = 0,
    out: _Out = Path("build/fleet.json"),
) -> None:
    """Search fleets for a trace: hardware, policy, tiers, routing; cost against TTFT p99."""
    from ..core.catalogue import load_catalogue
    from ..core.model_presets import model_of
    from ..core.record import check_writable, made
    from ..core.workload import Slo
    from ..tuner.trace_study import StudyQuestion
    from ..tuner.traffic import rate_of, traffic_of
    from .whatif_options import level, warn_of_ticks, with_prices

    rows = with_prices(load_catalogue(catalogue), price or [])
    check_writable(out, inputs=[trace, catalogue])
    journal = out.with_suffix(".journal.jsonl")
    check_writable(journal, inputs=[trace, catalogue])
    service, share = level(slo)
    chosen = _space({
        "gpus": gpu, "policies": policy, "stored": format, "disks": disk, "networks": network,
        "dram_gib": dram_gib, "evictions": eviction, "routers": router, "batch_tokens": batch,
        "n_gpus": n_gpus, "n_replicas": replicas,
    }, rows)  # fmt: skip
    spec = model_of(model)
    traffic = traffic_of(trace, ids=ids, zero_output="drop" if drop_empty else "refuse")
    warn_of_ticks(traffic.tick_s)
    table = traffic.table(requests or traffic.n_whole or DEFAULT_REQUESTS, 1.0, seed)
    fields: dict[str, Any] = {
        "model": spec, "traffic": traffic, "slo": Slo(**service), "n_requests": len(table),
        "rate_rps": traffic.rate_rps or rate_of(table) if rate_rps is None else rate_rps,
        "space": chosen, "catalogue": rows if catalogue or price else None, "n_trials": trials,
        "seed": seed,
    }  # fmt: skip
    question = made(StudyQuestion, "the study", **fields)
    _report(question, _search(question, workers, journal), share, out)


def _space(texts: Mapping[str, str], catalogue: Catalogue) -> Space:
    """What may be chosen.

    Raises:
        CacheTuneError: an unknown name, with the nearest; not a number; an empty list.
    """
    from ..core.record import made
    from ..tuner.trace_study import Space
    from .whatif_options import candidates, names

    fields: dict[str, Any] = {}
    for name, text in texts.items():
        found: list[Any] = names(text)
        if name in ("dram_gib", "batch_tokens", "n_gpus", "n_replicas"):
            try:
                found = [int(part) for part in found]
            except ValueError:
                found = []
            if min(found, default=0) < 1 or (name == "n_replicas" and len(found) != 2):
                raise CacheTuneError(
                    "replicas are LOW,HIGH; GPUs, DRAM and batch are whole numbers from 1 on",
                    values=f"{name} {text!r}",
                    remedy="for example --replicas 1,16 --dram-gib 64,256 --batch 8192",
                )
        fields[name] = tuple(dict.fromkeys(found))
    fields["n_replicas"] = (min(fields["n_replicas"]), max(fields["n_replicas"]))
    space: Space = made(Space, "the study", **fields)
    one: dict[str, Any] = {
        "gpus": texts["gpus"], "n_gpus": "1", "disks": "none", "networks": "none",
        "policies": "cachetune", "formats": "bf16", "routers": "least_load", "evictions": "lru",
        "dram_gib": min(space.dram_gib),
        "engine": {"max_num_batched_tokens": min(space.batch_tokens)},
    }  # fmt: skip
    for given in (  # names are looked up, with all else that a candidate checks
        {name: texts[name] for name in ("n_gpus", "disks", "networks")},
        {"policies": texts["policies"], "formats": texts["stored"]},
        {"routers": texts["routers"], "evictions": texts["evictions"]},
    ):
        found = candidates(catalogue, weights="bfloat16", ratio=0.15, overhead_ms=0.8,
                           **{**one, **given})  # fmt: skip
    for candidate in found:
        _check_price(candidate)
    return space


def _check_price(candidate: Candidate) -> None:
    if candidate.machine.gpu.price is None:
        raise CacheTuneError(
            "the fleets of a study need a price",
            values=f"none with a date and source for {candidate.machine.gpu.name}",
            remedy=f"leave that GPU out, or pass --price {candidate.machine.gpu.name}=USD_PER_H",
        )


def _search(question: StudyQuestion, workers: int, journal: Path) -> list[dict[str, Any]]:
    from ..tuner.sweep import Interrupted
    from ..tuner.trace_study import trace_study
    from .console import note, progress_bar

    try:
        with progress_bar() as tell:
            return trace_study(
                question, workers=workers, journal=journal,
                on_done=lambda done, of: tell("trials", done, of),
            )[1]  # fmt: skip
    except Interrupted:
        note(f"what was simulated is kept in {journal}; run again to go on")
        raise


def _report(
    question: StudyQuestion, rows: Sequence[dict[str, Any]], share: float, out: Path
) -> None:
    from ..core.record import write_json
    from ..tuner.trace_study import cheapest, front, share_of
    from .console import note, print_json_line, print_table, warn

    able = [row for row in rows if not row["why_not"]]
    if not able:
        raise CacheTuneError(
            "no fleet that was tried can serve this traffic",
            values=rows[0]["why_not"],
            remedy="offer other GPUs, or another model",
        )
    best, kept = cheapest(rows, share), front(rows)
    result = {
        "command": "tune fleet",
        "question": question.model_dump(mode="json"),
        "traffic": question.traffic.provenance,
        "share": share,
        "best": best,
        "front": kept,
        "trials": rows,
    }
    write_json(out, result)
    print_table([{**row, "share": share_of(row)} for row in kept], COLUMNS, "none better in both")
    if best is None:
        closest = max(able, key=lambda r: (share_of(r), -r["ttft_ms_p99"], -r["usd_per_h"]))
        warn(f"no fleet keeps the SLO for {share:.4g} of requests; the closest for "
             f"{share_of(closest):.4g}, TTFT p99 {closest['ttft_ms_p99']:.4g} ms, TPOT p99 "
             f"{closest['tpot_ms_p99'] or 0:.4g} ms, at ${closest['usd_per_h']:.2f}/h")  # fmt: skip
    else:
        note(f"cheapest that keeps the SLO: trial {best['trial']}, ${best['usd_per_h']:.2f}/h")
    note(f"result: {out}")
    print_json_line({
        "command": "tune fleet", "out": str(out), "best": best, "n_trials": len(rows),
        "n_failed": len(rows) - len(able), "front": kept,
    })  # fmt: skip
