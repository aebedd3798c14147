"""`cachetune tune fleet`: a search over fleets for a trace; resumed, and the same however done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .file_cases import Run, snapshot

SMALL = ("--requests", 40, "--gpu", "H100-SXM,L40S", "--replicas", "1,2", "--dram-gib", 64)


@pytest.fixture
def trace(run: Run, tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    made = ("--requests", 40, "--rate-rps", 2, "--passages", 50, "--per-request", 4)
    status, _, err = run("trace", "make", "rag", *made, "--out", path)
    assert status == 0, err
    return path


def test_it_finds_fleets_and_resumes(run: Run, trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "fleet.json"
    search = ("tune", "fleet", trace, *SMALL, "--trials", 22, "--out", out)
    status, said, err = run(*search)
    assert status == 0, err
    line, result = json.loads(said.splitlines()[-1]), json.loads(out.read_text())
    assert len(result["trials"]) == 22 and result["front"] == line["front"]
    assert line["best"] in result["trials"] and "cheapest that keeps the SLO" in err
    costs = [row["usd_per_h"] for row in line["front"]]
    assert costs == sorted(costs) and line["best"]["usd_per_h"] <= costs[-1]
    kept = tmp_path / "fleet.journal.jsonl"
    lines = kept.read_text().splitlines(keepends=True)
    assert len(lines) <= 22
    kept.write_text("".join(lines[:5]))
    before = out.read_bytes()
    assert run(*search, "--workers", 2)[0] == 0
    assert out.read_bytes() == before
    assert sorted(kept.read_text().splitlines(keepends=True)) == sorted(lines)


def test_an_slo_that_nothing_keeps_is_said(run: Run, trace: Path, tmp_path: Path) -> None:
    slo = ("--slo", "ttft_ms=0.001,tpot_ms=0.001")
    status, said, err = run(
        "tune", "fleet", trace, *SMALL, *slo, "--trials", 2, "--out", tmp_path / "f.json"
    )
    assert status == 0 and "no fleet keeps the SLO" in err
    assert json.loads(said.splitlines()[-1])["best"] is None


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--gpu", "H101-SXM"), "H100-SXM"),
        (("--policy", "magic"), "policy"),
        (("--router", "random"), "router"),
        (("--replicas", "2"), "LOW,HIGH"),
        (("--dram-gib", "much"), "whole numbers"),
        (("--dram-gib", 16), "DRAM must be above the 32 GiB"),
        (("--batch", 16), "must not be below max_num_seqs"),
        (("--rate-rps", 0), "rate_rps"),
        (("--gpu", ""), "an empty list"),
        (
            ("--gpu", "H100-SXM,GH200"),
            "none with a date and source for GH200; leave that GPU out, or pass --price GH200=",
        ),
        (("--ids", "hash"), "'prefix' or 'content'"),
        (("--gpu", "H100-SXM", "--n-gpus", 3, "--trials", 1), "must divide n_heads"),
        (("--slo", "fast"), "ttft_ms"),
        (("--model", "no-such-model"), "no-such-model"),
        (("--gpu", "L4", "--model", "Llama-3.1-70B", "--trials", 1), "no fleet that was tried"),
    ],
)
def test_errors_are_one_line(
    run: Run, trace: Path, tmp_path: Path, more: tuple[object, ...], words: str
) -> None:
    before = snapshot(tmp_path)
    status, out, err = run("tune", "fleet", trace, *more, "--out", tmp_path / "f.json")
    assert (status, out) == (2, "")
    line = [t for t in err.splitlines() if t.startswith("cachetune: ")]
    assert len(line) == 1 and words in line[0], err
    assert not (tmp_path / "f.json").exists()
    assert snapshot(tmp_path).keys() - before.keys() <= {tmp_path / "f.journal.jsonl"}


def test_prices_and_rows_of_ones_own(run: Run, trace: Path, tmp_path: Path) -> None:
    ours = tmp_path / "ours.json"
    ours.write_text(json.dumps({"disks": {"slow": {"read_bytes_per_s": 1e8,
        "write_bytes_per_s": 1e8, "read_latency_s": 1e-3, "read_iops": 1e4, "queue_depth": 1,
        "capacity_bytes": 1e12}}}))  # fmt: skip
    out = tmp_path / "fleet.json"
    status, _, err = run(
        "tune", "fleet", trace, "--requests", 40, "--gpu", "GH200", "--replicas", "1,2",
        "--dram-gib", 64, "--disk", "slow", "--catalogue", ours, "--price", "GH200=2.5",
        "--trials", 4, "--out", out,
    )  # fmt: skip
    assert status == 0, err
    rows = json.loads(out.read_text())["trials"]
    assert {row["disk"] for row in rows} == {"slow"}
    assert all(row["usd_per_h"] == 2.5 * row["n_replicas"] for row in rows)


def test_a_folder_or_the_trace_as_result(run: Run, trace: Path, tmp_path: Path) -> None:
    for out, says in ((tmp_path, "directory"), (trace, "not written over an input")):
        before = trace.read_bytes()
        status, _, err = run("tune", "fleet", trace, *SMALL, "--trials", 1, "--out", out)
        assert status == 2 and says in err.lower() and err.count("\n") == 1
        assert trace.read_bytes() == before


def test_a_trace_that_is_not_there(run: Run, tmp_path: Path) -> None:
    status, _, err = run("tune", "fleet", tmp_path / "none.jsonl")
    assert status == 2 and err.count("\n") == 1 and "none.jsonl" in err


def test_tune_alone_asks_for_a_machine_and_says_so(run: Run) -> None:
    status, _, err = run("tune", "--tier", "dram")
    assert status == 2 and "--profile" in err and err.count("\n") == 1
    status, said, _ = run("tune", "--help")
    lines = [line for line in said.splitlines() if "--profile" in line or "--tier" in line]
    assert status == 0 and len(lines) == 2
    assert all(line.startswith("│ *") or "[required]" in line for line in lines), lines
