"""`validate published` prints what it keeps, and refuses an output it cannot write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cachetune.calibration import published
from cachetune.calibration.published_break_even import break_even
from cachetune.calibration.published_cacheblend import cacheblend
from cachetune.cli.validate_published import validate_published
from cachetune.core.errors import CacheTuneError


@pytest.fixture(autouse=True)
def _two_studies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "studies", lambda: [cacheblend(), break_even()])


def test_the_file_holds_what_the_last_line_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "validate-published.json"
    validate_published(out)
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    kept = json.loads(out.read_text())
    assert {k: kept[k] for k in line} == line
    assert line["points"] == 4
    assert line["scalars"] == 2 == len(kept["fitted"])
    assert line["unmatched"] == len(kept["not_matched"]) > 0
    assert {r["role"] for r in kept["rows"]} == {"fitted", "predicted"}
    assert kept["provenance"]["commit"]
    assert set(kept["sources"]) == set(kept["assumed"]) == {"cacheblend", "break_even"}


def test_an_output_that_cannot_be_written_is_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CacheTuneError, match="the output file must be writable"):
        validate_published(tmp_path)
    assert not capsys.readouterr().out
