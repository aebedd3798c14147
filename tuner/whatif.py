"""Capacity planning: what a question's candidates carry, need and cost.

    question = Question(model=..., slo=..., traffic=Traffic(text="rag:..."), target_rps=20)
    rows = sweep(plan, [task_of(question, c) for c in candidates], workers=2)
    first = best(rows, target=True)

Each candidate is one task of a sweep (`tuner/sweep.py`), told and answered in JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..core.catalogue import GpuRow, load_catalogue
from ..core.errors import CacheTuneError, ProfileError
from ..simulator.serving_fleet import ReusePolicy
from .candidate import Candidate, kernels_of
from .capacity import Capacity, find_capacity, keeps
from .fleet_size import fleet_row, per_mtok, tokens_per_s
from .kernel_bounds import band_row
from .question import LIMITS, Question, runner
from .trial import Trial

ROW_VERSION = 7
"""Of what a row holds: a journal with rows of another is not taken."""
FULL = 4
"""A run that has more than its requests over this in the system at a time is not a steady state."""


def task_of(question: Question, candidate: Candidate) -> dict[str, Any]:
    """The task of a sweep: both, as JSON."""
    return {
        "row_version": ROW_VERSION,
        "question": question.model_dump(mode="json"),
        "candidate": candidate.model_dump(mode="json"),
    }


def plan(task: Mapping[str, Any]) -> dict[str, Any]:
    """What one candidate carries, needs and costs; a row of the answer.

    A candidate that cannot do it is an answer, not an error: `why_not` says what is in the way.
    """
    question = Question.model_validate_json(json.dumps(task["question"]))
    candidate = Candidate.model_validate_json(json.dumps(task["candidate"]))
    row = _identity(question, candidate)
    try:
        _check(question, candidate)
        found = _capacity(question, candidate)
        row |= {"seeds": list(found.seeds)} | _capacity_row(question, candidate, found)
        if found.rate is not None:
            row |= band_row(question, candidate, found)
            row |= fleet_row(question, candidate, row)
    except CacheTuneError as e:
        row |= {"why_not": str(e)}
    return row


def _identity(question: Question, candidate: Candidate) -> dict[str, Any]:
    machine = candidate.machine
    memory = candidate.memory(question.model)
    return {
        "name": candidate.name,
        "machine": candidate.machine_name,
        "tiers": candidate.tier_name,
        "policy": candidate.policy,
        "stored": candidate.stored if candidate.reuses else "none",
        "weights": candidate.engine.weights,
        "router": candidate.router,
        "eviction": candidate.eviction if candidate.reuses else "none",
        "traffic_shared": question.traffic.shared,
        "fingerprint": candidate.fingerprint(),
        "seeds": list(question.seeds),
        "kv_tokens": memory.kv_tokens,
        "kv_source": memory.measured or "itemised sum",
        "memory": [item.model_dump() for item in memory.items],
        "kernels": _kernels(machine.gpu),
        "provenance": [*machine.provenance(), *kernels_of(machine.gpu)],
        "why_not": "",
        "note": "",
    }


def _kernels(gpu: GpuRow) -> str:
    """`measured`, or whose stand in for the matmuls and attention."""
    kinds = [k["kind"] for k in kernels_of(gpu) if not k["figure"].endswith("elementwise")]
    donors = dict.fromkeys(k for k in kinds if k != "measured")
    if not donors:
        return "measured"
    whose = ", ".join(d.removeprefix("borrowed from ") for d in donors)
    return f"{'partly ' if 'measured' in kinds else ''}borrowed from {whose}"


def _check(question: Question, candidate: Candidate) -> None:
    longest = question.traffic.longest(question.runs.min_requests, question.seeds[0])
    candidate.check_fits(question.model, load_catalogue(), longest)


def _capacity(question: Question, candidate: Candidate) -> Capacity:
    return find_capacity(
        runner(question, candidate),
        question.attainment,
        question.seeds,
        tolerance=question.tolerance,
        most_rps=question.most_rps,
        seeds_at=question.seeds_at,
    )


def _capacity_row(question: Question, candidate: Candidate, found: Capacity) -> dict[str, Any]:
    row: dict[str, Any] = {"trials": [asdict(t) for t in found.trials]}
    if found.rate is None:
        row["why_not"] = _closest(question, found)
        row["closest_good_share"] = found.closest().good_share
        return row
    trial = found.at_capacity()
    row["note"] = _note(question, candidate, found)
    row |= {
        "rules": [r.model_dump() for r in _policy(question, candidate).rules()],
        "capacity_rps": found.rate.value,
        "capacity_low_rps": found.rate.low,
        "capacity_high_rps": found.rate.high,
        "at_least": found.at_least,
        "limit": _limit(question, found),
        "at_capacity": trial.metrics,
        **_price(candidate),
    }
    per_s = tokens_per_s(trial) * found.rate.value / trial.rate_rps
    row["usd_per_mtok"] = per_mtok(row["usd_per_h"], per_s)
    row["points"] = [
        {
            "rate_rps": t.rate_rps,
            "seed": t.seed,
            "good_share": t.good_share,
            "ttft_ms_p99": t.metrics["ttft_ms_p99"],
            "usd_per_mtok": per_mtok(row["usd_per_h"], tokens_per_s(t)),
        }
        for t in found.trials
        if keeps(t, question.attainment)
    ]
    return row


def _policy(question: Question, candidate: Candidate) -> ReusePolicy:
    return question.fleet(candidate).policy


def _note(question: Question, candidate: Candidate, found: Capacity) -> str:
    """What a reader should know of a capacity: what the runs could not show, what is not loaded."""
    notes = []
    at = found.at_capacity().metrics
    is_all = at["n_requests"] == question.traffic.n_whole
    if at["littles_law"][0] > at["n_requests"] / FULL:
        notes += [
            f"runs are too short: {at['littles_law'][0]:.0f} of {at['n_requests']} requests are in "
            "the system at a time; longer ones may show less, "
            + ("the trace has no more" if is_all else "--max-requests makes them")
        ]
    elif found.at_least and question.traffic.is_trace:
        notes += ["at least: the trace is too short for its conversations to show a higher rate"]
    elif found.at_least or any(_is_cut(question, t) for t in found.trials):
        most = question.length.max_requests
        notes += [
            f"at least: runs of {most} requests cannot show a higher rate, --max-requests can"
        ]
    whole, shown = question.traffic.n_whole, at["n_requests"] * len(found.seeds)
    if whole and shown < whole / 2:
        notes += [
            f"runs hold {100 * shown / whole:.2g} % of the trace; --seeds and --max-requests show "
            "more"
        ]
    if len(classes := at["good_share_by_class"]) > 1:
        kept = ", ".join(
            f"{100 * share:.4g} % of {name or 'no class'}" for name, share in classes.items()
        )
        notes += [f"at capacity {kept} keep their level"]
    share = at["unloaded_share"]
    if share > 0:
        notes += [
            f"{100 * share:.2g} % of prompt tokens are computed although a tier holds them: "
            "loading would have taken longer"
        ]
    return "; ".join(notes)


def _is_cut(question: Question, trial: Trial) -> bool:
    """Whether its queue grew but kept the level, and it was too short to tell how that ends."""
    n, traffic_s = trial.metrics["n_requests"], trial.metrics["traffic_s"]
    short = traffic_s < LIMITS * question.longest_ttft_s
    kept = trial.good_share >= question.attainment
    return kept and not trial.stable and short and n >= question.length.max_requests


def _closest(question: Question, found: Capacity) -> str:
    trial = found.closest()
    m = trial.metrics
    if trial.good_share >= question.attainment:
        return (
            f"the queue grows at any rate, or runs of {question.runs.horizon_s:g} s are too short "
            f"to tell; a longer --horizon shows it"
        )
    return (
        f"no rate keeps {question.asked}; closest: {100 * trial.good_share:.1f} % at "
        f"{trial.rate_rps:.3g} req/s, TTFT p99 {m['ttft_ms_p99']:.0f} ms "
        f"({100 * m['in_ttft']:.1f} % keep it), TPOT p99 {m['tpot_ms_p99']:.1f} ms "
        f"({100 * m['in_tpot']:.1f} %)"
    )


def _limit(question: Question, found: Capacity) -> str:
    """What is in the way of more: `TTFT`, `TPOT`, or `throughput` where only the queue grows."""
    assert found.rate is not None
    if found.grows:
        return "throughput"
    missed = [t for t in found.trials if t.good_share < question.attainment]
    over = [t for t in missed if t.rate_rps >= found.rate.value]
    if not over:
        return ""
    first = min(over, key=lambda t: (t.rate_rps, t.seed))
    return "TTFT" if first.metrics["in_ttft"] <= first.metrics["in_tpot"] else "TPOT"


def _price(candidate: Candidate) -> dict[str, Any]:
    try:
        return {"usd_per_h": candidate.machine.usd_per_h, "no_price": ""}
    except ProfileError as e:
        return {"usd_per_h": None, "no_price": str(e)}


def best(
    rows: Sequence[Mapping[str, Any]], target: bool, sure: bool = True
) -> Mapping[str, Any] | None:
    """The cheapest that does it; without prices, the fewest replicas or the highest capacity.

    If `sure`, at the unfavourable end of its interval: what is cheap only if a wide interval turns
    out well does not win. Of equals, the one that was named first.
    """
    able = [r for r in rows if not r["why_not"]]
    priced = [r for r in able if r["usd_per_h"] is not None]
    if not able:
        return None
    return min(priced or able, key=lambda r: cost_of(r, target, sure))


def cost_of(row: Mapping[str, Any], target: bool, sure: bool) -> tuple[float, float]:
    """Dollars (per hour for the target, or per million tokens; 1 without a price), then slowness.

    What is not known to do it at the unfavourable end costs without limit there.
    """
    price = row["usd_per_h"]
    rate = row["low_rps"] if sure else row["capacity_rps"]
    if not target:
        per_request = (1.0 if price is None else price) / rate if rate > 0 else math.inf
        return per_request, -row["capacity_rps"]
    count = row["replicas_high"] if sure else row["replicas"]
    return (
        math.inf if count is None else count * (1.0 if price is None else price),
        -row["capacity_rps"],
    )


def pareto(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Points (of any candidate, at any rate that keeps the level) that none beats in both.

    Cost is dollars per million tokens, the other side TTFT p99.
    """
    points = [
        {"name": row["name"], "fingerprint": row["fingerprint"], **point}
        for row in rows
        for point in row.get("points", ())
        if point["usd_per_mtok"] is not None
    ]
    points.sort(key=lambda p: (p["usd_per_mtok"], p["ttft_ms_p99"], p["name"]))
    front: list[dict[str, Any]] = []
    for point in points:
        if not front or point["ttft_ms_p99"] < front[-1]["ttft_ms_p99"]:
            front.append(point)
    return front
