"""`cachetune bench capacity` and `bench shared-link` at tiny sizes: figures, errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .file_cases import Run


@pytest.fixture
def trace(run: Run, tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    made = ("--requests", 300, "--rate-rps", 2, "--passages", 40, "--per-request", 8)
    status, _, err = run("trace", "make", "rag", *made, "--out", path)
    assert status == 0, err
    return path


def test_capacities_lie_beside_whole_traces(run: Run, trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "capacity.json"
    status, said, err = run(
        "bench", "capacity", "--trace", trace, "--cases", "1", "--questions", 4, "--out", out
    )
    assert status == 0, err
    result = json.loads(out.read_text())
    (row,) = result["rows"]
    assert row["low_rps"] <= row["capacity_rps"] <= row["high_rps"]
    assert row["whole_keeps_rps"] < row["whole_fails_rps"] <= 1.021 * row["whole_keeps_rps"]
    assert abs(row["error"]) < 0.1 and isinstance(row["holds"], bool)
    assert row["n_runs"] >= 6 and row["cpu_s"] > 0 and row["whole_n_runs"] >= 4
    assert [c["share"] for c in result["coverage"]] == [0.9, 0.95, 0.99]
    for known in result["coverage"]:
        assert 0 <= known["held"] <= 1
        assert known["low_median_rps"] < known["value_median_rps"] < known["high_median_rps"]
        assert known["value_median_rps"] == pytest.approx(known["truth_rps"], rel=0.1)
    assert result["provenance"]["commit"] and result["trace"]["rows"] == "300"
    assert json.loads(said.splitlines()[-1])["error"] == [row["error"]]


def test_a_shared_link_is_measured_at_every_load(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "link.json"
    sizes = ("--requests", 20, "--replicas", 2, "--out", out)
    status, said, err = run("bench", "shared-link", *sizes)
    assert status == 0, err
    rows = json.loads(out.read_text())["rows"]
    assert len({(r["load"], r["load_over_compute"]) for r in rows}) == len(rows) == 9
    for row in rows:
        both = row["ttft_ms_p50"], row["layers_ttft_ms_p50"]
        assert row["error_p50"] == pytest.approx(both[0] / both[1] - 1)
        assert row["kept"] == (abs(row["error_p50"]) <= 0.02 and abs(row["error_p99"]) <= 0.05)
    assert json.loads(said.splitlines()[-1])["kept"] == sum(row["kept"] for row in rows) > 0


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("capacity", "--trace", "nowhere.jsonl"), "nowhere.jsonl"),
        (("capacity",), "--trace"),
        (("capacity", "--trace", "x", "--cases", "1,6"), "numbers from 1 to 5"),
        (("shared-link", "--requests", "3"), "20"),
    ],
)
def test_errors_are_one_line(run: Run, args: tuple[object, ...], words: str) -> None:
    status, out, err = run("bench", *args)
    assert (status, out) == (2, "")
    assert len(err.strip().splitlines()) == 1 and words in err
