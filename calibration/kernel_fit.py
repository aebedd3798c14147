"""Kernel tables to `KernelFit`: a physical form, a boosted residual, conformal intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from ..core.hardware import Coefficient
from ..core.rng import rng
from ..simulator.gpu_sheet import gpu_sheet
from ..simulator.kernel_cost import Band, KernelFit, Predictor
from ..simulator.kernel_forms import FORMS, operand
from ..simulator.residual import Residual
from .boosting import Boosting, fit_residual
from .kernel_tables import KernelTable

Array = NDArray[np.float64]
Rows = NDArray[np.bool_]

LEVEL = 0.9
N_BANDS = 5
N_BOOTSTRAP = 24
BOOTSTRAP_ROWS = 3000
OUTLIER = 0.1
"""Scale of the soft-L1 loss in ln(seconds): rows further off pull less."""
FEW_SHAPES = 10
FEW_ROWS = 1500
"""Below this the residual is small: 150 trees of depth 4."""
FEW = Boosting(n_trees=150, depth=4)
MANY = Boosting(n_trees=1000, depth=8, rate=0.1, clip=0.05, row_share=0.5, column_share=0.4)
NEEDS_MANY = {("L40S", "gemm.fp8")}
"""Tables that a large residual suits: fitted on four fifths of the training rows, it lowers the
error on the other fifth by a tenth or more (from 4.4 to 3.6 %; bfloat16 on the same GPU 5.9 to 5.9,
on H100 3.4 to 3.2, on A100 3.6 to 3.5). The tenth was set when these figures were known."""


def fit_kernel(table: KernelTable, seed: int, bands: Sequence[Band] | None = None) -> KernelFit:
    """Fit a whole table; `bands` come from `held_out_bands` where they were made before."""
    if bands is None:
        bands = held_out_bands(table, seed)
    values = fit_form(table)
    coefficients = _coefficients(table, values, seed)
    return KernelFit(
        coefficients=coefficients,
        residual=residual_of(table, values, seed),
        bands=tuple(bands),
        borrowed_half_width=max(b.half_width for b in bands),
        measured={n: (float(v.min()), float(v.max())) for n, v in table.sizes.items()},
        n_rows=len(table.seconds),
        source=table.source,
    )


def possible(table: KernelTable) -> Rows:
    """Rows that no cache explains are False: twice the matmul peak, or 8 x the memory rate."""
    if "n" not in table.sizes:
        return np.full(len(table.seconds), True)
    sheet = gpu_sheet(table.gpu)
    dtype, n_bytes = operand(table.kind)
    m, n, k = (table.sizes[name] for name in ("m", "n", "k"))
    compute_s = 2 * m * n * k / sheet.peak_flops(dtype)
    memory_s = n_bytes * n * k / sheet.memory_bytes_per_s
    return np.asarray(table.seconds >= np.maximum(compute_s / 2, memory_s / 8))


def predict(table: KernelTable, fit: KernelFit, gpu: str | None = None) -> Array:
    """Seconds of the table's rows by a fit, on the table's GPU or another."""
    return Predictor(table.kind, fit, gpu_sheet(gpu or table.gpu)).seconds(table.sizes)


def fit_form(table: KernelTable) -> dict[str, float]:
    """Coefficients of the physical form: least squares on ln(seconds), outliers damped."""
    form, sheet = FORMS[table.kind], gpu_sheet(table.gpu)
    names = list(form.coefficients)
    start = np.log([form.coefficients[n][1] for n in names])
    peak, target = sheet.peak_flops(operand(table.kind)[0]), np.log(table.seconds)

    def residuals(p: Array) -> Array:
        values = dict(zip(names, np.exp(p).tolist(), strict=True))
        return np.asarray(np.log(form.seconds(table.sizes, values, peak, sheet)) - target)

    # Bounds are two to four decades wide: a coefficient that a table cannot tell stays finite.
    found = least_squares(
        residuals, start, loss="soft_l1", f_scale=OUTLIER, bounds=(start - 7, start + 4)
    )
    return dict(zip(names, np.exp(found.x).tolist(), strict=True))


def held_out_bands(table: KernelTable, seed: int) -> tuple[Band, ...]:
    """Split-conformal half widths by predicted time: rows the fit has not seen are scored.

    A fifth of the shapes at once; where a table has few, each in turn; where it has one, a fifth of
    the rows.
    """
    shapes = table.shapes()
    names = np.unique(shapes)
    few = 1 < len(names) < FEW_SHAPES
    how = "shapes" if len(names) > 1 else "rows"
    holds = [shapes == n for n in names] if few else [hold_out(table, how, seed, "bands")]
    parts, seconds = [], []
    for held in holds:
        rest = table.take(~held)
        values = fit_form(rest)
        parts.append(table.take(held))
        seconds.append(apply(parts[-1], values, residual_of(rest, values, seed)))
    predicted, measured = np.concatenate(seconds), np.concatenate([p.seconds for p in parts])
    return conformal(predicted, measured)


def hold_out(table: KernelTable, how: str, seed: int, *stream: str, share: float = 0.2) -> Rows:
    """Which rows to hold out: a share of the `rows`, or of the `shapes` with all their rows."""
    draws = rng(seed, "hold out", table.gpu, table.kind, how, *stream)
    if how == "rows":
        return np.asarray(draws.random(len(table.seconds)) < share)
    shapes = table.shapes()
    names = np.unique(shapes)
    picked = draws.choice(names, max(1, round(share * len(names))), replace=False)
    return np.isin(shapes, picked)


def conformal(seconds: Array, measured: Array) -> tuple[Band, ...]:
    """Bands whose half width covers `LEVEL` of the scores, with the finite-sample correction."""
    scores = np.abs(np.log(seconds / measured))
    n_bands = min(N_BANDS, max(1, len(scores) // 40))
    ends = np.quantile(seconds, np.linspace(0, 1, n_bands + 1)[1:])
    band_of = np.minimum(np.searchsorted(ends, seconds), n_bands - 1)
    found = []
    for i, end in enumerate(ends):
        inside = np.sort(scores[band_of == i])
        rank = min(len(inside), int(np.ceil((len(inside) + 1) * LEVEL)))
        found.append(Band(to_s=float(end), half_width=float(round(inside[rank - 1], 5))))
    return tuple(found)


def apply(table: KernelTable, values: dict[str, float], residual: Residual | None) -> Array:
    """Seconds of the table's rows by coefficients and trees that are in no document yet."""
    names = FORMS[table.kind].coefficients
    plain = {n: Coefficient(value=v, unit=names[n][0], low=v, high=v) for n, v in values.items()}
    fit = KernelFit(
        coefficients=plain,
        residual=residual,
        bands=(),
        borrowed_half_width=0.0,
        measured={},
        n_rows=0,
        source="",
    )
    return predict(table, fit)


def residual_of(table: KernelTable, values: dict[str, float], seed: int) -> Residual:
    """Boosted trees on what the form leaves."""
    form, sheet = FORMS[table.kind], gpu_sheet(table.gpu)
    physical = form.seconds(table.sizes, values, sheet.peak_flops(operand(table.kind)[0]), sheet)
    columns = {**form.features(table.sizes, sheet), "physical": np.log2(physical)}
    # A feature that the table holds constant cannot be asked about.
    names = [n for n, column in columns.items() if np.ptp(column) > 0]
    x = np.stack([columns[n] for n in names], axis=1)
    how = MANY if (table.gpu, table.kind) in NEEDS_MANY else None
    if len(physical) < FEW_ROWS or len(names) < 5:
        how = FEW
    return fit_residual(x, np.log(table.seconds / physical), names, seed, how)


def _coefficients(
    table: KernelTable, values: dict[str, float], seed: int
) -> dict[str, Coefficient]:
    """With 95 % intervals: the form is fitted again to draws of whole shapes (rows if few)."""
    shapes = table.shapes()
    names = np.unique(shapes)
    draws = rng(seed, "bootstrap", table.gpu, table.kind)
    members = {name: np.flatnonzero(shapes == name) for name in names}
    again: dict[str, list[float]] = {name: [] for name in values}
    for _ in range(N_BOOTSTRAP):
        if len(names) >= FEW_SHAPES:
            picked = np.concatenate([members[n] for n in draws.choice(names, len(names))])
        else:
            picked = draws.integers(0, len(shapes), len(shapes))
        if len(picked) > BOOTSTRAP_ROWS:
            picked = draws.choice(picked, BOOTSTRAP_ROWS, replace=False)
        for name, value in fit_form(table.take(picked)).items():
            again[name].append(value)
    units = FORMS[table.kind].coefficients
    return {
        name: Coefficient(
            value=value,
            unit=units[name][0],
            low=min(float(np.percentile(again[name], 2.5)), value),
            high=max(float(np.percentile(again[name], 97.5)), value),
        )
        for name, value in values.items()
    }
