"""A measured grid: a fixed list of plans, written down before any tuning, run for real.

It is what the tuned plan is held against. The run is resumable: every measurement is one line of
a JSONL file, written when it is made; a second run does what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from ..core.errors import PlanError
from ..core.plan import RatioRule, ReusePlan
from ..core.record import append_line, parse_json, write_json
from ..core.workload import Workload
from .measure import Bench, Measured, Progress, order_of_turn, paired

if TYPE_CHECKING:
    from ..runtime.runner import Runner

STRUCTURES: tuple[dict[str, Any], ...] = (
    {"layer_group": 1},
    {"layer_group": 2},
    {"layer_group": 4},
    {"layer_group": 1, "restore_stream": "compute"},
    {"layer_group": 2, "restore_stream": "compute", "look_ahead": 1},
    {"layer_group": 2, "look_ahead": 4, "n_io_workers": 2},
    {"layer_group": 2, "load_order": "chunk"},
    {"layer_group": 4, "load_order": "chunk", "n_io_workers": 2, "restore_stream": "compute"},
)
"""Stream schedules that every ratio of the grid is combined with."""

SLOW_MS = 1000.0
"""Runs that take longer need no warm-up: they mostly wait for a limited tier."""

RATIO_SHARES = (0.0, 0.05, 0.12, 0.22, 0.35, 0.5, 0.7, 0.9)
"""Ratios as shares of the way from the smallest allowed one to 1."""


def grid_plans(ratio_min: float = 0.15, n_layers: int = 4) -> list[ReusePlan]:
    """At least 70 plans: ratios x structures, and the exact policies."""
    plans = []
    for share in RATIO_SHARES:
        ratio = round(ratio_min + share * (1.0 - ratio_min), 3)
        for knobs in STRUCTURES:
            plans.append(_plan("cachetune", ratio, **knobs))
    groups = sorted({1, 2, n_layers})
    for layer_group in groups:
        plans.append(_plan("full_recompute", 1.0, layer_group=layer_group))
        plans.append(_plan("prefix_cache", 1.0, layer_group=layer_group))
    plans.append(_plan("cacheblend", max(ratio_min, 0.15)))
    return plans


def write_list(
    path: str | Path, plans: Sequence[ReusePlan], tier: str, workload: Workload, seed: int = 0
) -> None:
    """Write the fixed list; a list that is there already must be the same.

    Raises:
        PlanError: another list is there.
    """
    data = {
        "tier": tier,
        "workload_fingerprint": workload.fingerprint(),
        "seed": seed,
        "plans": [plan.model_dump(mode="json") for plan in plans],
    }
    path = Path(path)
    if not path.exists():
        write_json(path, data)
    elif _load(path) != data:
        raise PlanError(
            "a grid's list is fixed once it is written",
            values=f"{path} holds another list",
            remedy="use another path, or remove the file and its measurements",
        )


def read_list(path: str | Path) -> tuple[dict[str, Any], list[ReusePlan]]:
    """(head, plans) of a list.

    Raises:
        PlanError: no list is there, or the file holds something else.
    """
    try:
        head = _load(path)
        plans = [ReusePlan.model_validate_json(json.dumps(p)) for p in head.pop("plans")]
        return {key: head[key] for key in ("tier", "workload_fingerprint", "seed")}, plans
    except (KeyError, TypeError, AttributeError, ValueError):
        raise _broken(path) from None


def _load(path: str | Path) -> Any:
    try:
        return parse_json(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise PlanError(
            "the grid's list must be readable",
            values=f"{path}: {e.strerror}",
            remedy="check the path",
        ) from None
    except ValueError:
        raise _broken(path) from None


def _broken(path: str | Path) -> PlanError:
    return PlanError(
        "the grid's list and rows must be whole",
        values=f"{path} holds something else",
        remedy="remove both files and measure again",
    )


def run_grid(
    runner: Runner,
    workload: Workload,
    list_path: str | Path,
    rows_path: str | Path,
    *,
    n_repeats: int = 5,
    n_requests: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure what is missing of the list; returns the result, see `result`.

    Raises:
        PlanError: the list is of another workload.
    """
    head, plans = read_list(list_path)
    if head["workload_fingerprint"] != workload.fingerprint():
        raise PlanError(
            "a grid is measured with the workload of its list",
            values=f"list {head['workload_fingerprint']}, workload {workload.fingerprint()}",
            remedy="pass that workload, or write another list",
        )
    done = read_rows(rows_path)
    bench = Bench(runner, workload, head["tier"], n_requests)
    missing = [
        (turn, i)
        for turn in range(n_repeats)
        for i in order_of_turn(len(plans), turn, head["seed"])
        if (i, turn) not in done
    ]
    warm: set[int] = set()
    for n, (turn, i) in enumerate(missing, start=1):
        ttft_ms = bench.once(plans[i])
        # First touch faults pages in and fills caches; a wait of seconds hides that.
        if i not in warm and ttft_ms < SLOW_MS:
            ttft_ms = bench.once(plans[i])
        warm.add(i)
        append_line(rows_path, json.dumps({"plan": i, "turn": turn, "ttft_ms": ttft_ms}))
        done[i, turn] = ttft_ms
        if progress is not None:
            progress(n, len(missing))
    return result(head, plans, done)


def read_rows(path: str | Path) -> dict[tuple[int, int], float]:
    """TTFT in ms by (plan, turn). A line that an interruption cut off is taken out of the file."""
    path = Path(path)
    if not path.exists():
        return {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) != len(data):
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    try:
        rows = [json.loads(line) for line in whole.splitlines()]
        return {(row["plan"], row["turn"]): row["ttft_ms"] for row in rows}
    except (KeyError, TypeError, ValueError):
        raise _broken(path) from None


def result(
    head: dict[str, Any], plans: Sequence[ReusePlan], done: dict[tuple[int, int], float]
) -> dict[str, Any]:
    """The grid as JSON: a row per plan, the fastest first, with raw values and provenance."""
    from ..runtime.machine import provenance_here

    rows = []
    for i, plan in enumerate(plans):
        times = [ms for (which, _), ms in sorted(done.items()) if which == i]
        if times:
            measured = Measured(tuple(times))
            row = {"plan_number": i, "ttft_ms_median": measured.median, "spread": measured.spread}
            rows.append({**row, "ttft_ms": times, "plan": plan.model_dump(mode="json")})
    rows.sort(key=lambda row: (row["ttft_ms_median"], row["plan_number"]))
    provenance = provenance_here(head["seed"], "cachetune bench grid").model_dump(mode="json")
    return {**head, "n_plans": len(plans), "rows": rows, "provenance": provenance}


def compare(
    bench: Bench,
    grid: dict[str, Any],
    tuned: ReusePlan,
    *,
    n_best: int = 3,
    n_repeats: int = 15,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure the tuned plan and the grid's best again, interleaved, and `relate` them."""
    best = [ReusePlan.model_validate_json(json.dumps(r["plan"])) for r in grid["rows"][:n_best]]
    measured = bench.interleaved([tuned, *best], n_repeats, seed=seed)
    times = [list(m.ttft_ms) for m in measured]
    return {
        **relate(times[0], times[1:]),
        "tuned_ttft_ms": times[0],
        "tuned_spread": measured[0].spread,
        "grid_ttft_ms": times[1:],
        "grid_plan_numbers": [r["plan_number"] for r in grid["rows"][:n_best]],
    }


def relate(tuned_ms: Sequence[float], grid_ms: Sequence[Sequence[float]]) -> dict[str, Any]:
    """How the tuned plan stands to the fastest of the grid's plans in the same turns.

    `ratio` relates their `paired` shares, as confirmation does: a slow moment hits all plans of a
    turn alike. The grid has the advantage of a minimum. `ratio_of_medians` forgets the turns;
    `ratio_low` and `ratio_high` are the quartiles turn by turn.
    """
    shares = paired([Measured(tuple(times)) for times in (tuned_ms, *grid_ms)])
    fastest = min(range(len(grid_ms)), key=lambda i: shares[i + 1])
    by_turn = sorted(a / b for a, b in zip(tuned_ms, grid_ms[fastest], strict=True))
    n = len(by_turn)
    return {
        "ratio": shares[0] / shares[fastest + 1],
        "ratio_low": by_turn[n // 4],
        "ratio_high": by_turn[(3 * n - 1) // 4],
        "ratio_of_medians": median(tuned_ms) / min(median(times) for times in grid_ms),
        "fastest": fastest,
    }


def _plan(policy: str, ratio: float, **knobs: Any) -> ReusePlan:
    load_exact = policy != "full_recompute"
    rules = (RatioRule(ratios=(ratio,), load_exact=load_exact),)
    return ReusePlan.model_validate({"policy": policy, "rules": rules, **knobs})
