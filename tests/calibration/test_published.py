"""Published results: sources are there, fits see nothing that is held out, bounds hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from cachetune.calibration.published import (
    MEDIAN_BOUND,
    P90_BOUND,
    Point,
    Scalar,
    Study,
    claim_rows,
    disorder_rows,
    ordered_pairs,
    summary,
)
from cachetune.calibration.published_break_even import break_even
from cachetune.calibration.published_cacheblend import cacheblend
from cachetune.calibration.published_cachetune import cachetune
from cachetune.calibration.published_cake import cake, cases
from cachetune.calibration.published_h200 import h200
from cachetune.calibration.published_numbers import NAMES, PublishedNumbers, published
from cachetune.core.errors import InvariantViolation, SchemaError

Cell = dict[str, Any]
Row = dict[str, Any]

MAKERS: dict[str, Callable[[PublishedNumbers], Study]] = {
    "cake": cake,
    "cachetune": cachetune,
    "kv_repair_h200": h200,
    "cacheblend": cacheblend,
    "py_kvcache": break_even,
}


def _cake(table: str, row: Row, column: str) -> bool:
    if column not in ("over_loading", "over_computing"):
        return column in ("chunk_ms", "kv_gb_per_s")
    if table == "one_gpu":
        return True
    settings = (row.get("share_percent", 100), row.get("n_tokens", 16384), row.get("kv_bits", 16))
    return settings != (100, 16384, 16)


def _cachetune(table: str, row: Row, column: str) -> bool:
    if table == "tiers":
        return column in ("speedup_tuned", "ratio_tuned")
    if table != "ttft":
        return False
    fitted = row.get("method") == "full_recompute" or (
        row.get("pool") == "gpu" and (row["method"] == "prefix_cache" or column == "samsum_s")
    )
    return column.endswith("_s") and not fitted


def _h200(table: str, row: Row, column: str) -> bool:
    fitted = row.get("method") in ("recompute", "shift") and column == "qwen3_32b_ms"
    return table == "ttft" and column.startswith("qwen3") and not fitted


def _break_even(table: str, row: Row, column: str) -> bool:
    shortest = {"break_even": 1024, "reuse": 8192}[table]
    return column in ("gb_per_s", "percent") and row["n_tokens"] != shortest


HELD_OUT: dict[str, Callable[[str, Row, str], bool]] = {
    "cake": _cake,
    "cachetune": _cachetune,
    "kv_repair_h200": _h200,
    "cacheblend": lambda table, row, column: column in ("recompute_ms", "load_ms"),
    "py_kvcache": _break_even,
}


def doubled(data: PublishedNumbers, held_out: Callable[[str, Row, str], bool]) -> PublishedNumbers:
    """The same numbers with every held-out one doubled."""
    found = json.loads(data.to_json())
    found.pop("schema_version")
    for table in found["tables"]:
        for values in table["rows"]:
            row = dict(zip(table["columns"], values, strict=True))
            for i, column in enumerate(table["columns"]):
                if held_out(table["name"], row, column):
                    values[i] *= 2
    return PublishedNumbers.model_validate_json(json.dumps(found))


@pytest.fixture(scope="module")
def studies() -> dict[str, Study]:
    return {name: MAKERS[name](published(name)) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_data_say_where_they_are_from_and_in_what_unit(name: str) -> None:
    data = published(name)
    assert data.paper and data.reference and data.settings
    assert data.read_from in ("text of the paper", "third-party notes")
    assert len({t.name for t in data.tables}) == len(data.tables)
    for table in data.tables:
        assert table.where and table.unit and table.rows
        assert len(set(table.rows)) == len(table.rows)
        numbers = [v for row in table.rows for v in row if not isinstance(v, str)]
        assert numbers and min(numbers) >= 0


@pytest.mark.parametrize("name", NAMES)
def test_predictions_do_not_move_with_the_numbers_they_predict(
    name: str, studies: dict[str, Study]
) -> None:
    before = studies[name]
    after = MAKERS[name](doubled(published(name), HELD_OUT[name]))
    assert [s.value for s in after.scalars] == [s.value for s in before.scalars]
    published_before = {p.name: p.published for p in before.points}
    moved = {p.name for p in after.points if p.published != published_before[p.name]}
    left = {p.name for p in before.held_out()} - moved
    assert left <= {"Qwen3-32B per recomputed token"}  # its range stays where it was
    assert not moved & before.fitted_names
    assert {p.name: p.predicted for p in after.points} == {
        p.name: p.predicted for p in before.points
    }


def test_every_published_cell_is_a_point_or_is_listed(studies: dict[str, Study]) -> None:
    pairs = sum(
        len(published("cake").table(t).rows)
        for t in ("shares", "lengths", "models", "precisions", "one_gpu")
    )
    repeated = 4 + 6 + 4 + 1  # settings of Table 3 that other tables print again
    assert len(cases(published("cake"))) == pairs - repeated
    assert len(studies["cake"].points) == 2 * (pairs - repeated) + 7
    methods = {p.name.split()[0] for p in studies["cachetune"].points}
    listed = " ".join(what for what, _ in studies["cachetune"].unmatched).lower()
    for row in published("cachetune").table("ttft").records():
        assert row["method"] in methods or row["method"] in listed
    for study in studies.values():
        assert all(what and why for what, why in study.unmatched)


def test_repeated_settings_were_published_with_the_same_numbers() -> None:
    data = published("cake")
    table3 = {(r["gpu"], r["share_percent"], r["gbps"]): r for r in data.table("shares").records()}
    for name in ("models", "lengths", "precisions"):
        for r in data.table(name).records():
            same = r.get("model", "LongAlpaca-13B") == "LongAlpaca-13B"
            if same and r.get("n_tokens", 16384) == 16384 and r.get("kv_bits", 16) == 16:
                key = (r.get("gpu", "2xA100"), r.get("share_percent", 100), r["gbps"])
                for column in ("over_loading", "over_computing"):
                    assert r[column] == table3[key][column]


def test_bounds_hold_and_so_does_nearly_every_order(studies: dict[str, Study]) -> None:
    rows = [r for r in summary(list(studies.values())) if r["study"] == "all"]
    assert [r["settings"] for r in rows] == ["stated", "partly assumed"]
    for row in rows:
        assert row["median_error"] <= MEDIAN_BOUND
        assert row["p90_error"] <= P90_BOUND
        assert row["met"]
    count, wrong = ordered_pairs(p for s in studies.values() for p in s.points if p.stated)
    assert count > 750
    # One line was published out of line over the length: 2.06, 2.15, 2.00, 2.00.
    assert {d.line for d in wrong} <= {"length: A100 LongAlpaca-13B 1.0 32.0 16 over_loading"}
    assert len(wrong) <= 2
    assert all(" 4K " in f"{d.first.name} {d.second.name}" for d in wrong)
    assert all(d.published_gap < 0.05 for d in wrong)


def test_what_comes_out_otherwise_has_a_reason(studies: dict[str, Study]) -> None:
    """And no reason stands where all is as published."""
    for study in studies.values():
        broken = {c.name for c in study.claims if not c.holds}
        assert set(study.reasons) == broken | {row["line"] for row in disorder_rows(study)}
        assert all(row["why"] for row in disorder_rows(study))
        assert all(bool(row["why"]) != row["holds"] for row in claim_rows(study))


def test_a_fitted_point_is_no_prediction() -> None:
    a, b = (Point(n, "", "s", 1.0, 1.5, 0.0) for n in "ab")
    study = Study("x", "", (a, b), (Scalar("k", 1.0, "1", ("a",)),), (), ())
    assert study.held_out() == [b]
    with pytest.raises(InvariantViolation):
        Study("x", "", (a, b), (Scalar("k", 1.0, "1", ("c",)),), (), ())


def test_order_counts_only_what_rounding_cannot_swap() -> None:
    def point(name: str, was: float, is_: float) -> Point:
        return Point(name, "", "x", was, is_, 0.005, lines=("line",))

    a, b, c = point("a", 1.00, 1.0), point("b", 1.01, 0.9), point("c", 1.2, 0.95)
    count, wrong = ordered_pairs([a, b, c])
    assert count == 2
    assert [(d.first, d.second) for d in wrong] == [(a, c)]


def test_an_unknown_table_and_a_short_row_are_refused() -> None:
    with pytest.raises(SchemaError, match="tables are per_layer"):
        published("cacheblend").table("ttft")
    with pytest.raises(SchemaError, match="must give the number gpu"):
        published("cacheblend").number("gpu")
    text = published("cacheblend").to_json().replace('"load_ms"\n', '"load_ms",\n "more"\n')
    with pytest.raises(SchemaError, match="must have 4 columns"):
        PublishedNumbers.parse(text, "file")
