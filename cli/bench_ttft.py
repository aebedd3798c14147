"""`cachetune bench ttft`: measured speed-ups in four ledgers, and the balance on slower tiers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..calibration.probes import Shape
    from ..calibration.ttft import Measured
    from ..runtime.loaded_model import LoadedModel
    from .bench_parts import Parts

_Model = Annotated[str, typer.Option(help="Hugging Face folder, or a shape with random weights.")]
_Chunks = Annotated[int, typer.Option(min=2, help="Chunks in the prompt.")]
_ChunkTokens = Annotated[int, typer.Option(min=16, help="Tokens of a chunk.")]
_Ratio = Annotated[float, typer.Option(min=0, max=1, help="Share of a chunk that is recomputed.")]
_Repeats = Annotated[int, typer.Option(min=1, help="Interleaved repeats; 20 or more for a result.")]
_Group = Annotated[int, typer.Option(min=1, help="Layers per op.")]
_IoWorkers = Annotated[int, typer.Option(min=1, max=16, help="I/O streams of a tier.")]
_Piece = Annotated[int, typer.Option(min=16, help="Chunked prefill: most rows of a piece.")]
_Policies = Annotated[str, typer.Option(help="Policies beside full recompute, by comma.")]
_Tiers = Annotated[str, typer.Option(help="Of device, dram, file, file-cached, redis, by comma.")]
_Rhos = Annotated[str, typer.Option(help="Rate-limited tiers, by comma; empty for none.")]
_Parts = Annotated[str, typer.Option(help="Parts to measure now, by comma; all by default.")]
_Fresh = Annotated[bool, typer.Option("--fresh", help="Measure again what was measured before.")]
_Device = Annotated[str, typer.Option(help="cuda, cpu, or auto: cuda where there is one.")]
_Threads = Annotated[int, typer.Option(min=1, help="Threads of a compute op on a CPU.")]
_Out = Annotated[Path | None, typer.Option(help="The result; by default below results/.")]
_Seed = Annotated[int, typer.Option(min=0, help="Recorded with the result.")]

SUFFIX_TOKENS = 32
CURVE = "curve"
CURVE_RATIOS = (0.35, 0.6, 0.85, 1.0)
WHOLE_PROMPT = 1 << 20
HOT_PATH_MS = 2.0
COLD = {
    "device": "memory of the device itself: placed there before, nothing is moved on a hit",
    "dram": "pinned or plain memory of this machine",
    "file": "O_DIRECT; cold only as far as this system sees it: a virtual disk has a host's cache",
    "file-cached": "warm: read through this system's page cache, all of it in memory",
    "redis": "a server of this machine, through the loopback",
}
LEDGERS = (
    "policy", "tier", "ratio", "n", "ttft_ms", "ttft_ms_min", "ttft_ms_max", "lookup_ms", "path_ms",
    "prepared_ms", "break_even",
)  # fmt: skip
IDEALS = (
    "policy", "tier", "flops_skipped", "n_bytes", "ideal_ms", "of_ideal", "speedup",
    "ideal_speedup", "of_ideal_speedup", "path_speedup", "prepared_speedup",
)  # fmt: skip
BALANCE = (
    "rho", "plan", "ratio", "ttft_ms", "load_ms", "compute_ms", "bound_ms", "factor", "must",
    "overlap", "slowdown", "speedup", "allowed_speedup", "n",
)  # fmt: skip


@dataclass(frozen=True)
class _Run:
    """What every part needs."""

    loaded: LoadedModel
    device: str
    threads: int
    shape: Shape
    ratio: float
    policies: tuple[str, ...]
    repeats: int
    knobs: dict[str, int]
    tell: Any


def command(
    model: _Model = "llama-110m",
    chunks: _Chunks = 8,
    chunk_tokens: _ChunkTokens = 512,
    ratio: _Ratio = 0.15,
    repeats: _Repeats = 20,
    layer_group: _Group = 1,
    io_workers: _IoWorkers = 1,
    prefill_chunk: _Piece = WHOLE_PROMPT,
    policies: _Policies = "prefix_cache,full_reuse,cacheblend,epic,cachetune",
    tiers: _Tiers = "dram,file,file-cached",
    rhos: _Rhos = "0.1,0.7,4,25",
    parts: _Parts = "",
    fresh: _Fresh = False,
    device: _Device = "auto",
    threads: _Threads = 1,
    out: _Out = None,
    seed: _Seed = 0,
) -> None:
    """Measure TTFT of every policy against full recompute; slower tiers at their balanced ratio."""
    from ..calibration.calibrate import rho_tier
    from ..calibration.probes import Shape
    from ..core.record import check_writable
    from .bench_machine import load, pick_device, results_folder
    from .bench_parts import Parts
    from .bench_throughput import knobs_of
    from .console import progress_bar

    device = pick_device(device)
    out = out or results_folder(device) / "ttft.json"
    check_writable(out)
    limited = {rho_tier(float(r)): float(r) for r in rhos.split(",") if r.strip()}
    plain = [t.strip() for t in tiers.split(",") if t.strip()]
    _check_tiers(plain)
    settings = {
        "model": model, "chunks": chunks, "chunk_tokens": chunk_tokens, "ratio": ratio,
        "repeats": repeats, "layer_group": layer_group, "prefill_chunk": prefill_chunk,
        "policies": policies, "rhos": rhos, "device": device, "threads": threads, "seed": seed,
    }  # fmt: skip
    if io_workers > 1:  # what was measured with one is still what was measured
        settings["io_workers"] = io_workers
    names = [*plain, *([CURVE] if limited else []), *limited]
    work = Parts("ttft", settings, names, parts)
    loaded = load(model, device, seed)
    with progress_bar() as tell:
        run = _Run(
            loaded,
            device,
            threads,
            Shape(chunks, chunk_tokens, SUFFIX_TOKENS),
            ratio,
            tuple(p.strip() for p in policies.split(",") if p.strip()),
            repeats,
            knobs_of(prefill_chunk, layer_group, io_workers),
            tell,
        )
        for part in work.wanted:
            if part in plain:
                keep = partial(_keep, work, part, settings, loaded, out)
                work.measure(part, partial(_plain, run, part, seed, keep), fresh=fresh)
            elif part == CURVE:
                work.measure(part, lambda: _curves(run, limited.values(), seed), fresh=fresh)
            else:
                if work.kept(CURVE) is None:
                    work.measure(CURVE, lambda: _curves(run, limited.values(), seed), fresh=False)
                how = partial(_limited, run, work, part, limited[part], seed)
                work.measure(part, how, fresh=fresh)
    _finish(work, settings, loaded, out)


def _check_tiers(tiers: list[str]) -> None:
    from ..core.errors import CacheTuneError

    if unknown := [t for t in tiers if t not in COLD]:
        raise CacheTuneError(f"--tiers must be of {', '.join(COLD)}", values=", ".join(unknown))


def _keep(
    work: Parts, part: str, settings: dict[str, Any], loaded: LoadedModel, out: Path,
    found: dict[str, Any],
) -> None:  # fmt: skip
    """Write what there is of a part under way, which still counts as missing."""
    from ..core.record import write_json

    missing = [name for name in work.names if name == part or work.kept(name) is None]
    write_json(out, _result({**work.all(), part: found}, missing, settings, loaded))


def _plain(
    run: _Run, tier: str, seed: int, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """One tier as it is: all policies; what there is of it is kept after each repeat."""
    from dataclasses import asdict

    from ..calibration import ceilings as limits
    from ..calibration.ttft import ledgers, measure_tier, policy_plans
    from ..runtime.hot_path import hot_path
    from .bench_machine import provenance, runner, tier_of

    plans = policy_plans(run.ratio, run.shape.chunk_tokens, **run.knobs)
    path = hot_path(run.loaded.spec, plans["cachetune"])
    with tempfile.TemporaryDirectory(prefix="cachetune-") as folder, tier_of(tier) as config:
        found = limits.measure(
            run.device, Path(folder), dtype=run.loaded.spec.dtype, threads=run.threads
        )
        with runner(run.loaded, folder, [config], run.device, run.threads) as r:

            def told(measured: Measured) -> dict[str, Any]:
                return {
                    "provenance": provenance(seed, run.device),
                    "storage": COLD[tier],
                    "unbuffered": r.store.is_unbuffered(tier),
                    "hit_of_64_chunks": {**asdict(path), "must_ms": HOT_PATH_MS},
                    "ceilings": limits.as_json(found),
                    "peer_ms": measured.peer_ms,
                    "peer_trouble": measured.peer_trouble,
                    "baseline_ms": {n: measured.baseline_ms(n) for n in ("ttft_ms", "path_ms")},
                    "rows": ledgers(measured, plans, config, found),
                }

            measured = measure_tier(
                r, run.shape, run.ratio, tier, run.policies, run.repeats, run.device, run.tell,
                lambda so_far: keep(told(so_far)), **run.knobs,
            )  # fmt: skip
            return told(measured)


def _curves(run: _Run, rhos: Iterable[float], seed: int) -> dict[str, Any]:
    """Compute alone at several ratios, and the time to recompute a token."""
    from dataclasses import asdict
    from statistics import median

    from ..calibration.balance import SLOW_RHO, compute_curve
    from .bench_machine import provenance, runner, tier_of

    ratios = sorted({run.ratio, *CURVE_RATIOS})
    ways = [False, True] if min(rhos) < SLOW_RHO else [False]
    with (
        tempfile.TemporaryDirectory(prefix="cachetune-") as folder,
        tier_of("dram") as config,
        runner(run.loaded, folder, [config], run.device, run.threads) as r,
    ):
        found = [
            compute_curve(r, run.shape, ratios, way, "dram", run.repeats, run.tell, **run.knobs)
            for way in ways
        ]
    n_prompt = run.shape.n_chunks * run.shape.chunk_tokens + run.shape.suffix_tokens
    return {
        "provenance": provenance(seed, run.device),
        "recompute_s_per_token": median(found[0].compute_ms[-1]) / 1e3 / n_prompt,
        "curves": [asdict(curve) for curve in found],
    }


def _limited(run: _Run, work: Parts, tier: str, rho: float, seed: int) -> dict[str, Any]:
    """One rate-limited tier at its balanced ratio."""
    from statistics import median

    from ..calibration.balance import ComputeCurve, candidates, measure_balanced, summarise
    from ..runtime.tiers import TierConfig
    from .bench_machine import provenance, runner

    kept = work.kept(CURVE)
    assert kept is not None
    curves = [ComputeCurve.from_json(data) for data in kept["curves"]]
    spec = run.loaded.spec
    limit = spec.kv_bytes_per_token / (rho * kept["recompute_s_per_token"])
    best = min(curves, key=lambda c: c.balanced(limit)[1])
    ratio, _ = best.balanced(limit)
    plans = candidates(ratio, spec.n_layers, run.shape.chunk_tokens, best.load_exact, **run.knobs)
    config = TierConfig(tier, "dram", limit_bytes_per_s=limit)
    with (
        tempfile.TemporaryDirectory(prefix="cachetune-") as folder,
        runner(run.loaded, folder, [config], run.device, run.threads) as r,
    ):
        found = measure_balanced(r, run.shape, tier, plans, run.repeats, run.tell)
    slower = median(found[0].compute_ms) / best.at(ratio)
    return {
        "provenance": provenance(seed, run.device),
        "limit_bytes_per_s": limit,
        "load_exact": best.load_exact,
        "rows": summarise(found, curves, rho, limit, slower),
    }


def _result(
    found: dict[str, dict[str, Any]], missing: list[str], settings: dict[str, Any],
    loaded: LoadedModel,
) -> dict[str, Any]:  # fmt: skip
    """As it is written."""
    n_prompt = settings["chunks"] * settings["chunk_tokens"] + SUFFIX_TOKENS
    whole = settings["prefill_chunk"] >= n_prompt
    return {
        "model": loaded.spec.model_dump(mode="json"),
        "n_params": loaded.spec.n_params,
        "n_prompt": n_prompt,
        "prefill_chunk_tokens": "whole prompt in one piece" if whole else settings["prefill_chunk"],
        "settings": settings,
        "parts": found,
        "missing": missing,
    }


def _finish(work: Parts, settings: dict[str, Any], loaded: LoadedModel, out: Path) -> None:
    """Write and print all parts that there are."""
    from ..core.record import write_json
    from .console import note, print_json_line, print_table

    found = work.all()
    result = _result(found, work.missing(), settings, loaded)
    write_json(out, result)
    n_prompt = result["n_prompt"]
    rows = [row for part in found.values() if "peer_ms" in part for row in part["rows"]]
    balance = [
        row for name, part in found.items() if name.startswith("rho") for row in part["rows"]
    ]
    piece = result["prefill_chunk_tokens"]
    if rows:
        print_table(_peers(found), ("tier", "baseline", "n", "ms"), "full prefill by others")
        title = f"TTFT, {n_prompt} tokens, prefill: {piece}"
        print_table(rows, LEDGERS, f"{title}; ledgers 1 to 4")
        print_table(rows, IDEALS, "the ideal of each row, from this run's limits")
    if balance:
        print_table(balance, BALANCE, "rate-limited tiers at their balanced ratio")
    for tier, part in found.items():
        for name, why in part.get("peer_trouble", {}).items():
            note(f"{tier}: {name} did not run: {why}")
        if (path := part.get("hit_of_64_chunks")) is not None:
            text = f"{path['median_ms']:.2f} ms, at most {path['must_ms']:g} wanted"
            note(f"{tier}: lookup to first op of a hit of {path['n_chunks']} chunks: {text}")
    if result["missing"]:
        note(f"not measured yet: {', '.join(result['missing'])}")
    note(f"result: {out}")
    best = {f"{r['tier']}/{r['policy']}": round(r["speedup"], 3) for r in rows if r["ratio"] < 1}
    balance.sort(key=lambda row: (row["n"], -row["factor"]))  # the best of the most measured last
    factors = {f"rho{row['rho']:g}": row["factor"] for row in balance}
    print_json_line({"command": "bench ttft", "speedup": best, "over_bound": factors})


def _peers(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    from statistics import median

    return [
        {"tier": tier, "baseline": name, "n": len(times), "ms": median(times)}
        for tier, part in found.items()
        for name, times in part.get("peer_ms", {}).items()
    ]
