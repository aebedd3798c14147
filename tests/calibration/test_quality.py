"""Answers on the real runtime: what reuse breaks, what restores it, and the files that say so."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from cachetune.calibration.quality import Arm, Tally, all_arms, evaluate
from cachetune.calibration.quality_log import QualityLog
from cachetune.calibration.quality_table import TableRow, make_table, profile_of
from cachetune.calibration.task_file import (
    TaskRecord,
    library_of,
    read_task_file,
    toy_library,
    toy_records,
)
from cachetune.calibration.toy_model import TOY_FOLDER
from cachetune.cli import main
from cachetune.core.errors import ProfileError, WorkloadError
from cachetune.core.plan import RatioRule, ReusePlan
from cachetune.core.quality import QualityProfile
from cachetune.runtime.loaded_model import LoadedModel, load_model

SEED = 11
CONTEXTS = (("running_header", 0), ("running_header", 1), ("recall", 0))
RATIOS = (0.05, 0.15)

Found = list[tuple[str, int, list[Tally]]]


@pytest.fixture(scope="module")
def toy() -> LoadedModel:
    return load_model(TOY_FOLDER)


@pytest.fixture(scope="module")
def found(toy: LoadedModel) -> Found:
    texts = toy_library(SEED)
    records = toy_records(SEED, 2)
    records["recall"].pop()
    asked = evaluate(toy, records, lambda task, i: texts[task], seed=SEED, ratios=RATIOS)
    return list(asked)


@pytest.fixture(scope="module")
def table(found: Found) -> list[TableRow]:
    return make_table(found, SEED)


def row_of(
    table: list[TableRow], task: str, policy: str, selector: str = "", ratio: float | None = None
) -> TableRow:
    """The one row of that name."""
    key = (task, policy, selector)
    rows = [r for r in table if (r.task, r.policy, r.selector) == key]
    return next(r for r in rows if ratio is None or r.ratio == ratio)


def a_record(**changes: object) -> dict[str, object]:
    """A line of a task file for any vocabulary of ten tokens or more."""
    fields: dict[str, object] = {
        "task": "mine",
        "chunks": [[5, 9, 2, 8], [7, 7, 1, 3]],
        "suffix": [3, 4, 8],
        "answer_positions": [0, 2],
        "answers": [4, 6],
    }
    return {**fields, **changes}


def test_every_arm_is_asked_in_every_context(found: Found) -> None:
    assert tuple((task, i) for task, i, _ in found) == CONTEXTS
    for _, _, tallies in found:
        assert [t.arm for t in tallies] == all_arms(RATIOS)


def test_full_recompute_can_do_both_tasks(table: list[TableRow]) -> None:
    for task in ("running_header", "recall"):
        row = row_of(table, task, "full_recompute")
        assert row.overall[0] >= 0.9 and row.score == (1, 1, 1)


def test_blind_reuse_fails_across_chunks_only(table: list[TableRow]) -> None:
    header = row_of(table, "running_header", "full_reuse")
    assert header.cross is not None and header.cross[0] <= 0.3
    assert header.local is not None and header.local[0] >= 0.8
    recall = row_of(table, "recall", "full_reuse")
    assert recall.cross is None and recall.score[0] >= 0.95


def test_the_dependent_tokens_restore_the_answers(table: list[TableRow]) -> None:
    full = row_of(table, "running_header", "full_recompute").cross
    best = row_of(table, "running_header", "cachetune", "dependent_first", 0.15).cross
    blind = row_of(table, "running_header", "full_reuse").cross
    assert full and best and blind
    assert best[0] >= full[0] - 0.1 and best[0] >= blind[0] + 0.5


def test_the_budget_is_what_the_runtime_computed(table: list[TableRow]) -> None:
    """64 tokens a chunk, the first of the prompt left out: floor(r * 64) of each other."""
    for row in table:
        if row.policy in ("cachetune", "epic", "cacheblend"):
            assert row.share == pytest.approx(int(row.ratio * 64 + 1e-9) / 64)
    assert row_of(table, "recall", "full_reuse").share == 0
    assert row_of(table, "recall", "full_recompute").share == 1


def test_profile_round_trips_and_interpolates(table: list[TableRow], tmp_path: Path) -> None:
    profile = profile_of(table, "f" * 16, None)
    profile.write(tmp_path / "quality.json")
    assert QualityProfile.read(tmp_path / "quality.json") == profile

    def score(ratio: float) -> float:
        rule = RatioRule(ratios=(ratio,))
        value = profile.score(ReusePlan(selector="high_pass", rules=(rule,)), 64)
        assert value is not None
        return value

    tasks = ("running_header", "recall")
    for ratio in RATIOS:
        rows = [row_of(table, t, "cachetune", "high_pass", ratio) for t in tasks]
        assert score(ratio) == pytest.approx(min(r.score[0] for r in rows))
    assert score(0.10) == pytest.approx((score(0.05) + score(0.15)) / 2)
    assert score(0.0) == min(row_of(table, t, "full_reuse").score[0] for t in tasks)
    epic = profile.score(ReusePlan(policy="epic", epic_tokens=9), 64)
    rows = [row_of(table, t, "epic", "chunk_start", 0.15) for t in tasks]
    assert epic == pytest.approx(min(r.score[0] for r in rows))


def test_intervals_are_the_seed_s(found: Found, table: list[TableRow]) -> None:
    assert make_table(found, SEED) == table
    in_another_order = make_table(reversed(found), SEED)
    assert sorted(map(str, in_another_order)) == sorted(map(str, table))


def test_an_interval_covers_the_spread_between_contexts() -> None:
    full, blind = Arm("full_recompute", "", 1.0), Arm("full_reuse", "", 0.0)
    right = [2, 4, 6, 8] * 10
    found = [
        ("t", i, [Tally(full, 1.0, (0, 0, 0, 0, 10, 10)), Tally(blind, 0.0, (0, 0, 0, 0, r, 10))])
        for i, r in enumerate(right)
    ]
    row = make_table(found, 0)[1]
    assert make_table(found, 0)[1] == row != make_table(found, 1)[1]
    value, low, high = row.score
    standard_error = float(np.std(np.array(right) / 10)) / len(right) ** 0.5
    assert value == pytest.approx(0.5) and row.cross is None
    assert high - low == pytest.approx(2 * 1.96 * standard_error, rel=0.1)


def test_no_score_without_a_right_answer() -> None:
    none = [("t", 0, [Tally(Arm("full_recompute", "", 1.0), 1.0, (0, 0, 0, 0, 0, 5))])]
    with pytest.raises(ProfileError, match="full recompute must answer something"):
        make_table(none, 0)


def test_a_log_resumes_and_drops_a_torn_line(found: Found, tmp_path: Path) -> None:
    path = tmp_path / "q.partial.jsonl"
    log = QualityLog(path, {"seed": SEED})
    for one in found[:2]:
        log.add(one)
    whole = path.read_text()
    path.write_text(whole + whole.splitlines()[1][:200])
    again = QualityLog(path, {"seed": SEED})
    assert [f[:2] for f in again.found] == [f[:2] for f in found[:2]]
    assert make_table(again.found, SEED) == make_table(found[:2], SEED)
    assert again.has("running_header", 0) and not again.has("recall", 0)
    assert path.read_text() == whole
    with pytest.raises(WorkloadError, match="resumed"):
        QualityLog(path, {"seed": SEED + 1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answers": [4]}, "as many"),
        ({"answer_positions": [0, 3]}, "must lie in the suffix"),
        ({"chunks": [[1, 2], [1, 2]]}, "all different"),
        ({"chunks": [[1, 2], []]}, "at least one token"),
        ({"cross_chunk": [True]}, "2 booleans"),
        ({"dependent_tokens": [[], [4]]}, "indices of a chunk"),
        ({"answers": [4, 99999]}, "vocabulary"),
        ({"chunks": [[1] * 5000, [2]]}, "positions"),
        ({"answer": [4]}, "answer"),
    ],
)
def test_a_wrong_task_line_is_named(
    toy: LoadedModel, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps(a_record()) + "\n\n" + json.dumps(a_record(**changes)) + "\n")
    with pytest.raises(WorkloadError, match=rf"line 3.*{message}"):
        read_task_file(path, toy.spec)


def test_a_library_leaves_the_evaluated_context_out() -> None:
    one = TaskRecord.model_validate_json(json.dumps(a_record()))
    two = one.replace(chunks=(one.chunks[0], (1, 2)))
    assert library_of([one, two], 0) == [(1, 2)]
    assert library_of([one, two], 1) == [one.chunks[1]]


def test_a_task_file_goes_through_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Records without labels: no cross or local column, no upper bound; text of unequal length."""
    caplog.set_level(logging.ERROR)
    path, out = tmp_path / "tasks.jsonl", tmp_path / "q.json"
    lines = []
    for record in toy_records(SEED + 1, 2)["recall"]:
        chunks = (record.chunks[0], record.chunks[1], record.chunks[2][:40])
        known = {t for chunk in chunks for t in chunk}
        asked = [i for i, p in enumerate(record.answer_positions) if record.suffix[p] in known]
        fields = {
            "task": "short",
            "chunks": chunks,
            "suffix": record.suffix,
            "answer_positions": [record.answer_positions[i] for i in asked],
            "answers": [record.answers[i] for i in asked],
        }
        lines.append(json.dumps(fields))
    path.write_text("\n".join(lines))
    with pytest.raises(SystemExit) as stop:
        main.main(["bench", "quality", "--tasks", str(path), "--out", str(out), "--seed", "3"])
    assert stop.value.code == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["command"] == "bench quality" and last["tasks"] == {"short": 2}
    assert all(row["cross"] is None and row["n_cross"] == 0 for row in last["rows"])
    assert "dependent_first" not in {row["selector"] for row in last["rows"]}
    profile = QualityProfile.read(out)
    assert profile.provenance is not None and profile.provenance.seed == 3
    assert len(profile.rows) == len(last["rows"])
    assert (tmp_path / "q.csv").read_text().startswith("# {")
    assert len((tmp_path / "q.raw.jsonl").read_text().splitlines()) == 3
    assert not (tmp_path / "q.json.partial.jsonl").exists()


def test_the_shipped_profile_is_the_shipped_model_s(toy: LoadedModel) -> None:
    profile = QualityProfile.read(TOY_FOLDER / "quality.json")
    assert profile.model_fingerprint == toy.fingerprint
    assert profile.score(ReusePlan(), 64) is not None
