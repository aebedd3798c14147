"""`cachetune bench ttft`: measured speed-ups and overlap, every row with its spread."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..calibration.ttft import Overlap, Row

_Model = Annotated[str, typer.Option(help="Hugging Face folder, or a shape with random weights.")]
_Chunks = Annotated[int, typer.Option(min=2, help="Chunks in the prompt.")]
_ChunkTokens = Annotated[int, typer.Option(min=16, help="Tokens of a chunk.")]
_Ratio = Annotated[float, typer.Option(min=0, max=1, help="Share of a chunk that is recomputed.")]
_Repeats = Annotated[int, typer.Option(min=3, help="Interleaved repeats.")]
_Group = Annotated[int, typer.Option(min=1, help="Layers per op.")]
_Out = Annotated[Path, typer.Option(help="Where the result is written.")]
_Seed = Annotated[int, typer.Option(min=0, help="Recorded with the result.")]

OVERLAP_RHOS = (0.7, 4.0)


def command(
    model: _Model = "llama-100m",
    chunks: _Chunks = 8,
    chunk_tokens: _ChunkTokens = 512,
    ratio: _Ratio = 0.15,
    repeats: _Repeats = 3,
    layer_group: _Group = 1,
    out: _Out = Path("results/cpu/ttft.json"),
    seed: _Seed = 0,
) -> None:
    """Measure TTFT of every policy against full recompute, and the overlap of load and compute."""
    from ..calibration.calibrate import Settings, recompute_s_per_token, rho_tier, tier_configs
    from ..calibration.probes import Library, Shape
    from ..calibration.ttft import overlaps, speedups
    from ..core.record import check_writable, write_atomic
    from ..runtime.loaded_model import load_model
    from ..runtime.machine import provenance_here
    from ..runtime.runner import Runner
    from .console import note, print_json_line, progress_bar

    check_writable(out)
    loaded = load_model(model)
    shape = Shape(chunks, chunk_tokens, 32)
    knobs = {"layer_group": layer_group, "prefill_chunk_tokens": 1 << 20}
    with tempfile.TemporaryDirectory(prefix="cachetune-") as folder, progress_bar() as tell:
        plain = tier_configs(loaded.spec, 1.0, ())
        with Runner(loaded, folder, plain) as runner:
            tiers: dict[str, float | None] = {c.name: None for c in plain}
            rows, hf_ms = speedups(runner, shape, ratio, tiers, repeats, tell, **knobs)
            settings = Settings(max_tokens=chunks * chunk_tokens)
            token_s = recompute_s_per_token(runner, Library(loaded.spec, 0), settings)
        limited = tier_configs(loaded.spec, token_s, OVERLAP_RHOS)
        with Runner(loaded, folder, limited) as runner:
            named: dict[str, float | None] = {rho_tier(rho): rho for rho in OVERLAP_RHOS}
            found = overlaps(runner, shape, named, (ratio, 0.5), repeats, **knobs)
    result = {
        "provenance": provenance_here(seed).model_dump(mode="json"),
        "model": loaded.spec.model_dump(mode="json"),
        "n_params": loaded.spec.n_params,
        "n_prompt": chunks * chunk_tokens + 32,
        "prefill_chunk_tokens": "whole prompt in one piece",
        "hf_sdpa_ms": hf_ms,
        "rows": _rows(rows, hf_ms),
        "overlap": _overlaps(found),
    }
    write_atomic(out, (json.dumps(result, indent=1) + "\n").encode())
    _print(result)
    note(f"result: {out}")
    print_json_line(
        {"command": "bench ttft", "best_speedup": max(r["speedup"] for r in result["rows"])}
    )


def _rows(rows: list[Row], hf_ms: list[float]) -> list[dict[str, Any]]:
    """Rows with the speed-up over the fastest baseline of the run."""
    from dataclasses import asdict
    from statistics import median

    baseline = min(median(hf_ms), median(rows[0].ttft_ms))
    return [
        {
            **asdict(row),
            "ttft_ms_median": median(row.ttft_ms),
            "ttft_ms_min": min(row.ttft_ms),
            "ttft_ms_max": max(row.ttft_ms),
            "speedup": baseline / median(row.ttft_ms),
        }
        for row in rows
    ]


def _overlaps(found: list[Overlap]) -> list[dict[str, Any]]:
    from dataclasses import asdict
    from statistics import median

    return [
        {
            **asdict(o),
            "whole_ms_median": median(o.whole_ms),
            "load_ms_median": median(o.load_ms),
            "compute_ms_median": median(o.compute_ms),
            "factor": o.factor,
        }
        for o in found
    ]


def _print(result: dict[str, Any]) -> None:
    from statistics import median

    from .console import print_table

    hf = {"policy": "hugging face sdpa", "ttft_ms_median": median(result["hf_sdpa_ms"])}
    hf |= {"ttft_ms_min": min(result["hf_sdpa_ms"]), "ttft_ms_max": max(result["hf_sdpa_ms"])}
    columns = ["policy", "tier", "ratio", "ttft_ms_median", "ttft_ms_min", "ttft_ms_max", "speedup"]
    print_table([hf, *result["rows"]], columns, f"TTFT, {result['n_prompt']} tokens")
    columns = ["tier", "rho", "ratio", "whole_ms_median", "load_ms_median", "compute_ms_median"]
    print_table(result["overlap"], [*columns, "factor"], "overlap: whole over max(load, compute)")
