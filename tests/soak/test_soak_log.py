"""The log of the soaks: what is skipped, what is run again, what a crash leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .soak_log import SOAKS, Counts, Soak, SoakLog, summary_of, summary_text

pytestmark = pytest.mark.slow


def test_rounds_that_passed_are_skipped_and_failed_ones_run_again(tmp_path: Path) -> None:
    seen: list[int] = []
    bad = {1}

    def one_round(number: int) -> Counts:
        seen.append(number)
        if number in bad:
            raise ValueError(f"number {number}")
        return {"reads": 2, "rss_max": number}

    soak = Soak("v1", rounds=3, folder=tmp_path)
    with pytest.raises(AssertionError, match="replay: pytest this --replay 1"):
        soak.run("kills", "this", one_round)
    assert seen == [0, 1, 2]
    bad.clear()
    soak.run("kills", "this", one_round)
    assert seen == [0, 1, 2, 1]
    Soak("v2", rounds=2, folder=tmp_path).run("kills", "this", one_round)
    assert seen == [0, 1, 2, 1, 0, 1]
    found = summary_of("v1", tmp_path)
    kills = found["soaks"]["kills"]
    assert (kills["passed"], kills["failed"], kills["of"]) == (3, 0, SOAKS["kills"])
    assert kills["counts"] == {"reads": 6, "rss_max": 2}
    assert not found["complete"]
    assert json.loads(summary_text(found)) == found
    assert "[2," in summary_text(found)


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    log = SoakLog("load", "v", tmp_path)
    log.append(0, "passed", 1.0, {})
    log.append(1, "passed", 1.0, {})
    data = log.path.read_bytes()
    log.path.write_bytes(data[:-9])
    log = SoakLog("load", "v", tmp_path)
    assert log.is_done(0) and not log.is_done(1)
    log.append(1, "passed", 1.0, {})
    assert SoakLog("load", "v", tmp_path).is_done(1)
