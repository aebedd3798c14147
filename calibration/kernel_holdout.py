"""How well kernel fits predict what they have not seen: rows, shapes, models and GPUs held out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..simulator.kernel_cost import Band, KernelFit, kernel_document
from .kernel_fit import LEVEL, apply, fit_form, held_out_bands, hold_out, possible, residual_of
from .kernel_ship import borrowed_scores
from .kernel_tables import LLAMA_8B, KernelTable

Array = NDArray[np.float64]

BOUNDS = {"gemm": 0.04, "prefill": 0.03, "decode": 0.03, "prefix": 0.05}
"""Mean absolute error on held-out rows, by the first word of the kind."""

FEWEST_SHAPES = 4
"""Tables with fewer shapes cannot hold whole shapes out."""


@dataclass(frozen=True)
class HoldOut:
    """Errors on the rows held out, as fractions of the measured time."""

    gpu: str
    kind: str
    held_out: str
    n_rows: int
    error_mean: float
    error_median: float | None
    form_error_mean: float | None
    """The same without the learned residual."""
    coverage: float
    """Share of rows inside the 90 % interval."""
    bound: float | None
    n_impossible: int
    """Rows of the table that were left out: faster than any cache explains."""

    @property
    def passed(self) -> bool | None:
        """Whether the bound is met; None where there is none."""
        return None if self.bound is None else self.error_mean <= self.bound


def hold_outs(
    tables: list[KernelTable], seed: int, tell: Callable[[str], None] = lambda _: None
) -> Iterator[HoldOut]:
    """Every table with random rows, whole shapes and a whole model held out."""
    for table in tables:
        if table.kind == "elementwise":
            continue
        clean = table.take(possible(table))
        dropped = len(table.seconds) - len(clean.seconds)
        for how, held in _masks(clean, seed):
            tell(f"{table.gpu} {table.kind}: {how}")
            yield _score(clean, held, how, dropped, seed)


def whole_gpus(tables: list[KernelTable]) -> Iterator[HoldOut]:
    """Every GPU predicted from its data sheet and the shipped fit of the nearest other GPU.

    The interval's width is what the other GPUs' own whole-GPU errors ask for, never its own.
    """
    for kind in sorted({t.kind for t in tables} - {"elementwise"}):
        ours = [t.take(possible(t)) for t in tables if t.kind == kind]
        fits: dict[str, KernelFit] = {}
        for table in ours:
            document = kernel_document(table.gpu)
            if document is not None and kind in document.fits:
                fits[table.gpu] = document.fits[kind]
        scores = borrowed_scores([t for t in ours if t.gpu in fits], fits)
        for table in ours:
            if table.gpu not in scores or len(scores) < 3:
                continue
            width = max(float(np.quantile(s, LEVEL)) for g, s in scores.items() if g != table.gpu)
            score = scores[table.gpu]
            errors = np.expm1(score)
            yield HoldOut(
                gpu=table.gpu,
                kind=kind,
                held_out="whole GPU",
                n_rows=len(score),
                error_mean=float(errors.mean()),
                error_median=float(np.median(errors)),
                form_error_mean=None,
                coverage=float((score <= width).mean()),
                bound=None,
                n_impossible=0,
            )


def together(found: Iterable[HoldOut]) -> Iterator[HoldOut]:
    """All held-out rows of all GPUs and dtypes as one set, per first word of the kind."""
    for family, bound in BOUNDS.items():
        parts = [r for r in found if r.held_out == "rows" and r.kind.split(".")[0] == family]
        if not parts:
            continue
        n_rows = sum(r.n_rows for r in parts)
        form_errors = [r.form_error_mean * r.n_rows for r in parts if r.form_error_mean is not None]
        yield HoldOut(
            gpu="all",
            kind=family,
            held_out="rows",
            n_rows=n_rows,
            error_mean=sum(r.error_mean * r.n_rows for r in parts) / n_rows,
            error_median=None,
            form_error_mean=sum(form_errors) / n_rows,
            coverage=sum(r.coverage * r.n_rows for r in parts) / n_rows,
            bound=bound,
            n_impossible=sum(r.n_impossible for r in parts),
        )


def llama_8b_shapes() -> set[str]:
    """(n, k) of the matrices and heads of attention of Llama-3.1-8B on 1, 2, 4 or 8 GPUs."""
    hidden, inter, heads, kv_heads, head_dim, _ = LLAMA_8B
    found = set()
    for tp in (1, 2, 4, 8):
        h, kv, i = heads // tp, kv_heads // tp, inter // tp
        qkv = (h + 2 * kv) * head_dim
        matrices = ((qkv, hidden), (hidden, h * head_dim), (2 * i, hidden), (hidden, i))
        found |= {f"{n}x{k}" for n, k in matrices} | {f"{h}x{kv}x{head_dim}"}
    return found


def _masks(table: KernelTable, seed: int) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    yield "rows", hold_out(table, "rows", seed)
    shapes = table.shapes()
    if len(set(shapes)) < FEWEST_SHAPES:
        return
    yield "shapes", hold_out(table, "shapes", seed)
    model = np.isin(shapes, list(llama_8b_shapes()))
    if 0 < model.sum() < len(model) / 2:
        yield "model Llama-3.1-8B", model


def _score(
    table: KernelTable, held: NDArray[np.bool_], how: str, dropped: int, seed: int
) -> HoldOut:
    rest, test = table.take(~held), table.take(held)
    values = fit_form(rest)
    seconds = apply(test, values, residual_of(rest, values, seed))
    errors = np.abs(seconds / test.seconds - 1)
    form_errors = np.abs(apply(test, values, None) / test.seconds - 1)
    widths = _widths(held_out_bands(rest, seed), seconds)
    inside = np.abs(np.log(seconds / test.seconds)) <= widths
    return HoldOut(
        gpu=table.gpu,
        kind=table.kind,
        held_out=how,
        n_rows=len(errors),
        error_mean=float(errors.mean()),
        error_median=float(np.median(errors)),
        form_error_mean=float(form_errors.mean()),
        coverage=float(inside.mean()),
        bound=BOUNDS[table.kind.split(".")[0]] if how == "rows" else None,
        n_impossible=dropped,
    )


def _widths(bands: tuple[Band, ...], seconds: Array) -> Array:
    ends = np.array([band.to_s for band in bands[:-1]])
    return np.asarray(np.array([b.half_width for b in bands])[np.searchsorted(ends, seconds)])
