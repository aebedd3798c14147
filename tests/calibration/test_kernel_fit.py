"""Kernel tables: read with checks, fitted, held out. The excerpt's licence is beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cachetune.calibration.kernel_fit import apply, fit_form, fit_kernel, hold_out, residual_of
from cachetune.calibration.kernel_holdout import HoldOut, together
from cachetune.calibration.kernel_tables import read_tables, sim_attention, vidur_attention
from cachetune.calibration.table_columns import read_columns
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


VIDUR = ("prefill_chunk_size,kv_cache_size,batch_size,n_q_head,n_kv_head,n_embd,is_prefill,"
         "time_stats.attn_prefill.median,time_stats.attn_decode.median")  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([], "must hold measured rows"),
        (["64,0,1,32,8,4096,maybe,1,1"], "is_prefill must be True or False"),
        (["64,0,1,0,8,4096,True,1,1"], "each number at least 1, got n_q_head=0"),
    ],
)
def test_a_malformed_vidur_table_is_one_line(tmp_path: Path, rows: list[str], told: str) -> None:
    path = tmp_path / "attention.csv"
    path.write_text("\n".join([VIDUR, *rows]) + "\n")
    with pytest.raises(CacheTuneError, match=told) as caught:
        vidur_attention(path, "A30", "test")
    assert str(path) in str(caught.value)


def test_both_kinds_of_a_vidur_table_are_read(tmp_path: Path) -> None:
    path = tmp_path / "attention.csv"
    path.write_text("\n".join([VIDUR, "64,0,1,32,8,4096,True,2,0", "0,9,4,32,8,4096,False,0,3"]))
    prefix, decode = vidur_attention(path, "A30", "test")
    assert (prefix.seconds.tolist(), decode.seconds.tolist()) == ([2e-3], [3e-3])
    assert decode.sizes["context"].tolist() == [10]


@pytest.mark.parametrize("name", ["tp", "tpx", "tp0"])
def test_a_folder_that_names_no_degree_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name / "attention.csv"
    path.parent.mkdir()
    path.write_text(ASSET.read_text())
    with pytest.raises(CacheTuneError, match="tensor-parallel degree"):
        sim_attention(path, "RTX-4090", "test")


def test_a_missing_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("Missing optional dependency 'pyarrow'.")

    monkeypatch.setattr("pandas.read_parquet", missing)
    with pytest.raises(CacheTuneError, match=r"pip install 'cachetune\[tables\]'"):
        read_columns(tmp_path / "gemm_perf.parquet", ["m"])


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
