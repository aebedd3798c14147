"""The silicon sample: measured TTFT and TPOT of engines at fixed lengths and concurrency, on H100.

Rows are those of AIConfigurator's sample (ai-dynamo/aiconfigurator, Apache-2.0). Step times come
from `ModelCost`, the run from `ClosedBatch`. One scalar of host overhead per step is fitted per
engine on the *other* models, or, for an engine with one model only, on the other tensor-parallel
degrees.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import WorkloadError
from ..core.model_spec import ModelSpec
from ..simulator.kernel_cost import KernelCost
from ..simulator.model_cost import ModelCost
from .closed_batch import ClosedBatch, bisect

MODELS = {
    "Llama-3.1-8B": ("llama", 32, 4096, 14336, 32, 8, 128, 128256),
    "70B": ("llama", 80, 8192, 28672, 64, 8, 128, 128256),
    "Qwen3-32B": ("qwen3", 64, 5120, 25600, 64, 8, 128, 151936),
}
"""Family, layers, hidden, intermediate, heads, KV heads, head size, vocabulary, by part of name."""

BOUNDS = {"ttft": 0.20, "tpot": 0.08, "ttft_with_length": None}
"""Largest median |error| asked for, set before measuring. `ttft_with_length` takes a second fitted
scalar, so it answers no bound."""

REQUESTS_PER_USER = 10
"""Length of a run, as load tools suggest it; the sample does not say."""
LENGTHS = (2, 3, 5, 8, 10, 15, 20, 30)
PREFILL_ALONE = ("sglang",)
"""Engines whose steps hold prompts or decodes, not both, unless told otherwise."""

BUDGET_TOKENS = 1500
"""A step holds this, one prompt and a token for each user. The sample does not say; this is how the
tool that it comes from sets engines up (ai-dynamo/aiconfigurator, generator/rule_plugin/benchmark:
max_num_tokens)."""
FP8_KV = ("trtllm",)
"""Engines that keep K and V in fp8 when weights are. TensorRT-LLM takes the type of KV from the
checkpoint, and NVIDIA's fp8 checkpoints name fp8; with bfloat16 the sample's largest runs on one
GPU (Qwen3-32B, 128 users of 2,560 tokens: 84 GB beside 33 GB of weights) could not have run as
they did, nobody waiting for memory."""
GPU_BYTES = 80e9
KV_SHARE = 0.9
"""Share of the GPU's memory that engines use by default; what weights leave of it holds KV."""
LARGEST_OVERHEAD_S = 12e-3
FIT_STEPS = 7  # bisections, to 0.1 ms
COLUMNS = ("backend", "backend_version", "model_path", "system", "precision", "mode", "isl", "osl",
           "gemm_quant_mode", "tp_size", "silicon_data_source", "silicon_ttft_ms",
           "silicon_tpot_ms")  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One measured row. Lengths in tokens, times in seconds."""

    engine: str
    model: str
    dtype: str
    tp: int
    n_prompt: int
    n_output: int
    concurrency: int
    ttft_s: float
    tpot_s: float


def read_points(path: str | Path) -> list[Point]:
    """The dense H100 rows of the sample: aggregated serving, one pipeline stage.

    Raises:
        WorkloadError: unreadable, a column or a number is missing (which line), or no such row.
    """
    try:
        with open(path, newline="", encoding="utf-8") as f:
            rows = list(csv.DictReader(f))
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        why = getattr(e, "strerror", None) or str(e)
        raise WorkloadError(
            "the sample must be a readable CSV file",
            values=f"{path}: {why}",
            remedy="check the path, copy it again",
        ) from None
    missing = [c for c in COLUMNS if not rows or c not in rows[0]]
    if missing:
        raise WorkloadError(f"{path} must have the column {missing[0]}", remedy="check the file")
    points = []
    for number, row in enumerate(rows, 2):
        short = [c for c in COLUMNS if row[c] is None]
        if short:
            raise WorkloadError(
                f"{path} line {number} must have the field {short[0]}",
                remedy="the file may be cut short; copy it again",
            )
        model = next((m for m in MODELS if m in row["model_path"]), None)
        if row["system"] != "h100_sxm" or row["mode"] != "agg" or model is None:
            continue
        said = re.search(r"silicon_concurrency=(\d+)", row["silicon_data_source"])
        try:
            point = Point(
                engine=row["backend"],
                model=model,
                dtype="fp8" if "fp8" in (row["precision"], row["gemm_quant_mode"]) else "bfloat16",
                tp=int(row["tp_size"]),
                n_prompt=int(row["isl"]),
                n_output=int(row["osl"]),
                concurrency=int(said[1]) if said else int(row["batch_size"]),
                ttft_s=float(row["silicon_ttft_ms"]) / 1e3,
                tpot_s=float(row["silicon_tpot_ms"]) / 1e3,
            )
            if min(point.tp, point.n_prompt, point.n_output, point.concurrency) < 1:
                raise ValueError("tp_size, isl, osl or users below 1")
        except (KeyError, TypeError, ValueError) as e:
            raise WorkloadError(
                f"{path} line {number} must hold numbers", values=str(e), remedy="correct the line"
            ) from None
        if 0 < point.ttft_s < math.inf and 0 < point.tpot_s < math.inf:
            points.append(point)
    if not points:
        raise WorkloadError(f"{path} must hold dense H100 rows", values="none")
    return points


@cache
def predict(
    point: Point, overhead_s: float, per_user: int = REQUESTS_PER_USER
) -> tuple[float, float]:
    """(mean TTFT, mean TPOT) in seconds of a run of `per_user` requests for each user."""
    return _batch(point).run(per_user * point.concurrency, overhead_s)


def validate(path: str | Path) -> list[dict[str, Any]]:
    """One row per measured point with its prediction; what was fitted saw none of its group."""
    points = read_points(path)
    rows: list[dict[str, Any]] = []
    for engine in sorted({p.engine for p in points}):
        of_engine = [p for p in points if p.engine == engine]
        by_model = len({p.model for p in of_engine}) > 1
        groups = sorted({_group(p, by_model) for p in of_engine})
        for group in groups:
            others = [p for p in of_engine if _group(p, by_model) != group]
            overhead_s = fit_overhead_s(others) if others else 0.0
            length = fit_length(others, overhead_s) if others else REQUESTS_PER_USER
            fitted_on = ", ".join(g for g in groups if g != group) or "nothing"
            for p in of_engine:
                if _group(p, by_model) == group:
                    ttft_s, tpot_s = predict(p, overhead_s)
                    rows.append(
                        {
                            **p.__dict__,
                            "predicted_ttft_s": ttft_s,
                            "predicted_tpot_s": tpot_s,
                            "ttft_error": ttft_s / p.ttft_s - 1,
                            "tpot_error": tpot_s / p.tpot_s - 1,
                            "ttft_with_length_error": predict(p, overhead_s, length)[0] / p.ttft_s
                            - 1,
                            "overhead_ms": overhead_s * 1e3,
                            "per_user": length,
                            "fitted_on": fitted_on,
                        }
                    )
    return rows


def fit_overhead_s(points: Sequence[Point]) -> float:
    """Seconds per step that bring the median signed error of TPOT to zero, never below zero."""

    def error(overhead_s: float) -> float:
        return float(np.median([predict(p, overhead_s)[1] / p.tpot_s - 1 for p in points]))

    return bisect(error, 0.0, LARGEST_OVERHEAD_S, FIT_STEPS)


def fit_length(points: Sequence[Point], overhead_s: float) -> int:
    """Requests per user with the smallest median |error| of TTFT: a second scalar, kept apart."""

    def error(length: int) -> float:
        errors = [abs(predict(p, overhead_s, length)[0] / p.ttft_s - 1) for p in points]
        return float(np.median(errors))

    return min(LENGTHS, key=error)


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Median |error| of TTFT and TPOT by engine and model, and over all rows."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["engine"], row["model"]), []).append(row)
    groups["all", "all"] = list(rows)
    return [
        {
            "engine": engine,
            "model": model,
            "rows": len(of),
            "metric": metric,
            "median_error": (error := float(np.median([abs(r[f"{metric}_error"]) for r in of]))),
            "signed_median_error": float(np.median([r[f"{metric}_error"] for r in of])),
            "bound": bound,
            "met": None if bound is None else error <= bound,
            "overhead_ms": float(np.mean([r["overhead_ms"] for r in of])),
            "per_user": float(np.mean([r["per_user"] for r in of])),
            "fitted_on": of[0]["fitted_on"]
            if len({r["fitted_on"] for r in of}) == 1
            else "the other groups of the engine",
        }
        for (engine, model), of in groups.items()
        for metric, bound in BOUNDS.items()
    ]


def _group(point: Point, by_model: bool) -> str:
    return point.model if by_model else f"{point.model} tp{point.tp}"


@cache
def _batch(point: Point) -> ClosedBatch:
    family, layers, hidden, inter, heads, kv_heads, head_dim, vocab = MODELS[point.model]
    spec = ModelSpec.model_validate(
        {"name": point.model, "family": family, "n_layers": layers, "hidden_size": hidden,
         "intermediate_size": inter, "n_heads": heads, "n_kv_heads": kv_heads,
         "head_dim": head_dim, "vocab_size": vocab, "max_position": 131072}
    )  # fmt: skip
    weight_bytes = spec.n_params * (1 if point.dtype == "fp8" else 2)
    kv_bytes = KV_SHARE * GPU_BYTES * point.tp - weight_bytes
    kv_dtype = "fp8" if point.dtype == "fp8" and point.engine in FP8_KV else "bfloat16"
    token_bytes = spec.kv_bytes_per_token // (2 if kv_dtype == "fp8" else 1)
    full = point.n_prompt + point.n_output
    return ClosedBatch(
        cost=_cost(spec, point.tp, point.dtype, kv_dtype),
        n_prompt=point.n_prompt,
        n_output=point.n_output,
        n_users=point.concurrency,
        capacity=max(int(kv_bytes / (full * token_bytes)), 1),
        token_budget=point.concurrency + point.n_prompt + BUDGET_TOKENS,
        mixed=point.engine not in PREFILL_ALONE,
    )


@cache
def _cost(spec: ModelSpec, tp: int, dtype: str, kv_dtype: str) -> ModelCost:
    matrices = None if dtype == "bfloat16" else dtype
    return ModelCost(spec, KernelCost.load("H100-SXM"), tp, matrices, kv_dtype)
