"""Physical forms of GPU kernels: few coefficients, each a share of a data-sheet peak or a time.

A form gives seconds; `features` is what the residual (residual.py) may look at. Sizes are arrays of
equal length, one element per kernel call; K and V are bfloat16, in `decode.fp8` fp8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .gpu_sheet import GpuSheet

Array = NDArray[np.float64]
Sizes = Mapping[str, Array]

TILE = 128
"""Rows of an output tile: what one thread block usually computes."""
KV_BYTES = 2
MATMUL_TILES = ((64, 64), (64, 128), (64, 256), (128, 64), (128, 128), (128, 256), (256, 128))


class Form(NamedTuple):
    """One kind of kernel."""

    sizes: tuple[str, ...]
    coefficients: dict[str, tuple[str, float]]
    """Name -> (unit, where a fit begins)."""
    seconds: Callable[[Sizes, Mapping[str, float], float, GpuSheet], Array]
    """(sizes, coefficients, peak flops per second, sheet) -> seconds."""
    features: Callable[[Sizes, GpuSheet], dict[str, Array]]


def _together(a: Array, b: Array, sharpness: float) -> Array:
    """Two resources used at once: from their sum (0) to the larger of them (large)."""
    power = 1.0 + sharpness
    most = np.maximum(a, b)
    return np.asarray(most * ((a / most) ** power + (b / most) ** power) ** (1.0 / power))


def _log(x: Array) -> Array:
    return np.asarray(np.log2(x))


def _waves(blocks: Array, n_sms: int) -> Array:
    """Waves of thread blocks over the SMs, whole ones over used: 1 is a full machine."""
    waves = blocks / n_sms
    return np.asarray(np.where(waves > 1, np.ceil(waves) / waves, 2.0 - waves))


def _filled(x: Array, unit: int) -> Array:
    return np.asarray(x / (np.ceil(x / unit) * unit))


def _gemm_s(s: Sizes, c: Mapping[str, float], peak: float, sheet: GpuSheet) -> Array:
    m, n, k = s["m"], s["n"], s["k"]
    waves = np.ceil(m / TILE) * np.ceil(n / TILE) / sheet.n_sms
    whole = np.where(waves > 1, np.ceil(waves) / waves, 1.0)
    compute = 2 * m * n * k / (c["matmul_efficiency"] * peak) * whole
    memory = _gemm_bytes(s) / (c["memory_efficiency"] * sheet.memory_bytes_per_s)
    busy = _together(compute, memory, c["sharpness"])
    return np.asarray(c["launch_s"] + c["k_s"] * k + busy)


def _gemm_bytes(s: Sizes) -> Array:
    m, n, k, operand = s["m"], s["n"], s["k"], s["operand_bytes"]
    return np.asarray(operand * (m * k + k * n) + 2 * m * n)


def _gemm_features(s: Sizes, sheet: GpuSheet) -> dict[str, Array]:
    m, n, k = s["m"], s["n"], s["k"]
    n_bytes = _gemm_bytes(s)
    found = {
        "m": _log(m),
        "n": _log(n),
        "k": _log(k),
        "mn": _log(m * n),
        "mk": _log(m * k),
        "nk": _log(n * k),
        "mnk": _log(m * n * k),
        "k_per_mn": _log(k / (m * n)),
        "n_per_k": _log(n / k),
        "m_per_n": _log(m / n),
        "m_per_k": _log(m / k),
        "bytes": _log(n_bytes),
        "intensity": _log(m * n * k / n_bytes),
        "m_of_16": _filled(m, 16),
        "m_of_64": _filled(m, 64),
        "m_of_128": _filled(m, 128),
        "m_of_256": _filled(m, 256),
        "n_of_128": _filled(n, 128),
        "m_aligned": np.asarray(m % 8 == 0, dtype=float),
    }
    for rows, columns in MATMUL_TILES:
        blocks = np.ceil(m / rows) * np.ceil(n / columns)
        found[f"waves_{rows}x{columns}"] = _waves(blocks, sheet.n_sms)
    found["blocks"] = _log(np.ceil(m / TILE) * np.ceil(n / TILE) / sheet.n_sms)
    return found


def _pairs(s: Sizes) -> Array:
    """Visible (query, key) pairs of one head of one sequence."""
    q = s["n_query"]
    return np.asarray(q * s["n_cached"] + q * (q + 1) / 2)


def _prefill_blocks(s: Sizes) -> Array:
    return np.asarray(s["batch"] * s["n_heads"] * np.ceil(s["n_query"] / TILE))


def _prefill_bytes(s: Sizes) -> Array:
    keys = s["n_cached"] + s["n_query"]
    rows = s["n_heads"] * s["n_query"] + s["n_kv_heads"] * keys
    return np.asarray(2 * KV_BYTES * s["batch"] * s["head_dim"] * rows)


def _prefill_s(s: Sizes, c: Mapping[str, float], peak: float, sheet: GpuSheet) -> Array:
    flops = 4 * s["head_dim"] * s["batch"] * s["n_heads"] * _pairs(s)
    idle = np.maximum(1.0, sheet.n_sms / _prefill_blocks(s))
    compute = flops / (c["matmul_efficiency"] * peak) * idle
    memory = _prefill_bytes(s) / (c["memory_efficiency"] * sheet.memory_bytes_per_s)
    keys = s["n_cached"] + s["n_query"]
    busy = _together(compute, memory, c["sharpness"])
    return np.asarray(c["launch_s"] + c["key_s"] * keys + busy)


def _prefill_features(s: Sizes, sheet: GpuSheet) -> dict[str, Array]:
    batch, q, heads, kv_heads = s["batch"], s["n_query"], s["n_heads"], s["n_kv_heads"]
    keys = s["n_cached"] + q
    flops = batch * heads * s["head_dim"] * _pairs(s)
    n_bytes = _prefill_bytes(s)
    group = heads / kv_heads
    blocks = _prefill_blocks(s)
    return {
        "batch": _log(batch),
        "n_query": _log(q),
        "n_cached": _log(s["n_cached"] + 1),
        "keys": _log(keys),
        "keys_per_query": _log(keys / q),
        "n_heads": _log(heads),
        "n_kv_heads": _log(kv_heads),
        "head_dim": s["head_dim"],
        "group": _log(group),
        "blocks": _log(blocks / sheet.n_sms),
        "waves": _waves(blocks, sheet.n_sms),
        "group_blocks": _log(batch * kv_heads * np.ceil(group * q / TILE) / sheet.n_sms),
        "batch_heads": _log(batch * heads),
        "batch_kv_heads": _log(batch * kv_heads),
        "rows": _log(batch * heads * q),
        "kv_rows": _log(batch * kv_heads * keys),
        "group_rows": _log(group * q),
        "flops": _log(flops),
        "bytes": _log(n_bytes),
        "intensity": _log(flops / n_bytes),
        "query_of_64": _filled(q, 64),
        "query_of_128": _filled(q, 128),
    }


def _decode_s(
    s: Sizes, c: Mapping[str, float], peak: float, sheet: GpuSheet, element_bytes: int = KV_BYTES
) -> Array:
    context = s["batch"] * s["context"]
    kv_bytes = 2 * element_bytes * s["head_dim"] * s["n_kv_heads"] * context
    query_bytes = 2 * KV_BYTES * s["head_dim"] * s["n_heads"] * s["batch"]
    bandwidth = sheet.memory_bytes_per_s
    return np.asarray(
        c["launch_s"]
        + c["merge_s"] * _log(s["context"] + 1)
        + kv_bytes / (c["memory_efficiency"] * bandwidth)
        + query_bytes / (c["query_efficiency"] * bandwidth)
    )


def _decode_features(s: Sizes, sheet: GpuSheet) -> dict[str, Array]:
    batch, context, heads, kv_heads = s["batch"], s["context"], s["n_heads"], s["n_kv_heads"]
    blocks = batch * kv_heads
    group = heads / kv_heads
    return {
        "batch": _log(batch),
        "context": _log(context),
        "n_heads": _log(heads),
        "n_kv_heads": _log(kv_heads),
        "head_dim": s["head_dim"],
        "group": _log(group),
        "group_of_64": _filled(group, 64),
        "blocks": _log(blocks / sheet.n_sms),
        "waves": _waves(blocks, sheet.n_sms),
        "split_blocks": _log(blocks * np.ceil(context / TILE) / sheet.n_sms),
        "batch_heads": _log(batch * heads),
        "total_context": _log(batch * context),
        "kv_rows": _log(batch * context * kv_heads),
        "kv_bytes": _log(batch * context * kv_heads * s["head_dim"]),
        "flops": _log(batch * context * heads * s["head_dim"]),
        "query_bytes": _log(batch * heads * s["head_dim"]),
        "sequence_rows": _log(context * kv_heads),
    }


def _elementwise_s(s: Sizes, c: Mapping[str, float], peak: float, sheet: GpuSheet) -> Array:
    moved = s["n_bytes"] / (c["memory_efficiency"] * sheet.memory_bytes_per_s)
    return np.asarray(c["launch_s"] + moved)


_PREFILL = Form(
    ("batch", "n_query", "n_cached", "n_heads", "n_kv_heads", "head_dim"),
    {
        "launch_s": ("s", 8e-6),
        "matmul_efficiency": ("share of peak", 0.6),
        "memory_efficiency": ("share of peak", 0.7),
        "sharpness": ("exponent", 0.5),
        "key_s": ("s/key", 3e-9),
    },
    _prefill_s,
    _prefill_features,
)

_GEMM = Form(
    ("m", "n", "k", "operand_bytes"),
    {
        "launch_s": ("s", 3e-6),
        "matmul_efficiency": ("share of peak", 0.7),
        "memory_efficiency": ("share of peak", 0.8),
        "sharpness": ("exponent", 1.0),
        "k_s": ("s/column", 2e-10),
    },
    _gemm_s,
    _gemm_features,
)

_DECODE = Form(
    ("batch", "context", "n_heads", "n_kv_heads", "head_dim"),
    {
        "launch_s": ("s", 8e-6),
        "merge_s": ("s/doubling", 1e-7),
        "memory_efficiency": ("share of peak", 0.8),
        "query_efficiency": ("share of peak", 0.1),
    },
    _decode_s,
    _decode_features,
)

FORMS: dict[str, Form] = {
    "gemm.bfloat16": _GEMM,
    "gemm.fp8": _GEMM,
    "prefill": _PREFILL,
    "prefix": _PREFILL,
    "decode": _DECODE,
    "decode.fp8": _DECODE._replace(seconds=partial(_decode_s, element_bytes=1)),
    "elementwise": Form(
        ("n_bytes",),
        {"launch_s": ("s", 2e-6), "memory_efficiency": ("share of peak", 0.7)},
        _elementwise_s,
        lambda s, sheet: {"bytes": _log(s["n_bytes"])},
    ),
}
"""By kind. `prefill` starts at position 0; `prefix` is prefill behind cached tokens."""


def operand(kind: str) -> tuple[str, int]:
    """(dtype, bytes) of the matmul operands of a kind."""
    return ("fp8", 1) if kind == "gemm.fp8" else ("bfloat16", 2)
