"""`cachetune replay`: a trace through a simulated fleet, request by request."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import fleet_options as options

if TYPE_CHECKING:
    from ..core.request_table import RequestTable
    from ..core.step_cost import StepCost
    from ..simulator.serving_fleet import Fleet
    from ..simulator.serving_result import ServingResult
    from ..tuner.candidate import Candidate

_File = Annotated[Path, typer.Argument(help="A trace in any format of `cachetune trace`.")]
_Gpu = Annotated[str, typer.Option(help="A GPU of `cachetune catalogue list`.")]
_Count = Annotated[int, typer.Option(min=1, max=64, help="GPUs per replica (tensor parallel).")]
_Stages = Annotated[
    int, typer.Option(min=1, max=64, help="Pipeline stages of a replica, each of --n-gpus GPUs.")
]
_Replicas = Annotated[int, typer.Option(min=1, help="Equal replicas behind the router.")]
_Router = Annotated[
    str, typer.Option(help="round_robin, least_load, prefix_affinity, chunk_affinity.")
]
_Disk = Annotated[str, typer.Option(help="A disk of the catalogue, or none.")]
_Network = Annotated[str, typer.Option(help="A network to a store that replicas share, or none.")]
_Policy = Annotated[str, typer.Option(help="Which tokens of a known chunk are recomputed.")]
_Format = Annotated[str, typer.Option(help="Of stored chunks: bf16, fp8, int8, int4, int3, int2.")]
_Eviction = Annotated[str, typer.Option(help="lru, lfu, cost, belady.")]
_Weights = Annotated[str, typer.Option(help="bfloat16 or fp8.")]
_Slo = Annotated[str, typer.Option(help="ttft_ms=,tpot_ms=: what counts as good.")]
_Life = Annotated[int | None, typer.Option(help="A row whose life is written to --trace.")]
_Trace = Annotated[Path, typer.Option(help="With --life: the Chrome trace.")]
_Out = Annotated[Path | None, typer.Option(help="One row per request, CSV.")]
_Warm = Annotated[Path | None, typer.Option(help="What every replica's tiers hold at the start.")]
_Kept = Annotated[Path | None, typer.Option(help="Of one replica: what its tiers hold at the end.")]
_Seed = Annotated[int, typer.Option(min=0, help="Kept in the result.")]


def command(
    file: _File,
    model: options.Model = "Llama-3.1-8B",
    gpu: _Gpu = "H100-SXM",
    n_gpus: _Count = 1,
    stages: _Stages = 1,
    replicas: _Replicas = 1,
    router: _Router = "least_load",
    disk: _Disk = "nvme-gen4",
    network: _Network = "none",
    policy: _Policy = "cachetune",
    format: _Format = "bf16",
    ratio: options.Ratio = 0.15,
    eviction: _Eviction = "lru",
    weights: _Weights = "bfloat16",
    dram_gib: options.DramGib = None,
    max_num_batched_tokens: options.Batch = 8192,
    max_num_seqs: options.Seqs = 256,
    gpu_memory_utilization: options.Memory = 0.9,
    catalogue: options.Own = None,
    slo: _Slo = "ttft_ms=1000,tpot_ms=50",
    class_slo: options.ClassSlo = None,
    priority: options.Priority = "",
    first: options.First = None,
    scale_rate: options.Scale = 1.0,
    ids: options.Ids = "prefix",
    drop_empty: options.DropEmpty = False,
    overhead_ms: options.Overhead = 0.8,
    life: _Life = None,
    trace: _Trace = Path("build/life.json"),
    out: _Out = None,
    snapshot: _Warm = None,
    snapshot_out: _Kept = None,
    seed: _Seed = 0,
) -> None:
    """Predict every request's TTFT, TPOT and loads on a fleet from the catalogue."""
    from ..core.catalogue import load_catalogue
    from ..core.model_presets import model_of
    from ..core.record import check_writable
    from ..core.trace_ticks import tick_s
    from ..core.workload import Slo
    from .console import warn
    from .replay_snapshot import check_one_replica
    from .whatif_options import candidates, level, of_classes, warn_of_ticks

    chrome = trace if life is not None else None
    check_writable(out, chrome, snapshot_out, inputs=[file, catalogue, snapshot])
    check_one_replica(snapshot_out, replicas)
    rows = load_catalogue(catalogue)
    engine = {"max_num_batched_tokens": max_num_batched_tokens, "max_num_seqs": max_num_seqs,
              "utilization": gpu_memory_utilization}  # fmt: skip
    chosen = _only(candidates(
        rows, gpus=gpu, n_gpus=str(n_gpus), stages=str(stages), disks=disk, networks=network,
        policies=policy, formats=format, weights=weights, routers=router, evictions=eviction,
        dram_gib=dram_gib, ratio=ratio, engine=engine, overhead_ms=overhead_ms,
    ))  # fmt: skip
    spec, asked = model_of(model), Slo(**level(slo, share=False)[0])
    table = _read(file, first, scale_rate, ids, drop_empty)
    warn_of_ticks(tick_s(table))
    _check_row(life, len(table))
    longest = int((table.prompt_tokens.astype(int) + table.output_tokens).max())
    chosen.check_fits(spec, rows, longest)
    classes = of_classes(class_slo or [], priority, table.classes)
    fleet = chosen.fleet(spec, asked, replicas).with_classes(*classes)
    if fleet.replica.tiers and eviction == "belady" and replicas > 1 and "affinity" not in router:
        warn(f"belady knows who asks for a chunk next, not on which replica: {router} may send it "
             "to another, so this is no bound; chunk_affinity makes it one")  # fmt: skip
    result, cpu_s = _served(table, fleet, chosen.cost(spec), snapshot, life, seed)
    _write_files(result, out, life, trace, snapshot_out)
    _report(f"{replicas} x {chosen.name}", result, cpu_s, table.provenance)


def _served(
    table: RequestTable,
    fleet: Fleet,
    cost: StepCost,
    snapshot: Path | None,
    life: int | None,
    seed: int,
) -> tuple[ServingResult, float]:
    """The result, and the CPU seconds it took."""
    from time import process_time

    from ..simulator.serving import serve_trace
    from .console import progress_bar
    from .replay_snapshot import read_warm

    warm = None
    if snapshot is not None:
        table, warm = read_warm(snapshot, table, fleet)
    began_s = process_time()
    with progress_bar() as tell:
        result = serve_trace(
            table, fleet, cost, seed=seed, snapshot=warm, watch=() if life is None else (life,),
            progress=lambda done, of: tell("requests", done, of),
        )  # fmt: skip
    return result, process_time() - began_s


def _read(
    file: Path, first: int | None, scale_rate: float, ids: Any, drop_empty: bool
) -> RequestTable:
    from ..core.trace_files import read_trace

    return read_trace(
        file, first=first, scale_rate=scale_rate, ids=ids,
        zero_output="drop" if drop_empty else "refuse",
    )  # fmt: skip


def _only(found: Sequence[Candidate]) -> Candidate:
    from ..core.errors import CacheTuneError

    if len(found) > 1:
        raise CacheTuneError(
            "a replay is of one fleet",
            values=f"{len(found)} of them: {found[0].name}, {found[1].name} …",
            remedy="name one of each, or compare them with `cachetune whatif`",
        )
    return found[0]


def _check_row(row: int | None, n_rows: int) -> None:
    from ..core.errors import WorkloadError

    if row is not None and not 0 <= row < n_rows:
        raise WorkloadError(
            "the row must be one of the trace",
            values=f"--life {row}, rows 0 to {n_rows - 1}",
            remedy="give a row that is there",
        )


def _write_files(
    result: ServingResult, out: Path | None, life: int | None, trace: Path, kept: Path | None
) -> None:
    from ..core.trace import write_chrome
    from .console import note
    from .replay_snapshot import write_kept

    if out is not None:
        _write_rows(out, result)
        note(f"a row per request: {out}")
    if life is not None:
        write_chrome(trace, result.request_trace(life))
        note(f"row {life}: {trace} (open it in ui.perfetto.dev)")
    if kept is not None:
        write_kept(kept, result)
        note(f"tiers at the end: {kept}")


def _write_rows(path: Path, result: Any) -> None:
    import pandas as pd

    from ..core.record import write_atomic

    table = pd.DataFrame(result.columns()).to_csv(index_label="row")
    write_atomic(path, table.encode())


def _report(name: str, result: Any, cpu_s: float, provenance: dict[str, str]) -> None:
    from .console import print_json_line, print_table

    found = result.summary()
    times = [
        {"ms": what} | {s: found[f"{what}_ms_{s}"] for s in ("mean", "p50", "p90", "p99")}
        for what in ("ttft", "tpot", "e2e", "queue")
    ]
    print_table(times, ["ms", "mean", "p50", "p90", "p99"], name)
    tiers = [
        {
            "tier": tier,
            "hit_rate": found["tier_hit_rate"][tier],
            "loaded_GB": found["loaded_bytes"][tier] / 1e9,
            "written_GB": found["written_bytes"][tier] / 1e9,
        }
        for tier in result.tier_names
    ]
    if tiers:
        print_table(tiers, ["tier", "hit_rate", "loaded_GB", "written_GB"], "tiers, of all prompts")
    facts = {
        "requests": found["n_requests"],
        "requests per s": found["throughput_rps"],
        "good share": ", ".join(f"{k} {v:.3f}".strip() for k, v in found["good_share"].items()),
        "GPU hit rate": found["gpu_hit_rate"],
        "utilisation": sum(found["utilisation"]) / len(found["utilisation"]),
        "preemptions": found["n_preemptions"],
        "in the system, mean": found["littles_law_n_mean"],
        "rate x time in it (Little)": found["littles_law_rate_x_time"],
        "simulated per CPU second": found["n_requests"] / max(cpu_s, 1e-9),
    }
    print_table([{"what": k, "value": v} for k, v in facts.items()], ["what", "value"])
    print_json_line({"command": "replay", "fleet": name, **found, "provenance": provenance})
