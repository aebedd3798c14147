"""A study over a trace: which fleet, at what cost, for what TTFT; by Optuna, two objectives.

Trials are asked for and told in groups of a fixed size, and each is simulated on its own: the study
is the same whatever the number of workers. Those that take longest (cost-aware eviction) begin
first, so that at the end of a group workers wait less for the last one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from ..core.catalogue import Catalogue, load_catalogue
from ..core.errors import CacheTuneError
from ..core.machine_spec import compose
from ..core.memory_sum import EngineMemory
from ..core.model_spec import ModelSpec
from ..core.record import Record
from ..core.units import GIB
from ..core.workload import Slo
from ..simulator.serving import serve_trace
from .candidate import Candidate
from .sweep import processes, sweep
from .traffic import Traffic

if TYPE_CHECKING:
    import optuna

    from ..simulator.serving_result import ServingResult

ROW_VERSION = 3
"""Of what a trial's row holds: a journal with rows of another is not taken."""
GROUP = 50
"""Trials that are asked for before any of them is told: a generation of NSGA-II."""


class Space(Record):
    """What a trial may choose; `n_replicas` is the two ends."""

    gpus: tuple[str, ...] = ("A100-SXM-80GB", "H100-SXM", "L40S")
    n_gpus: tuple[int, ...] = (1,)
    """Per replica, tensor parallel."""
    n_replicas: tuple[int, int] = (1, 16)
    policies: tuple[str, ...] = ("prefix_cache", "cachetune")
    stored: tuple[str, ...] = ("bf16", "int8", "int4")
    disks: tuple[str, ...] = ("nvme-gen4", "sata-ssd")
    networks: tuple[str, ...] = ("none", "25g-rdma", "100g-rdma")
    dram_gib: tuple[int, ...] = (64, 128, 256, 512)
    evictions: tuple[str, ...] = ("lru", "lfu", "cost")
    routers: tuple[str, ...] = ("round_robin", "least_load", "prefix_affinity", "chunk_affinity")
    batch_tokens: tuple[int, ...] = (2048, 4096, 8192, 16384)


class StudyQuestion(Record):
    """What is searched over, for what."""

    model: ModelSpec
    traffic: Traffic
    slo: Slo
    n_requests: int = Field(gt=0)
    rate_rps: float = Field(gt=0)
    space: Space = Space()
    catalogue: Catalogue | None = None
    """Of what is chosen from; None: the shipped one."""
    n_trials: int = Field(default=200, gt=0)
    seed: int = 0


def trace_study(
    question: StudyQuestion,
    *,
    workers: int = 1,
    journal: Path | None = None,
    on_done: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[optuna.Study, list[dict[str, Any]]]:
    """The study (dollars per hour, TTFT p99 in ms) and a row per trial, in their order."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.NSGAIISampler(population_size=GROUP, seed=question.seed)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    rows: list[dict[str, Any]] = []
    as_json = question.model_dump(mode="json")
    with processes(workers) as run:
        while len(rows) < question.n_trials:
            n, done = min(GROUP, question.n_trials - len(rows)), len(rows)
            asked = [study.ask(_distributions(question.space)) for _ in range(n)]
            long_first = sorted(asked, key=lambda t: t.params["eviction"] != "cost")

            def tell(k: int, _: int, done: int = done) -> None:
                on_done(done + k, question.n_trials)

            found = sweep(
                simulate,
                [
                    {"question": as_json, "params": t.params, "row_version": ROW_VERSION}
                    for t in long_first
                ],
                workers=workers,
                backend=run,
                journal=journal,
                on_done=tell,
            )
            row_of = {t.number: row for t, row in zip(long_first, found, strict=True)}
            for trial in asked:
                row = row_of[trial.number]
                rows.append({"trial": trial.number, **trial.params, **row})
                if row["why_not"]:
                    study.tell(trial, state=optuna.trial.TrialState.FAIL)
                else:
                    study.tell(trial, [row["usd_per_h"], row["ttft_ms_p99"]])
    return study, rows


def simulate(task: Mapping[str, Any]) -> dict[str, Any]:
    """One trial: the whole trace through one fleet."""
    question = StudyQuestion.model_validate_json(json.dumps(task["question"]))
    p = task["params"]
    try:
        rows = question.catalogue or load_catalogue()
        candidate = _candidate(p, rows)
        n_ramp = _n_ramp(question)
        n_requests = question.n_requests + n_ramp
        table = question.traffic.table(n_requests, question.rate_rps, question.seed)
        longest = int((table.prompt_tokens.astype(int) + table.output_tokens).max())
        candidate.check_fits(question.model, rows, longest)
        usd_per_h = candidate.machine.usd_per_h * p["n_replicas"]
        fleet = candidate.fleet(question.model, question.slo, p["n_replicas"])
        cost = candidate.cost(question.model)
    except CacheTuneError as e:
        return {"why_not": str(e)}
    result = serve_trace(table, fleet, cost, seed=question.seed)
    summary = result.summary()
    keep = ("ttft_ms_p50", "ttft_ms_p99", "tpot_ms_p99", "good_share", "tier_hit_rate")
    found = {name: summary[name] for name in keep}
    if n_ramp:
        found |= _later(result, n_ramp)
    return {
        "why_not": "",
        "fingerprint": candidate.fingerprint(),
        "usd_per_h": usd_per_h,
        **found,
    }


def _n_ramp(question: StudyQuestion) -> int:
    """Requests until about as many generated conversations are under way as later."""
    traffic = question.traffic
    return 0 if traffic.is_trace else round(question.rate_rps * traffic.ramp_s)


def _later(result: ServingResult, begin: int) -> dict[str, Any]:
    """Times and share of good requests from a row on, all of one class."""
    ttft_ms, tpot_ms = result.ttft_ms[begin:], np.nan_to_num(result.tpot_ms[begin:])
    (name,) = result.table.classes
    p50, p99 = np.percentile(ttft_ms, (50, 99))
    return {
        "ttft_ms_p50": float(p50),
        "ttft_ms_p99": float(p99),
        "tpot_ms_p99": float(np.percentile(tpot_ms, 99)),
        "good_share": {name: float(result.meets_slo()[name][begin:].mean())},
    }


def front(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Trials that none beats in dollars and in TTFT p99, the cheapest first."""
    able = [dict(r) for r in rows if not r["why_not"]]
    able.sort(key=lambda r: (r["usd_per_h"], r["ttft_ms_p99"]))
    found: list[dict[str, Any]] = []
    fastest = math.inf
    for row in able:
        if row["ttft_ms_p99"] < fastest:
            fastest = row["ttft_ms_p99"]
            found.append(row)
    return found


def share_of(row: Mapping[str, Any]) -> float:
    """Share of requests that keep their SLO, in the class where it is smallest."""
    return min(row["good_share"].values(), default=0.0)


def cheapest(rows: Sequence[Mapping[str, Any]], share: float) -> dict[str, Any] | None:
    """The cheapest trial in which at least `share` of requests keep the SLO; None if none does."""
    kept = [dict(r) for r in rows if not r["why_not"] and share_of(r) >= share]
    return min(kept, key=lambda r: (r["usd_per_h"], r["ttft_ms_p99"]), default=None)


def _distributions(space: Space) -> dict[str, optuna.distributions.BaseDistribution]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    choices: dict[str, Sequence[str | int]] = {
        "gpu": space.gpus,
        "n_gpus": space.n_gpus,
        "policy": space.policies,
        "stored": space.stored,
        "disk": space.disks,
        "network": space.networks,
        "dram_gib": space.dram_gib,
        "eviction": space.evictions,
        "router": space.routers,
        "batch_tokens": space.batch_tokens,
    }
    return {
        **{name: CategoricalDistribution(values) for name, values in choices.items()},
        "n_replicas": IntDistribution(*space.n_replicas, log=True),
        "ratio": FloatDistribution(0.05, 0.5),
    }


def _candidate(p: Mapping[str, Any], catalogue: Catalogue) -> Candidate:
    machine = compose(
        catalogue,
        p["gpu"],
        n_gpus=p["n_gpus"],
        dram_limit_bytes=p["dram_gib"] * GIB,
        disk=None if p["disk"] == "none" else p["disk"],
        network=None if p["network"] == "none" else p["network"],
    )
    return Candidate(
        machine=machine,
        policy=p["policy"],
        stored=p["stored"],
        recompute_ratio=p["ratio"],
        engine=EngineMemory(max_num_batched_tokens=p["batch_tokens"]),
        eviction=p["eviction"],
        router=p["router"],
    )
