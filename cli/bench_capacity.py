"""`cachetune bench capacity`: what-if beside whole traces, its intervals beside truth.

For each case the search of `cachetune whatif` and, beside it, a bisection of one cold run of the
whole trace, judged from its first request: the highest rate that keeps the level, the lowest that
does not. They share the simulator and differ in all that samples. And questions about a queue whose
capacity theory knows (M/M/1): how often does the interval hold it?
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

if TYPE_CHECKING:
    from ..core.plan import PolicyName
    from ..tuner.candidate import Candidate
    from ..tuner.question import Question

_Trace = Annotated[Path, typer.Option(help="A trace; the log has Mooncake's conversations.")]
_Cases = Annotated[str, typer.Option(help="Cases by number from 1, by comma; default all.")]
_Seeds = Annotated[int, typer.Option(min=1, max=100, help="Samples of traffic.")]
_Questions = Annotated[int, typer.Option(min=0, help="About a known queue, per share; 0: none.")]
_Out = Annotated[Path, typer.Option(help="Where the result is written.")]
_Seed = Annotated[int, typer.Option(min=0, help="Root of the known queue's random streams.")]

MODEL, GPU, DISK = "Llama-3.1-8B", "H100-SXM", "nvme-gen4"
SHARES = (0.9, 0.95, 0.99)
TOLERANCE = 0.02
"""Between the two rates of a whole trace."""
WITHIN = 0.03
"""What this project asks of a capacity beside the whole trace's."""
COLUMNS = (
    "case", "capacity_rps", "low_rps", "high_rps", "n_runs", "cpu_s", "whole_keeps_rps",
    "whole_fails_rps", "whole_cpu_s", "error", "holds",
)  # fmt: skip


class Case(NamedTuple):
    """A fleet and its service level."""

    n_replicas: int
    policy: PolicyName
    ttft_ms: float
    tpot_ms: float
    share: float

    @property
    def name(self) -> str:
        """In words."""
        fleet = f"{self.n_replicas} {GPU} {self.policy}"
        return f"{fleet}, {self.ttft_ms:g} / {self.tpot_ms:g} ms, {self.share:g}"


CASES = (
    Case(1, "full_recompute", 30_000, 200, 0.9),
    Case(1, "prefix_cache", 30_000, 500, 0.99),
    Case(8, "prefix_cache", 30_000, 500, 0.99),
    Case(8, "prefix_cache", 5_000, 500, 0.9),
    Case(1, "full_recompute", 600_000, 2_000, 0.9),
)


def command(
    trace: _Trace,
    cases: _Cases = "",
    seeds: _Seeds = 5,
    questions: _Questions = 100,
    out: _Out = Path("results/cpu/capacity.json"),
    seed: _Seed = 0,
) -> None:
    """How near to whole traces are the capacities of what-if, and how often do intervals hold?"""
    from ..core.record import check_writable, write_json
    from ..runtime.machine import provenance_here
    from ..tuner.traffic import traffic_of
    from .console import note, print_json_line, print_table, progress_bar

    check_writable(out)
    chosen = _chosen(cases)
    traffic = traffic_of(str(trace))
    rows = []
    with progress_bar() as tell:
        for done, case in enumerate(chosen):
            tell("cases", done, len(chosen))
            rows.append(compared(case, traffic, seeds))
        tell("cases", len(chosen), len(chosen))
        known = [coverage(share, questions, seed) for share in SHARES] if questions else []
    result = {
        "provenance": provenance_here(seed).model_dump(mode="json"),
        "trace": traffic.provenance,
        "within": WITHIN,
        "rows": rows,
        "coverage": known,
    }
    write_json(out, result)
    print_table(rows, COLUMNS, "capacity, whole traces beside it")
    if known:
        print_table(known, tuple(known[0]), "M/M/1: how often 95 % intervals hold it")
    note(f"result: {out}")
    errors = [row["error"] for row in rows]
    held = [row["held"] for row in known]
    print_json_line({"command": "bench capacity", "error": errors, "held": held, "out": str(out)})


def _chosen(text: str) -> list[Case]:
    from ..core.errors import CacheTuneError

    numbers = [part.strip() for part in text.split(",") if part.strip()]
    known = {str(i): case for i, case in enumerate(CASES, 1)}
    wrong = [n for n in numbers if n not in known]
    if wrong:
        raise CacheTuneError(f"--cases are numbers from 1 to {len(CASES)}", values=", ".join(wrong))
    return [known[n] for n in numbers] if numbers else list(CASES)


def compared(case: Case, traffic: Any, n_seeds: int) -> dict[str, Any]:
    """One case: what-if, the whole trace, and how far they are apart."""
    from time import process_time

    from ..core.catalogue import load_catalogue
    from ..core.machine_spec import compose
    from ..core.model_presets import model_of
    from ..core.workload import Slo
    from ..tuner.candidate import Candidate
    from ..tuner.capacity import find_capacity
    from ..tuner.question import Question, runner

    question = Question(
        model=model_of(MODEL),
        slo=Slo(ttft_ms=case.ttft_ms, tpot_ms=case.tpot_ms),
        attainment=case.share,
        traffic=traffic,
        seeds=tuple(range(n_seeds)),
    )
    machine = compose(load_catalogue(), GPU, disk=DISK)
    candidate = Candidate(machine=machine, policy=case.policy)
    question.fleet(candidate)  # kernel tables are read once
    began_s = process_time()
    run = runner(question, candidate, n_replicas=case.n_replicas)
    found = find_capacity(
        run, case.share, question.seeds, tolerance=question.tolerance, seeds_at=question.seeds_at
    )
    cpu_s = process_time() - began_s
    row: dict[str, Any] = {"case": case.name, **case._asdict()}
    row |= {"capacity_rps": None, "low_rps": None, "high_rps": None}
    if found.rate is not None:
        row |= {"capacity_rps": found.rate.value, "low_rps": found.rate.low}
        row["high_rps"] = found.rate.high
    row |= {"grows": found.grows, "n_seeds": len(found.seeds), "n_runs": len(found.trials)}
    row |= {"cpu_s": cpu_s, **_whole(question, candidate, case.n_replicas)}
    row |= {"error": None, "holds": None}
    keeps, fails = row["whole_keeps_rps"], row["whole_fails_rps"]
    if found.rate is not None and keeps and fails:
        row["error"] = found.rate.value / (keeps * fails) ** 0.5 - 1
        row["holds"] = found.rate.low <= fails and keeps <= found.rate.high
    return row


def _whole(question: Question, candidate: Candidate, n_replicas: int) -> dict[str, Any]:
    """Cold runs of the whole trace, each judged from its first request to its last."""
    from time import process_time

    from ..tuner.capacity import RATE_MAX_RPS
    from ..tuner.evaluate import RunLength, evaluate
    from ..tuner.rate_search import RateSearch
    from ..tuner.trial import Trial

    n = max(20, question.traffic.n_whole or 0)
    length = RunLength(min_requests=n, max_requests=n, warm_share=0)
    fleet, cost = question.fleet(candidate, n_replicas), candidate.cost(question.model)

    def run(rate_rps: float, seed: int) -> Trial:
        return evaluate(fleet, cost, question.traffic, length, rate_rps, seed)

    began_s = process_time()
    search = RateSearch(run, question.attainment, (0,))
    keeps, fails = search.bracket(1.0, 2.0, TOLERANCE, RATE_MAX_RPS)
    cpu_s = process_time() - began_s
    found = {"whole_keeps_rps": keeps, "whole_fails_rps": fails, "whole_cpu_s": cpu_s}
    return {**found, "whole_n_runs": len(search.trials)}


def coverage(share: float, n_questions: int, root: int) -> dict[str, Any]:
    """Of questions about a queue with a known capacity: intervals that hold it, and their width."""
    from statistics import median

    from ..tuner.known_queue import intervals, mm1_capacity_rps

    truth = mm1_capacity_rps(share)
    found = list(intervals(share, n_questions, root=root))
    return {
        "share": share,
        "truth_rps": truth,
        "questions": n_questions,
        "held": sum(e.low <= truth <= e.high for e in found) / n_questions,
        "value_median_rps": median(e.value for e in found),
        "low_median_rps": median(e.low for e in found),
        "high_median_rps": median(e.high for e in found),
    }
