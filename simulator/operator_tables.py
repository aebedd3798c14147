"""Read an operator profile (dense, per_sequence, attention, skew CSV files) into a `StepProfile`.

Layout and units (microseconds, one layer) are those of LLMServingSim's profiler output bundle
(casys-kaist/LLMServingSim, MIT). Points that the sweep left out are filled between measured ones.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..core.errors import ProfileError
from .expert_profile import ExpertProfile, ExpertTable, Routing
from .step_profile import ATTENTION_AXES, Curve, StepProfile

Floats = NDArray[np.float64]

ONCE_PER_STEP = ("embedding", "final_layernorm")
TIMES_PER_LAYER = {"layernorm": 2}  # before attention and before the MLP; the others once
NEEDED = ("qkv_proj", "o_proj")


def load_step_profile(
    folder: str | Path, n_layers: int, routing: Routing | None = None
) -> StepProfile:
    """The profile in `folder` (one tensor-parallel degree: the `tpN` folder) for `n_layers` layers.

    Args:
        routing: of a model with experts; the profile is an `ExpertProfile` then.

    Raises:
        ProfileError: a table is missing, empty or malformed; which file, line and field. Or there
            are experts in only one of the model and the profile.
    """
    folder = Path(folder)
    found = folder / "moe.csv"
    if found.exists() != (routing is not None):
        raise ProfileError(
            "the profile and the model must both have experts, or both none",
            values=f"{found} is {'there' if found.exists() else 'missing'}",
            remedy="choose the profile of this model",
        )
    dense = _curves(folder / "dense.csv", "tokens")
    head = _curves(folder / "per_sequence.csv", "sequences")
    missing = [name for name in NEEDED if name not in dense]
    if missing:
        raise ProfileError(
            f"{folder / 'dense.csv'} must hold {', '.join(NEEDED)}",
            values=f"no {missing[0]}",
            remedy="profile the model again",
        )
    layer = {name: c for name, c in dense.items() if name not in ONCE_PER_STEP}
    once = {name: c for name, c in dense.items() if name in ONCE_PER_STEP}
    grid, us = _attention(folder / "attention.csv")
    profile = StepProfile(
        n_layers=n_layers,
        dense_us=_sum(layer, TIMES_PER_LAYER),
        once_us=_sum(once, {}),
        head_us=_sum(head, {}),
        grid=grid,
        us=us,
        skew=_skew(folder / "skew.csv"),
    )
    if routing is None:
        return profile
    return ExpertProfile(**vars(profile), routing=routing, experts=_experts(found))


def _experts(path: Path) -> ExpertTable:
    points: dict[int, dict[int, float]] = defaultdict(dict)
    columns = ("tokens", "activated_experts", "time_us")
    for i, row in enumerate(_rows(path, columns)):
        n_rows, activated, us = (_number(path, i + 2, row, c) for c in columns)
        points[int(n_rows)][int(activated)] = us
    rows = tuple(sorted(points))
    return ExpertTable(rows, tuple(_curve(points[n]) for n in rows))


def _curve(points: dict[int, float]) -> Curve:
    return Curve(tuple(sorted(points)), tuple(points[x] for x in sorted(points)))


def _rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    try:
        with open(path, newline="", encoding="utf-8") as f:
            rows = list(csv.DictReader(f))
    except OSError as e:
        raise ProfileError(
            "the operator table must be readable",
            values=f"{path}: {e.strerror}",
            remedy="give the folder of one tensor-parallel degree, such as .../bf16/tp1",
        ) from None
    absent = [c for c in columns if not rows or c not in rows[0]]
    if absent:
        raise ProfileError(
            f"{path} must have the columns {', '.join(columns)} and at least one row",
            values=f"no {absent[0]}" if rows else "no rows",
            remedy="profile the model again",
        )
    return rows


def _number(path: Path, line: int, row: dict[str, str], column: str) -> float:
    try:
        value = float(row[column])
        if value < 0 or value != value:
            raise ValueError
        return value
    except (TypeError, ValueError):
        raise ProfileError(
            f"{path} line {line}: {column} must be a number of at least 0",
            values=repr(row[column]),
            remedy="correct the line, or profile again",
        ) from None


def _curves(path: Path, axis: str) -> dict[str, Curve]:
    points: dict[str, dict[int, float]] = defaultdict(dict)
    for i, row in enumerate(_rows(path, ("layer", axis, "time_us"))):
        x = int(_number(path, i + 2, row, axis))
        points[row["layer"]][x] = _number(path, i + 2, row, "time_us")
    return {name: _curve(at) for name, at in points.items()}


def _sum(curves: dict[str, Curve], times: dict[str, int]) -> Curve:
    xs = sorted({x for c in curves.values() for x in c.x}) or [1]
    return Curve(
        tuple(xs), tuple(sum(times.get(n, 1) * c.at(x) for n, c in curves.items()) for x in xs)
    )


def _attention(path: Path) -> tuple[tuple[tuple[int, ...], ...], Floats]:
    rows = _rows(path, (*ATTENTION_AXES, "time_us"))
    points = np.array(
        [
            [_number(path, i + 2, row, c) for c in (*ATTENTION_AXES, "time_us")]
            for i, row in enumerate(rows)
        ]
    )
    grid = tuple(
        tuple(sorted({0, *(int(x) for x in points[:, i])})) for i in range(len(ATTENTION_AXES))
    )
    short = [n for n, axis in zip(ATTENTION_AXES, grid, strict=True) if len(axis) < 3]
    if short:
        raise ProfileError(
            f"{path} must sweep every axis over at least two sizes",
            values=short[0],
            remedy="profile the model again",
        )
    us = np.full([len(axis) for axis in grid], np.nan)
    at = tuple(np.searchsorted(grid[i], points[:, i]) for i in range(4))
    us[at] = points[:, 4]
    return grid, _filled(us, grid)


def _filled(us: Floats, grid: tuple[tuple[int, ...], ...]) -> Floats:
    """Holes filled along one axis at a time, decode context first: inside, then beyond the ends.

    Index 0 of an axis is "none of it" and takes no part in a line along that axis; index 0 of the
    prefill context is a real length.
    """
    real = np.ones(us.shape, dtype=bool)
    real[0, 1:] = False  # a context without a chunk
    real[:, :, 0, 1:] = False
    real[:, :, 1:, 0] = False
    real[0, :, 0, :] = False  # nothing at all
    for beyond in (False, True):
        for axis in (3, 1, 0, 2):
            start = 0 if axis == 1 else 1
            lines = np.moveaxis(us, axis, -1)
            wanted = np.moveaxis(real, axis, -1)
            x = np.array(grid[axis][start:], dtype=float)
            for index in np.ndindex(lines.shape[:-1]):
                y = lines[index][start:]
                holes = np.isnan(y) & wanted[index][start:]
                if holes.any():
                    y[holes] = _line(x, y, beyond)[holes]
    return np.where(real, us, 0.0)


def _line(x: Floats, y: Floats, beyond: bool) -> Floats:
    known = ~np.isnan(y)
    if known.sum() < 2:
        return y
    xs, ys = x[known], y[known]
    out: Floats = np.interp(x, xs, ys, left=np.nan, right=np.nan)
    if beyond:
        up = x > xs[-1]
        out[up] = ys[-1] + (x[up] - xs[-1]) * (ys[-1] - ys[-2]) / (xs[-1] - xs[-2])
        out[x < xs[0]] = ys[0]
    return out


def _skew(path: Path) -> dict[int, Curve]:
    """By prefill chunk (0: none): decodes times the share of the way from mean to longest context.

    A weighted median per cell: the share that fits the sweep's batches in the L1 norm of relative
    error. Batches whose longest context costs no more than the mean say nothing. No sweep: empty.
    """
    if not path.exists():
        return {}
    columns = ("n", "pc", "t_mean_us", "t_max_us", "t_skew_us")
    seen: dict[int, dict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for i, row in enumerate(_rows(path, columns)):
        n, chunk, mean, longest, mixed = (_number(path, i + 2, row, c) for c in columns)
        if longest > mean > 0:
            share = (mixed - mean) / (longest - mean)
            seen[int(chunk)][int(n)].append((share, longest / mean - 1))
    return {
        chunk: Curve(
            tuple(sorted(by_n)),
            tuple(n * max(_weighted_median(by_n[n]), 0.0) for n in sorted(by_n)),
        )
        for chunk, by_n in sorted(seen.items())
    }


def _weighted_median(values: list[tuple[float, float]]) -> float:
    half = sum(weight for _, weight in values) / 2
    for value, weight in sorted(values):
        half -= weight
        if half <= 0:
            return value
    return 0.0
