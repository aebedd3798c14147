"""`RequestTable`: rules of its columns, rows taken out of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cachetune.core.errors import WorkloadError
from cachetune.core.request_table import RequestTable, renumbered


def make_table(**changes: Any) -> RequestTable:
    """Four rows; row 2 follows row 0, row 3 follows row 2."""
    columns: dict[str, Any] = dict(
        name="t",
        arrival_ns=np.array([10, 20, 5, 7], np.int64),
        prompt_tokens=np.array([30, 30, 40, 9], np.int32),
        output_tokens=np.array([1, 2, 3, 4], np.int32),
        chunk_start=np.array([0, 2, 3, 6, 6], np.int64),
        chunk_ids=np.array([0, 1, 3, 0, 1, 2], np.int32),
        chunk_tokens=np.array([10, 20, 5, 30], np.int32),
        after=np.array([-1, -1, 0, 2], np.int32),
        tenant=np.array([0, 1, 0, 0], np.int16),
        slo_class=np.zeros(4, np.int16),
        tenants=("a", "b"),
        chunk_names=("w", "x", "y", "z"),
    )
    return RequestTable(**{**columns, **changes})


def test_a_good_table_passes_and_knows_its_times():
    table = make_table()
    table.check()
    assert len(table) == 4 and table.chunks_of(2).tolist() == [0, 1, 2]
    assert table.nominal_ns().tolist() == [10, 20, 15, 22]
    assert table.roots().tolist() == [0, 1, 0, 0]
    assert table.duration_s() == 12e-9
    assert table.rows_of_chunks().tolist() == [0, 0, 1, 2, 2, 2]


def test_long_conversations_are_summed_fast():
    n = 200_000
    table = make_table(
        arrival_ns=np.full(n, 3, np.int64), after=np.arange(-1, n - 1, dtype=np.int32)
    )
    assert table.nominal_ns()[-1] == 3 * n and not table.roots().any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_tokens": np.array([30, 0, 40, 9], np.int32)}, "prompt_tokens.* 0 in row 1"),
        ({"output_tokens": np.array([1, 2, -3, 4], np.int32)}, "output_tokens.* -3 in row 2"),
        ({"arrival_ns": np.array([20, 10, 5, 7], np.int64)}, "backwards.* 10 in row 1"),
        ({"arrival_ns": np.array([10, 20, -5, 7], np.int64)}, "pause.* -5 in row 2"),
        ({"after": np.array([-1, 1, 0, 2], np.int32)}, "follows an earlier one.* 1 in row 1"),
        ({"tenant": np.array([0, 2, 0, 0], np.int16)}, "tenant is below 2.* 2 in row 1"),
        ({"prompt_tokens": np.array([30, 29, 40, 9], np.int32)}, "fit into it.* 30 in row 1"),
        ({"output_tokens": np.ones(3, np.int32)}, "equal lengths"),
        ({"chunk_start": np.array([0, 2, 3, 6, 5], np.int64)}, "chunk_start rises"),
        ({"chunk_ids": np.array([0, 1, 3, 0, 1, 4], np.int32)}, "up to the number of chunks"),
        ({"chunk_ids": np.array([0, 1, 3, 0, 1, -1], np.int32)}, "up to the number of chunks"),
        ({"chunk_tokens": np.array([10, 20, 0, 30], np.int32)}, "at least 1 token"),
        ({"chunk_names": ("w",)}, "has a name"),
        ({"arrival_ns": np.zeros(0, np.int64)}, "at least one request"),
    ],
)
def test_broken_rules_name_the_row(changes: dict[str, Any], message: str):
    with pytest.raises(WorkloadError, match=message):
        make_table(**changes).check()


def test_taken_rows_keep_what_they_are():
    table = make_table()
    taken = table.take(np.array([1, 0, 2]), why="sorted")
    assert taken.after.tolist() == [-1, -1, 1]
    assert taken.prompt_tokens.tolist() == [30, 30, 40]
    named = [[taken.chunk_name(int(c)) for c in taken.chunks_of(r)] for r in range(3)]
    assert named == [["z"], ["w", "x"], ["w", "x", "y"]]
    assert taken.provenance == {"why": "sorted"} and table.provenance == {}
    fewer = table.take(np.array([1]))
    assert fewer.chunk_tokens.tolist() == [30] and fewer.chunk_names == ("z",)
    with pytest.raises(WorkloadError, match="row 3 follows row 2"):
        table.take(np.array([0, 3]))
    with pytest.raises(WorkloadError, match="at least one"):
        table.take(np.zeros(0, np.int64))


def test_a_rate_so_low_that_times_overflow_is_refused():
    with pytest.raises(WorkloadError, match="within 146 years"):
        make_table().scaled(1e-18)


def test_a_scaled_rate_moves_arrivals_only():
    table = make_table().scaled(2.0)
    assert table.arrival_ns.tolist() == [5, 10, 5, 7]
    assert table.provenance["scale_rate"] == "2"


def test_renumbered():
    used, ids = renumbered(np.array([7, 2, 7]), 9)
    assert used.tolist() == [2, 7] and ids.tolist() == [1, 0, 1]
