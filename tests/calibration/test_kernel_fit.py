"""Kernel tables: read with checks, fitted, held out. The excerpt's licence is beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cachetune.calibration.kernel_fit import apply, fit_form, fit_kernel, hold_out, residual_of
from cachetune.calibration.kernel_holdout import HoldOut, together
from cachetune.calibration.kernel_tables import read_tables, sim_attention
from cachetune.core.errors import CacheTuneError

ASSET = Path(__file__).parent.parent / "assets" / "kernel_tables" / "tp1" / "attention.csv"


@pytest.mark.parametrize(("kind", "bound"), [("prefix", 0.05), ("decode", 0.03)])
def test_held_out_rows_are_within_the_bound(kind: str, bound: float) -> None:
    table = next(t for t in sim_attention(ASSET, "RTX-4090", "test") if t.kind == kind)
    held = hold_out(table, "rows", 0)
    values = fit_form(table.take(~held))
    residual = residual_of(table.take(~held), values, 0)
    test = table.take(held)
    error = np.abs(apply(test, values, residual) / test.seconds - 1).mean()
    form_error = np.abs(apply(test, values, None) / test.seconds - 1).mean()
    assert error <= bound < form_error


def test_same_seed_same_fit_and_intervals_hold_their_values() -> None:
    table = sim_attention(ASSET, "RTX-4090", "test")[0]
    fit = fit_kernel(table, 3)
    assert fit.fingerprint() == fit_kernel(table, 3).fingerprint()
    assert all(c.low <= c.value <= c.high for c in fit.coefficients.values())


@pytest.mark.parametrize(
    ("line", "told"),
    [("512,x,0,0,9.5", "row 3: kv_prefill"), ("512,0,0,0,", "row 3: time_us"), ("512,0,0,0,0", "")],
)
def test_a_malformed_row_is_one_line_with_file_row_and_field(
    tmp_path: Path, line: str, told: str
) -> None:
    path = tmp_path / "tp1" / "attention.csv"
    path.parent.mkdir()
    path.write_text("\n".join([*ASSET.read_text().splitlines()[:3], line]) + "\n")
    with pytest.raises(CacheTuneError) as caught:
        sim_attention(path, "RTX-4090", "test")
    assert str(path) in str(caught.value) and told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_tables_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CacheTuneError, match="measured kernel tables"):
        read_tables(tmp_path)


def test_all_held_out_rows_make_one_set() -> None:
    """Rows are weighted alike whichever table they are of; other hold-outs do not count."""

    def part(kind: str, n_rows: int, error: float, held_out: str = "rows") -> HoldOut:
        return HoldOut("X", kind, held_out, n_rows, error, error, 2 * error, 0.9, 0.04, 1)

    found = [part("gemm.fp8", 300, 0.02), part("gemm.bfloat16", 100, 0.06)]
    (row,) = together([*found, part("gemm.fp8", 50, 0.5, "shapes")])
    assert (row.gpu, row.kind, row.n_rows, row.n_impossible) == ("all", "gemm", 400, 2)
    assert row.error_mean == pytest.approx(0.03) and row.form_error_mean == pytest.approx(0.06)
    assert row.passed and row.coverage == pytest.approx(0.9)
