"""A `HardwareProfile` for a GPU that nobody here has: the simulator's features fitted to kernels.

So that published systems run through the project's own lowering and executor. Prefill coefficients
are those that follow `ModelCost` best on a grid of rows and cached tokens; loads have the stated
link, restoring reads and writes memory once.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np

from ..core.hardware import Coefficient, Device, FitReport, HardwareProfile, Provenance, Tier
from ..core.ops import COMPUTE, Op
from ..simulator.cost import COEFFICIENTS, features
from .fit import report, solve
from .published_models import cost_of, model_of

ROWS = (128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
CACHED = (0, 512, 1024, 2048, 4096, 6144, 8192)

ATTENTION = ("prefill.attention_flop", "prefill.causal_flop")

MEMORY_BYTES = 40 << 30
"""Of the device's description only: nothing here depends on it."""


@cache
def prefill_coefficients(model: str, gpu: str) -> tuple[dict[str, float], FitReport]:
    """Coefficients of a layer's prefill, and how well they follow the kernels.

    Kernels know no ops: what does not depend on rows is the layer's. A GPU has one kernel for both
    kinds of attention, hence one coefficient.
    """
    spec, cost = model_of(model), cost_of(model, gpu)
    names = ("prefill.layer", "prefill.small_flop", "prefill.flop")
    x, y = [], []
    for rows in ROWS:
        for cached in CACHED:
            found = features(_prefill(rows, cached, spec.n_layers), spec)
            attention = sum(found[name] for name in ATTENTION)
            x.append([*(found[name] for name in names), attention])
            y.append(cost.prefill_s(rows, cached, head=False))
    *values, per_attention = solve(np.array(x), np.array(y)).tolist()
    found = dict(zip(names, values, strict=True)) | dict.fromkeys(ATTENTION, per_attention)
    predicted = np.array(x) @ np.array([*values, per_attention])
    return found, report(np.array(y), predicted)


def profile_of(
    model: str, gpu: str, tiers: Mapping[str, float], extra_s: Mapping[str, float] | None = None
) -> HardwareProfile:
    """A profile of one published machine.

    Args:
        model: name in `published_models`.
        gpu: name of a data sheet.
        tiers: bytes per second of each tier's link.
        extra_s: coefficients to add to the fitted ones, such as overheads, in seconds.
    """
    spec, sheet = model_of(model), cost_of(model, gpu).kernels.sheet
    fitted, how_well = prefill_coefficients(model, gpu)
    values = dict.fromkeys(COEFFICIENTS, 0.0) | fitted
    values["restore.byte"] = 2 / sheet.memory_bytes_per_s
    values["select.row"] = _project_s_per_row(model, gpu)
    values["head.op"] = cost_of(model, gpu).logits_s(1)
    for name, seconds in (extra_s or {}).items():
        values[name] += seconds
    return HardwareProfile(
        name=f"{model} on {gpu}, published",
        device=Device(
            name=gpu, kind="cuda", n_cores=1, memory_bytes=MEMORY_BYTES, compute_threads=1
        ),
        model=spec,
        model_fingerprint=model,
        tiers={
            name: Tier(
                medium="dram", link_bytes_per_s=rate, worker_bytes_per_s=rate, read_latency_s=0.0
            )
            for name, rate in tiers.items()
        },
        coefficients={
            name: Coefficient(value=v, unit="s", low=v, high=v, source="assumed")
            for name, v in values.items()
        },
        fits={"prefill": how_well},
        provenance=Provenance(
            command="validate published", commit="", machine=gpu, versions={}, date="", seed=0
        ),
    )


def _prefill(rows: int, cached: int, n_layers: int) -> Op:
    pairs = rows * cached + rows * (rows + 1) // 2
    return Op(
        0, "prefill", COMPUTE, (0,), 0, n_layers, n_tokens=rows, n_pairs=pairs, n_scored=pairs
    )


def _project_s_per_row(model: str, gpu: str) -> float:
    """Q, K and V of one row of a long prompt, in one layer: what a check layer does for all."""
    spec, kernels = model_of(model), cost_of(model, gpu).kernels
    n, out = max(ROWS), (spec.n_heads + 2 * spec.n_kv_heads) * spec.head_dim
    return kernels.gemm_s(n, out, spec.hidden_size) / n
