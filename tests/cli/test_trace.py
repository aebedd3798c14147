"""`cachetune trace`: statistics, conversion, made traces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cachetune.cli import trace as cli_trace
from cachetune.core.errors import CacheTuneError, WorkloadError
from cachetune.core.trace_files import read_trace

from .file_cases import Run

ROWS = "".join(
    json.dumps({"timestamp": 500 * i, "input_length": 1024, "output_length": i, "hash_ids": [0, i]})
    + "\n"
    for i in range(1, 9)
)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text(ROWS)
    return path


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[str, dict[str, Any]]:
    """(stdout, its last line as JSON)."""
    cli_trace.command([str(a) for a in args], standalone_mode=False)
    out = capsys.readouterr().out
    return out, json.loads(out.splitlines()[-1])


def test_stats(capsys: pytest.CaptureFixture[str], trace: Path):
    out, data = run(capsys, "stats", trace)
    assert data["rows"] == 8 and data["prefix_reuse_ceiling"] == pytest.approx(7 / 16)
    assert data["provenance"]["format"] == "mooncake"
    assert "prefix_reuse_ceiling" in out and "LRU cache" in out


def test_convert_with_filters(capsys: pytest.CaptureFixture[str], trace: Path, tmp_path: Path):
    out = tmp_path / "out.jsonl"
    _, data = run(capsys, "convert", trace, "--out", out, "--between-s", "1:3", "--scale-rate", "2")
    table = read_trace(out)
    assert data["rows"] == len(table) == 4 and table.chained
    assert (table.arrival_ns / 1e6).tolist() == [0, 250, 500, 750]


@pytest.mark.parametrize(
    ("args", "rows"),
    [
        (("plain", "--requests", 20, "--arrivals", "gamma", "--cv", 2, "--prompt", "500:1"), 20),
        (("plain", "--requests", 20, "--users", 4), 20),
        (("rag", "--requests", 20, "--passages", 50, "--sharing", 0.5), 20),
        (("rag", "--requests", 20, "--arrivals", "bursts", "--bursts", "5:10:0.1"), 20),
        (("chat", "--sessions", 6, "--turns", "3"), 18),
    ],
)
def test_make(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, args: tuple[object, ...], rows: int
):
    outs = [tmp_path / "a", tmp_path / "b"]
    for out in outs:
        _, data = run(capsys, "make", *args, "--out", out)
        assert data["rows"] == rows == len(read_trace(out))
    assert outs[0].read_bytes() == outs[1].read_bytes()


@pytest.mark.parametrize(
    "args",
    [
        ("stats", "--between-s", "1"),
        ("stats", "--format", "x"),
        ("make", "plain", "--prompt", "x"),
        ("make", "plain", "--prompt", "0"),
        ("make", "plain", "--arrivals", "x"),
        ("make", "plain", "--bursts", "1:2"),
        ("make", "rag", "--sharing", "2"),
        ("make", "plain", "--rate-rps", "0"),
        ("stats", "--rate-rps", "2"),
    ],
)
def test_bad_options_write_nothing(
    capsys: pytest.CaptureFixture[str], trace: Path, tmp_path: Path, args: tuple[str, ...]
):
    out = tmp_path / "out"
    more = (trace,) if args[0] == "stats" else ("--out", out)
    with pytest.raises(WorkloadError) as caught:
        run(capsys, *args, *more)
    assert "\n" not in str(caught.value) and not out.exists()


def test_a_trace_is_not_written_over_its_source(capsys: pytest.CaptureFixture[str], trace: Path):
    with pytest.raises(CacheTuneError, match="not written over an input"):
        run(capsys, "convert", trace, "--out", trace.parent / "." / trace.name)
    assert trace.read_text() == ROWS


def test_a_coarse_clock_is_told_and_spread_on_request(run: Run, tmp_path: Path) -> None:
    """Mooncake's: ten requests every three seconds, which no rate keeps apart."""
    path, spread = tmp_path / "ticks.jsonl", tmp_path / "spread.jsonl"
    row = {"input_length": 700, "output_length": 2, "hash_ids": [1, 2]}
    rows = [json.dumps({"timestamp": 3000 * (i // 10), **row}) for i in range(60)]
    path.write_text("\n".join(rows))
    assert json.loads(run("trace", "stats", path)[1].splitlines()[-1])["tick_s"] == 3
    before = run("replay", path)
    assert "ticks every 3 s" in before[2] and "--spread-ticks" in before[2]
    assert run("trace", "convert", path, "--spread-ticks", "--out", spread)[0] == 0
    after = run("replay", spread)
    assert after[0] == 0 and "ticks" not in after[2]
    late = [json.loads(out.splitlines()[-1])["ttft_ms_mean"] for _, out, _ in (before, after)]
    assert late[1] < late[0] / 2
