"""Seconds of collectives inside a node, from measured all-reduces by message size."""

from __future__ import annotations

import json
from functools import cache
from typing import NamedTuple

import numpy as np

from ..core.errors import ProfileError
from .gpu_sheet import FOLDER, GpuSheet, gpu_sheet, key_of

FILE = "allreduce.json"


class _Curve(NamedTuple):
    """Seconds by message bytes, upwards, on `gpu`."""

    gpu: str
    n_bytes: tuple[float, ...]
    seconds: tuple[float, ...]


def allreduce_s(sheet: GpuSheet, n_gpus: int, n_bytes: float) -> float:
    """Sum of a bf16 tensor of `n_bytes` over `n_gpus` of one node; 0 for one GPU.

    Between measured sizes by log-log interpolation; beyond them at the rate of the largest. A GPU
    that was not measured takes the table of the nearest link rate: its latency as it is, its
    transfer scaled by the data sheets' link rates.

    Raises:
        ProfileError: a number of GPUs that was not measured.
    """
    if n_gpus == 1:
        return 0.0
    curve = _curve(sheet, n_gpus)
    scale = gpu_sheet(curve.gpu).link_bytes_per_s / sheet.link_bytes_per_s
    latency = curve.seconds[0]
    if n_bytes > curve.n_bytes[-1]:
        seconds = curve.seconds[-1] * n_bytes / curve.n_bytes[-1]
    else:
        log = np.interp(np.log(n_bytes), np.log(curve.n_bytes), np.log(curve.seconds))
        seconds = float(np.exp(log))
    return latency + max(0.0, seconds - latency) * scale


def gather_s(sheet: GpuSheet, n_gpus: int, n_bytes: float) -> float:
    """A bf16 tensor of `n_bytes` gathered from the parts that `n_gpus` hold; 0 for one GPU.

    Half an all-reduce, which sends every part around twice.
    """
    return allreduce_s(sheet, n_gpus, n_bytes) / 2


@cache
def _tables() -> dict[str, dict[str, list[list[float]]]]:
    """GPU -> number of GPUs -> rows of (bytes, seconds)."""
    text = FOLDER.joinpath(FILE).read_text(encoding="utf-8")
    return dict(json.loads(text)["all_reduce"])


@cache
def _curve(sheet: GpuSheet, n_gpus: int) -> _Curve:
    def unlike(name: str) -> tuple[bool, float, float]:
        other = gpu_sheet(name)
        ratio = abs(np.log(other.link_bytes_per_s / sheet.link_bytes_per_s))
        return key_of(name) != key_of(sheet.name), float(ratio), sheet.distance(other)

    gpu = min(_tables(), key=unlike)
    rows = _tables()[gpu].get(str(n_gpus))
    if rows is None:
        raise ProfileError(
            f"the tensor-parallel degree must be 1, {', '.join(_tables()[gpu])}",
            values=str(n_gpus),
            remedy="all-reduce was measured inside one node only",
        )
    return _Curve(gpu, tuple(r[0] for r in rows), tuple(r[1] for r in rows))
