"""Writes the fitted kernels that ship: `python -m cachetune.calibration.kernel_ship DATA`.

For every GPU with tables one `simulator/gpus/<gpu>.json`, and the all-reduce tables of all.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..core.hardware import Provenance
from ..core.record import write_atomic
from ..simulator.gpu_sheet import gpu_sheet, key_of
from ..simulator.kernel_cost import KernelDocument, KernelFit, Predictor
from .kernel_fit import LEVEL, fit_kernel, possible, predict
from .kernel_tables import AIC, AIC_GPUS, KernelTable, read_tables
from .table_columns import read_columns

BF16_BYTES = 2


def ship(
    data: Path, folder: Path, provenance: Provenance, only: tuple[str, ...] = ()
) -> list[Path]:
    """Fit all tables under `data` and write the documents; `only` names some GPUs.

    Raises:
        CacheTuneError: a malformed table, or a folder that cannot be written.
    """
    tables = [t.take(possible(t)) for t in read_tables(data)]
    written = [folder / "allreduce.json"]
    write_atomic(written[0], allreduce_json(data).encode())
    by_gpu: dict[str, dict[str, KernelFit]] = {}
    cached = [t for t in tables if t.kind == "prefix"]
    for table in tables:
        if (only and table.gpu not in only) or _is_older(table, tables):
            continue
        fit = fit_kernel(table, provenance.seed)
        if table.kind == "prefill":
            fit = fit.replace(cached_half_width=_cached_half_width(fit, cached))
        by_gpu.setdefault(table.gpu, {})[table.kind] = fit
    for gpu, fits in by_gpu.items():
        document = KernelDocument(gpu=gpu, fits=fits, provenance=provenance)
        written.append(folder / f"{key_of(gpu)}.json")
        document.write(written[-1])
    return written


def borrow(folder: Path, data: Path) -> dict[str, float]:
    """Set `borrowed_half_width` of the documents: every GPU predicted by its nearest other."""
    documents = {p.stem: KernelDocument.read(p) for p in sorted(folder.glob("*.json")) if _fits(p)}
    tables = [t.take(possible(t)) for t in read_tables(data)]
    widths = {}
    for kind in sorted({k for d in documents.values() for k in d.fits}):
        fits = {d.gpu: d.fits[kind] for d in documents.values() if kind in d.fits}
        scores = borrowed_scores([t for t in tables if t.kind == kind and t.gpu in fits], fits)
        if scores:
            # Each GPU counts alike, however long its table.
            ends = [np.quantile(s, LEVEL) for s in scores.values()]
            widths[kind] = round(float(max(ends)), 4)
    for stem, document in documents.items():
        fits = {
            kind: fit.replace(borrowed_half_width=widths.get(kind, fit.borrowed_half_width))
            for kind, fit in document.fits.items()
        }
        document.replace(fits=fits).write(folder / f"{stem}.json")
    return widths


def borrowed_scores(
    tables: list[KernelTable], fits: dict[str, KernelFit]
) -> dict[str, NDArray[np.float64]]:
    """By GPU: |ln(predicted / measured)| of its rows, predicted by the nearest other GPU's fit."""
    found = {}
    for table in tables:
        sheet = gpu_sheet(table.gpu)
        others = [gpu_sheet(g) for g in fits if g != table.gpu]
        if others:
            donor = min(others, key=lambda s: (sheet.distance(s), s.name))
            seconds = predict(table, fits[donor.name], table.gpu)
            found[table.gpu] = np.abs(np.log(seconds / table.seconds))
    return found


def allreduce_json(data: Path) -> str:
    """Bytes and seconds by GPU and number of GPUs: the faster of vLLM's kernel and NCCL.

    `message_size` counts bf16 elements: only so do the largest reach the links' known rates.
    """
    found: dict[str, dict[str, list[list[float]]]] = {}
    for folder, gpu in AIC_GPUS.items():
        best: dict[tuple[int, float], float] = {}
        base = data / "aiconfigurator" / "data" / folder / "comm"
        numbers = ("num_gpus", "message_size", "latency")
        nccl = [
            read_columns(p, numbers, ("op_name", "nccl_dtype"))
            for p in base.glob("nccl/*/*.parquet")
        ]
        own = [read_columns(p, numbers, ("backend",)) for p in base.glob("vllm/*/*.parquet")]
        rows = [f[(f.op_name == "all_reduce") & (f.nccl_dtype == "half")] for f in nccl]
        rows += [f[f.backend == "vllm_graph"] for f in own]
        for frame in rows:
            for n, size, ms in frame[list(numbers)].itertuples(index=False):
                key = (int(n), float(size) * BF16_BYTES)
                best[key] = min(best.get(key, np.inf), float(ms) / 1e3)
        for (n, size), seconds in sorted(best.items()):
            found.setdefault(gpu, {}).setdefault(str(n), []).append([size, seconds])
    return json.dumps({"source": AIC, "all_reduce": found}, indent=None) + "\n"


def _is_older(table: KernelTable, tables: list[KernelTable]) -> bool:
    """A prefix table of older kernels than the GPU's own prefill table: only for checks."""
    newer = any(t.gpu == table.gpu and t.kind == "prefill" for t in tables)
    return table.kind == "prefix" and newer


def _cached_half_width(fit: KernelFit, prefixes: list[KernelTable]) -> float:
    """How far prefill's form misses behind a prefix, on the GPUs whose prefix tables are known."""
    scores = []
    for table in prefixes:
        if table.gpu != "H100-SXM":  # the only GPU with both tables
            continue
        one = table.take(table.sizes["n_cached"] > 0)
        predictor = Predictor("prefill", fit, gpu_sheet(table.gpu))
        first = predictor.seconds({**one.sizes, "n_cached": np.zeros(len(one.seconds))})
        seconds = first + predictor.extra_keys_s(one.sizes)
        scores.append(np.abs(np.log(seconds / one.seconds)))
    return round(float(np.quantile(np.concatenate(scores), LEVEL)), 4) if scores else 1.0


def _fits(path: Path) -> bool:
    return '"fits"' in path.read_text(encoding="utf-8")


def _main(data: str, *only: str) -> None:
    from ..runtime.machine import provenance_here

    folder = Path(__file__).parent.parent / "simulator" / "gpus"
    command = "python -m cachetune.calibration.kernel_ship DATA"
    for path in ship(Path(data), folder, provenance_here(0, command), only):
        print(path.name, path.stat().st_size)
    print(borrow(folder, Path(data)))


if __name__ == "__main__":
    _main(*sys.argv[1:])
