"""`cachetune bench throughput`: requests per second at saturation, per policy, in four ledgers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..calibration.ledgers import Preparation
    from ..calibration.throughput import Served

_Model = Annotated[str, typer.Option(help="Hugging Face folder, or a shape with random weights.")]
_Requests = Annotated[int, typer.Option(min=1, help="Requests, all there at the start.")]
_Contents = Annotated[int, typer.Option(min=1, help="Different chunks in the library.")]
_Chunks = Annotated[int, typer.Option(min=1, help="Chunks in a prompt.")]
_ChunkTokens = Annotated[int, typer.Option(min=16, help="Tokens of a chunk.")]
_Output = Annotated[int, typer.Option(min=1, help="Tokens of every output.")]
_Ratios = Annotated[str, typer.Option(help="Recompute ratios, by comma.")]
_Policies = Annotated[str, typer.Option(help="Policies beside full recompute, by comma.")]
_Tier = Annotated[
    str, typer.Option(help="Where the chunks lie: device, dram, file, file-cached or redis.")
]
_Repeats = Annotated[int, typer.Option(min=1, help="Interleaved repeats; 20 or more for a result.")]
_IoWorkers = Annotated[int, typer.Option(min=1, max=16, help="I/O streams of a tier.")]
_Piece = Annotated[int, typer.Option(min=16, help="Chunked prefill: most rows of a piece.")]
_Group = Annotated[int, typer.Option(min=1, help="Layers per op.")]
_Device = Annotated[str, typer.Option(help="cuda, cpu, or auto: cuda where there is one.")]
_Threads = Annotated[int, typer.Option(min=1, help="Threads of a compute op on a CPU.")]
_Out = Annotated[Path | None, typer.Option(help="The result; by default below results/.")]
_Seed = Annotated[int, typer.Option(min=0, help="Root of every random stream.")]

SUFFIX_TOKENS = 32
HF_REQUESTS = 2
LEDGERS = (
    "plan", "n", "rps", "rps_min", "rps_max", "path_rps", "prepared_rps", "break_even_requests",
    "times_baseline",
)  # fmt: skip
IDEALS = (
    "plan", "flops_skipped", "n_bytes", "ideal_rps", "of_ideal", "limit_rps", "of_limit",
    "n_decode_steps",
)  # fmt: skip


def command(
    model: _Model = "llama-110m",
    requests: _Requests = 8,
    contents: _Contents = 12,
    chunks: _Chunks = 8,
    chunk_tokens: _ChunkTokens = 128,
    output_tokens: _Output = 4,
    ratios: _Ratios = "0.15,0.05",
    policies: _Policies = "prefix_cache,full_reuse,cacheblend,epic,cachetune",
    tier: _Tier = "dram",
    repeats: _Repeats = 20,
    prefill_chunk: _Piece = 8192,
    layer_group: _Group = 2,
    io_workers: _IoWorkers = 1,
    device: _Device = "auto",
    threads: _Threads = 1,
    out: _Out = None,
    seed: _Seed = 0,
) -> None:
    """Serve a burst of requests with short outputs under every policy; continuous batching.
    The result is written after each repeat: a run that is ended leaves what it has."""
    from ..calibration import ceilings as limits
    from ..calibration.throughput import hf_seconds, ledgers, plans_at, serve_all
    from ..core.generators import rag_workload
    from ..core.record import check_writable, write_json
    from .bench_machine import load, pick_device, provenance, results_folder, runner, tier_of
    from .console import note, progress_bar

    device, shares = pick_device(device), _shares(ratios)
    out = out or results_folder(device) / "throughput.json"
    check_writable(out)
    loaded = load(model, device, seed)
    workload = rag_workload(
        "burst", seed, n_requests=requests, n_contents=contents, chunk_tokens=chunk_tokens,
        chunks_per_request=chunks, suffix_tokens=SUFFIX_TOKENS, output_tokens=output_tokens,
        vocab_size=loaded.spec.vocab_size,
    )  # fmt: skip
    knobs = knobs_of(prefill_chunk, layer_group, io_workers)
    plans = plans_at(shares, policies.split(","), chunk_tokens, **knobs)
    with (
        tempfile.TemporaryDirectory(prefix="cachetune-") as folder,
        tier_of(tier) as config,
        progress_bar() as tell,
    ):
        found = limits.measure(device, Path(folder), dtype=loaded.spec.dtype, threads=threads)
        result: dict[str, Any] = {
            "provenance": provenance(seed, device),
            "model": loaded.spec.model_dump(mode="json"),
            "n_params": loaded.spec.n_params,
            "tier": tier,
            "n_requests": requests,
            "n_prompt": chunks * chunk_tokens + SUFFIX_TOKENS,
            "output_tokens": output_tokens,
            "prefill_chunk_tokens": prefill_chunk,
            "io_workers": io_workers,
            "max_num_seqs": next(iter(plans.values())).max_num_seqs,
            "repeats": repeats,
            "ceilings": limits.as_json(found),
        }

        def keep(served: list[Served], preparations: dict[str, Preparation]) -> None:
            result["rows"] = ledgers(served, preparations, workload, config, found)
            write_json(out, result)

        with runner(loaded, folder, [config], device, threads) as r:
            result["hf_generate_s"] = hf_seconds(r, workload, HF_REQUESTS)
            serve_all(r, workload, plans, tier, repeats, tell, keep)
    _print(result)
    note(f"result: {out}")


def knobs_of(prefill_chunk: int, layer_group: int, io_workers: int) -> dict[str, int]:
    """Of every plan."""
    return {
        "prefill_chunk_tokens": prefill_chunk,
        "layer_group": layer_group,
        "n_io_workers": io_workers,
    }


def _print(result: dict[str, Any]) -> None:
    from .console import note, print_json_line, print_table

    rows, hf_s = result["rows"], result["hf_generate_s"]
    size = f"{result['n_prompt']} + {result['output_tokens']} tokens"
    title = f"{result['n_requests']} requests of {size}, prefill {result['prefill_chunk_tokens']}"
    print_table(rows, LEDGERS, f"{title}; ledgers 1 to 4")
    print_table(rows, IDEALS, "the ideal of each row, from this run's limits")
    hf_rps = len(hf_s) / sum(hf_s) if hf_s else None
    if hf_rps is not None:
        note(f"Hugging Face generate, one request at a time: {hf_rps:.4g} requests/s")
    print_json_line(
        {
            "command": "bench throughput",
            "rps": {row["plan"]: row["rps"] for row in rows},
            "hf_rps": hf_rps,
            "of_ideal": {row["plan"]: row["of_ideal"] for row in rows},
        }
    )


def _shares(ratios: str) -> list[float]:
    from ..core.errors import CacheTuneError

    try:
        found = [float(part) for part in ratios.split(",")]
    except ValueError:
        found = [-1.0]
    if any(not 0 <= r <= 1 for r in found):
        raise CacheTuneError("--ratios must be numbers from 0 to 1, by comma", values=ratios)
    return found
