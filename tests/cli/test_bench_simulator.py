"""`cachetune bench simulator` at tiny sizes: figures, checks, plot, errors."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from .file_cases import Run


def test_it_measures_and_draws(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "simulator.json"
    sizes = ("--first", 30, "--replicas", "2", "--series", "50,200", "--repeats", 1)
    status, said, err = run(
        "bench", "simulator", *sizes, "--trials", 2, "--workers", 1, "--out", out
    )
    assert status == 0, err
    result = json.loads(out.read_text())
    assert [r["n_requests"] for r in result["rows"]] == [30, 50, 200]
    for row in result["rows"]:
        assert row["requests_per_cpu_s"] == pytest.approx(row["n_requests"] / row["cpu_s"])
        assert 10 < row["peak_mib"] <= row["peak_mib_at_end"]
    assert result["study"]["n_trials"] == 2 and result["study"]["front"]
    kept = {c["what"]: c for c in result["checks"]}
    assert kept["cold start: CPU s"]["limit"] == 5.0
    assert "1,000,000 short: CPU s" not in kept, "what was not measured is not judged"
    assert result["provenance"]["commit"] and result["trace"]["made"] == "rag"
    assert len(result["published"]) == 4
    assert ElementTree.parse(out.with_suffix(".svg")).getroot().tag.endswith("svg")
    assert len(json.loads(said.splitlines()[-1])["requests_per_cpu_s"]) == 3


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--replicas", "1,two"), "--replicas must be"),
        (("--series", "0"), "--series must be"),
        (("--trace", "nowhere.jsonl"), "nowhere.jsonl"),
    ],
)
def test_errors_are_one_line(run: Run, args: tuple[object, ...], words: str) -> None:
    status, out, err = run("bench", "simulator", *args)
    assert (status, out) == (2, "")
    assert len(err.strip().splitlines()) == 1 and words in err
