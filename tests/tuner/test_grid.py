"""The grid: fixed before it is measured, resumable, and compared in one interleaved run."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cachetune.cli.bench_grid import kept
from cachetune.core import record
from cachetune.core.errors import CacheTuneError, PlanError
from cachetune.core.plan import ReusePlan
from cachetune.core.workload import Workload
from cachetune.tuner import grid as grid_module
from cachetune.tuner.grid import (
    compare,
    grid_plans,
    read_list,
    read_rows,
    relate,
    run_grid,
    write_list,
)
from cachetune.tuner.measure import Bench, Measured, order_of_turn, paired

N_PLANS = 5


class FakeBench:
    """Takes as long as the plan's ratio says; stops after `n_left` measurements."""

    interleaved = Bench.interleaved
    n_left = 10**9
    n_calls = 0

    def __init__(self, *_: object) -> None:
        pass

    def once(self, plan: ReusePlan) -> float:
        if not FakeBench.n_left:
            raise KeyboardInterrupt
        FakeBench.n_left -= 1
        FakeBench.n_calls += 1
        return 100.0 * plan.rules[0].ratios[0]


Run = Callable[..., dict[str, Any]]


@pytest.fixture
def paths(tmp_path: Path, workload: Workload) -> tuple[Path, Path]:
    FakeBench.n_left, FakeBench.n_calls = 10**9, 0
    write_list(tmp_path / "list.json", grid_plans()[::13][:N_PLANS], "mid", workload)
    return tmp_path / "list.json", tmp_path / "rows.jsonl"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, paths: tuple[Path, Path], workload: Workload) -> Run:
    monkeypatch.setattr(grid_module, "Bench", FakeBench)
    return lambda: run_grid(None, workload, *paths, n_repeats=4)  # type: ignore[arg-type]


@pytest.mark.parametrize("ratio_min", [0.0, 0.15, 0.5])
@pytest.mark.parametrize("n_layers", [4, 12])
def test_at_least_sixty_different_plans(ratio_min: float, n_layers: int) -> None:
    plans = grid_plans(ratio_min, n_layers)
    assert len({p.fingerprint() for p in plans}) == len(plans) >= 60
    assert min(r for p in plans for r in p.rules[0].ratios) >= ratio_min
    assert {p.policy for p in plans} >= {"cachetune", "full_recompute", "prefix_cache"}


def test_a_list_is_fixed(paths: tuple[Path, Path], workload: Workload) -> None:
    before = paths[0].read_bytes()
    write_list(paths[0], grid_plans()[::13][:N_PLANS], "mid", workload)
    assert paths[0].read_bytes() == before
    with pytest.raises(PlanError, match="fixed"):
        write_list(paths[0], grid_plans()[:3], "mid", workload)


def test_another_workload_is_refused(paths: tuple[Path, Path], workload: Workload) -> None:
    with pytest.raises(PlanError, match="workload"):
        run_grid(None, workload.replace(name="x"), *paths)  # type: ignore[arg-type]


def test_resumes_after_an_interruption(run: Run, paths: tuple[Path, Path]) -> None:
    FakeBench.n_left = 11
    with pytest.raises(KeyboardInterrupt):
        run()
    with open(paths[1], "a") as file:  # the line that was being written
        file.write('{"plan": 0, "tu')
    kept = dict(read_rows(paths[1]))
    assert 0 < len(kept) < 4 * N_PLANS
    FakeBench.n_left, FakeBench.n_calls = 10**9, 0
    result = run()
    missing = 4 * N_PLANS - len(kept)
    assert FakeBench.n_calls == missing + N_PLANS  # and one warm-up per plan
    rows = [json.loads(line) for line in paths[1].read_text().splitlines()]
    assert sorted((r["plan"], r["turn"]) for r in rows) == [
        (p, t) for p in range(N_PLANS) for t in range(4)
    ]
    assert len(result["rows"]) == N_PLANS
    assert all(len(row["ttft_ms"]) == 4 for row in result["rows"])
    medians = [row["ttft_ms_median"] for row in result["rows"]]
    assert medians == sorted(medians)
    assert result["provenance"]["command"] == "cachetune bench grid"


def test_a_finished_grid_measures_nothing(run: Run) -> None:
    first = run()
    FakeBench.n_left = 0
    assert run()["rows"] == first["rows"]


def test_compare_measures_again_in_the_same_run(run: Run) -> None:
    result = run()
    bench = FakeBench()
    fast = ReusePlan.model_validate_json(json.dumps(result["rows"][0]["plan"]))
    even = compare(bench, result, fast, n_repeats=4)  # type: ignore[arg-type]
    assert even["ratio"] == even["ratio_low"] == even["ratio_high"] == 1.0
    slow = ReusePlan.model_validate_json(json.dumps(result["rows"][-1]["plan"]))
    worse = compare(bench, result, slow, n_repeats=4)  # type: ignore[arg-type]
    assert worse["ratio"] > 1.5
    assert worse["grid_plan_numbers"][worse["fastest"]] == result["rows"][0]["plan_number"]
    assert len(worse["grid_ttft_ms"]) == 3


def test_a_slow_moment_of_the_machine_does_not_decide() -> None:
    moments = [1.0, 1.0, 3.0, 1.0, 1.1, 2.0, 1.0]
    tuned = [10.0 * m for m in moments]
    found = relate(tuned, [[11.0 * m for m in moments], [13.0 * m for m in moments]])
    assert found["ratio"] == pytest.approx(10 / 11)
    assert found["fastest"] == 0
    same = relate([10.0 * m for m in moments], [[10.0 * m for m in moments]])
    assert same["ratio"] == same["ratio_of_medians"] == pytest.approx(1.0)


def test_turns_are_permutations_that_differ() -> None:
    turns = [order_of_turn(8, turn, seed=0) for turn in range(4)]
    assert all(sorted(turn) == list(range(8)) for turn in turns)
    assert len({tuple(turn) for turn in turns}) == 4
    assert order_of_turn(8, 2, seed=0) == turns[2]


def test_spread_is_the_distance_of_the_quartiles() -> None:
    assert Measured((10.0, 10.0, 10.0, 10.0)).spread == 0.0
    assert Measured((8.0, 9.0, 10.0, 11.0, 12.0)).spread == pytest.approx(0.2)


def test_paired_shares_cancel_slow_turns() -> None:
    slow_turns = (1.0, 5.0, 1.0)
    one = Measured(tuple(10.0 * s for s in slow_turns))
    two = Measured(tuple(40.0 * s for s in slow_turns))
    assert paired([one, two]) == pytest.approx([0.5, 2.0])


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("data", [b'{"tier": "m', b"[]\n", b'{"tier": "mid"}\n', b"\xff\n"])
def test_a_broken_file_is_said(
    run: Run, paths: tuple[Path, Path], which: int, data: bytes, workload: Workload
) -> None:
    if which == 1 and not data.endswith(b"\n"):
        data += b"\n"  # a last line without an end was cut short, and is measured again
    paths[which].write_bytes(data)
    with pytest.raises(PlanError, match=f"must be whole, got {paths[which]}"):
        run()
    if which == 0:
        with pytest.raises(PlanError, match=r"whole|fixed"):
            write_list(paths[0], grid_plans(), "mid", workload)
    assert paths[which].read_bytes() == data


def test_a_list_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="list must be readable"):
        read_list(tmp_path / "none.json")


def test_a_full_disk_keeps_what_was_measured(
    run: Run, paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    n_fit = 6

    def open_while_it_fits(path: Path, mode: str, **more: Any) -> Any:
        if mode == "a" and FakeBench.n_calls > n_fit:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return open(path, mode, **more)

    monkeypatch.setattr(record, "open", open_while_it_fits, raising=False)
    with pytest.raises(CacheTuneError, match=r"must be writable, got .*No space left") as e:
        run()
    monkeypatch.delattr(record, "open")
    assert "\n" not in str(e.value)
    kept_rows = read_rows(paths[1])
    assert 0 < len(kept_rows) < 4 * N_PLANS
    run()
    assert len(read_rows(paths[1])) == 4 * N_PLANS


def test_a_tier_s_result_is_of_its_settings(tmp_path: Path) -> None:
    path, asked = tmp_path / "mid.result.json", {"seed": 1, "trials": 20}
    assert kept(path, asked) is None
    path.write_text(json.dumps({"settings": asked, "tier": "mid"}))
    assert kept(path, asked) == {"tier": "mid"}
    for text in (json.dumps({"settings": {"seed": 2, "trials": 20}}), "{}", "[]", '{"tier'):
        path.write_text(text)
        with pytest.raises(CacheTuneError, match=r"mid.result.json of another seed") as e:
            kept(path, asked)
        assert "\n" not in str(e.value)
