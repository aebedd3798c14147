"""Capacity planning: what a question's candidates carry, need and cost.

    question = Question(model=..., slo=..., traffic=Traffic(text="rag:..."), target_rps=20)
    rows = answer(question, candidates, workers=2)
    best = rows.best()

Each candidate is one task of a sweep (`tuner/sweep.py`), told and answered in JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pydantic import Field, model_validator

from ..core.catalogue import GpuRow, load_catalogue
from ..core.errors import CacheTuneError, ProfileError
from ..core.memory_sum import check_fits
from ..core.model_spec import ModelSpec
from ..core.record import Record
from ..core.workload import Slo
from .candidate import Candidate, kernels_of
from .capacity import Capacity, Trial, find_capacity, keeps
from .evaluate import RunLength, evaluate
from .kernel_bounds import bounded_cost
from .traffic import Traffic

REPLICAS_MAX = 4096


class Question(Record):
    """What is asked, apart from the candidates."""

    model: ModelSpec
    slo: Slo
    attainment: float = Field(default=0.99, gt=0, le=1)
    traffic: Traffic
    target_rps: float | None = Field(default=None, gt=0)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    length: RunLength = RunLength()
    tolerance: float = Field(default=0.02, ge=1e-3, le=0.5)
    kernel_band: bool = True
    """Whether to search again with the kernels at either end of their interval."""

    @model_validator(mode="after")
    def _check(self) -> Question:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different, at least one, got {self.seeds}")
        return self


def task_of(question: Question, candidate: Candidate) -> dict[str, Any]:
    """The task of a sweep: both, as JSON."""
    return {
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
        row |= _capacity_row(question, candidate, found)
        if found.rate is not None:
            row |= _kernel_band(question, candidate, found) if question.kernel_band else {}
            row |= _fleet_row(question, candidate, found)
    except CacheTuneError as e:
        row |= {"why_not": str(e)}
    return row


def _identity(question: Question, candidate: Candidate) -> dict[str, Any]:
    machine = candidate.machine
    memory = candidate.memory(question.model)
    return {
        "name": candidate.name,
        "machine": machine.gpu.name
        if machine.n_gpus == 1
        else f"{machine.n_gpus}x{machine.gpu.name}",
        "tiers": candidate.tier_name,
        "policy": candidate.policy,
        "stored": candidate.stored if candidate.reuses else "none",
        "weights": candidate.engine.weights,
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
    table = question.traffic.table(question.length.min_requests, 1.0, question.seeds[0])
    longest = int((table.prompt_tokens + table.output_tokens).max())
    if longest > question.model.max_position:
        raise CacheTuneError(
            f"requests must fit in the {question.model.max_position} positions of the model",
            values=f"{longest} tokens",
            remedy="use a model with a longer context, or shorter prompts",
        )
    machine = candidate.machine
    args = (machine.gpu, machine.n_gpus, candidate.engine, load_catalogue(), longest)
    check_fits(question.model, *args)


def _capacity(question: Question, candidate: Candidate) -> Capacity:
    def run(rate: float, seed: int) -> Trial:
        return evaluate(
            candidate,
            question.model,
            question.slo,
            question.traffic,
            question.length,
            rate,
            seed,
        )

    return find_capacity(run, question.attainment, question.seeds, tolerance=question.tolerance)


def _capacity_row(question: Question, candidate: Candidate, found: Capacity) -> dict[str, Any]:
    row: dict[str, Any] = {"trials": [asdict(t) for t in found.trials]}
    if found.rate is None:
        row["why_not"] = _closest(question, found)
        row["closest_good_share"] = found.closest().good_share
        return row
    trial = found.at_capacity(question.attainment)
    most = question.length.max_requests
    cut = [t for t in found.trials if not t.stable and t.good_share >= question.attainment]
    if any(t.metrics["n_requests"] >= most for t in cut):
        row["note"] = (
            f"at least: runs of {most} requests cannot show a higher rate, --max-requests can"
        )
    row |= {
        "capacity_rps": found.rate.value,
        "capacity_low_rps": _finite(found.rate.low),
        "capacity_high_rps": _finite(found.rate.high),
        "capacity_by_seed": {str(seed): rate for seed, rate in found.by_seed.items()},
        "at_capacity": trial.metrics,
        **_price(candidate),
    }
    tokens_per_s = _tokens_per_s(trial) * found.rate.value / trial.rate_rps
    row["usd_per_mtok"] = _per_mtok(row["usd_per_h"], tokens_per_s)
    row["points"] = [
        {
            "rate_rps": t.rate_rps,
            "seed": t.seed,
            "good_share": t.good_share,
            "ttft_ms_p99": t.metrics["ttft_ms_p99"],
            "usd_per_mtok": _per_mtok(row["usd_per_h"], _tokens_per_s(t)),
        }
        for t in found.trials
        if keeps(t, question.attainment)
    ]
    return row


def _closest(question: Question, found: Capacity) -> str:
    trial = found.closest()
    m, slo = trial.metrics, question.slo
    if trial.good_share >= question.attainment:
        return (
            f"requests leave more slowly than they come at any rate, or runs of "
            f"{question.length.horizon_s:g} s are too short for them; a longer --horizon shows it"
        )
    return (
        f"no rate keeps TTFT ≤ {slo.ttft_ms:g} ms and TPOT ≤ {slo.tpot_ms:g} ms for "
        f"{100 * question.attainment:g} % of requests; closest: {100 * trial.good_share:.1f} % at "
        f"{trial.rate_rps:.3g} req/s, TTFT p99 {m['ttft_ms_p99']:.0f} ms, "
        f"TPOT p99 {m['tpot_ms_p99']:.1f} ms"
    )


def _kernel_band(question: Question, candidate: Candidate, found: Capacity) -> dict[str, Any]:
    """Capacity of the first seed with all kernels at either end of their 90 % interval."""
    seed = question.seeds[0]
    band = {}
    for name, end in (("low", "high_s"), ("high", "low_s")):
        cost = bounded_cost(candidate, question.model, end)

        def run(rate: float, seed: int, cost: Any = cost) -> Trial:
            return evaluate(
                candidate,
                question.model,
                question.slo,
                question.traffic,
                question.length,
                rate,
                seed,
                cost=cost,
            )

        start = found.by_seed[seed]
        other = find_capacity(run, question.attainment, [seed], start_rps=start, tolerance=0.05)
        rate = other.rate.value if other.rate else 0.0
        band[f"kernels_{name}_rps"] = rate
    return band


def _fleet_row(question: Question, candidate: Candidate, found: Capacity) -> dict[str, Any]:
    """Replicas for the target rate, counted by division and then simulated together."""
    target = question.target_rps
    assert found.rate is not None
    if target is None:
        return {"replicas": None, "fleet_usd_per_h": None, "fleet": None}
    n = max(1, math.ceil(target / found.rate.value * 0.98))
    price = _price(candidate)["usd_per_h"]
    for count in range(n, min(REPLICAS_MAX, n + 2 + n // 4) + 1):
        trials = [_at_target(question, candidate, target, seed, count) for seed in question.seeds]
        share = sum(t.good_share for t in trials) / len(trials)
        if share >= question.attainment and all(t.stable for t in trials):
            return {
                "replicas": count,
                "fleet_usd_per_h": None if price is None else price * count,
                "fleet_usd_per_mtok": _per_mtok(
                    None if price is None else price * count, _tokens_per_s(trials[0])
                ),
                "fleet_good_share": share,
                "fleet": trials[0].metrics,
            }
    return {
        "replicas": None,
        "fleet_usd_per_h": None,
        "fleet": trials[0].metrics,
        "why_not": f"{count} replicas do not keep the level at {target:g} req/s "
        f"({100 * share:.1f} % good)",
    }


def _at_target(
    question: Question, candidate: Candidate, target: float, seed: int, n_replicas: int
) -> Trial:
    return evaluate(
        candidate,
        question.model,
        question.slo,
        question.traffic,
        question.length,
        target,
        seed,
        n_replicas=n_replicas,
    )


def _price(candidate: Candidate) -> dict[str, Any]:
    try:
        return {"usd_per_h": candidate.machine.usd_per_h, "no_price": ""}
    except ProfileError as e:
        return {"usd_per_h": None, "no_price": str(e)}


def _tokens_per_s(trial: Trial) -> float:
    m = trial.metrics
    return float(m["prompt_tokens_per_s"] + m["output_tokens_per_s"])


def _per_mtok(usd_per_h: float | None, tokens_per_s: float) -> float | None:
    """Dollars per million tokens, prompt and output together."""
    return None if usd_per_h is None else usd_per_h / (tokens_per_s * 3600 / 1e6)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def best(rows: Sequence[Mapping[str, Any]], target: bool) -> Mapping[str, Any] | None:
    """The cheapest that does it; without prices, the fewest replicas or the highest capacity."""
    able = [r for r in rows if not r["why_not"]]
    if not able:
        return None
    priced = [r for r in able if r["usd_per_h"] is not None]
    if target:
        cost = "fleet_usd_per_h" if priced else "replicas"
        return min(priced or able, key=lambda r: (r[cost], -r["capacity_rps"], r["name"]))
    if priced:
        return min(priced, key=lambda r: (r["usd_per_mtok"], r["name"]))
    return max(able, key=lambda r: (r["capacity_rps"], r["name"]))


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
