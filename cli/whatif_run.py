"""Runs a question's sweeps, and writes the answer: a table, CSV, JSON, a page."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import CacheTuneError
from .console import note, print_json_line, print_table, progress_bar, warn

if TYPE_CHECKING:
    from ..core.catalogue import Catalogue
    from ..tuner.candidate import Candidate
    from ..tuner.question import Question

_WHO = ("name", "machine", "tiers", "policy", "stored", "weights", "router", "eviction")
COLUMNS = (
    "name", "capacity_rps", "low_rps", "high_rps", "limit", "replicas", "usd_per_h",
    "usd_per_mtok", "ttft_ms_p99", "tpot_ms_p99",
)  # fmt: skip


def run(
    question: Question,
    chosen: Sequence[Candidate],
    catalogue: Catalogue,
    what_if: str | None,
    workers: int,
    backend: str,
    out: Path,
    fresh: bool,
) -> None:
    """Answer `question`; what --out has of it is taken, unless `fresh`.

    Raises:
        CacheTuneError: nothing can do it; says what is closest.
        Interrupted: Ctrl-C, after writing what was there.
    """
    from ..tuner.sensitivity import changes, check_changes, default_changes, effects, split, tasks
    from ..tuner.sweep import Interrupted, Journal, sweep
    from ..tuner.whatif import best, plan, task_of

    journal = out / "journal.jsonl"
    if fresh:
        journal.unlink(missing_ok=True)
    n_before = len(Journal(journal).read())
    asked = [] if what_if is None else changes(what_if)
    check_changes(asked, question, chosen, catalogue)
    with progress_bar() as tell:

        def swept(what: str, todo: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
            return sweep(
                plan,
                todo,
                workers=workers,
                backend=backend,
                journal=journal,
                on_done=lambda done, total: tell(what, done, total),
            )

        try:
            rows = swept("candidates", [task_of(question, c) for c in chosen])
        except Interrupted as e:
            done = [row for row in e.results if row is not None]
            if done:
                _write(_answer(question, done, None, []), out, n_before)
            note(f"{len(done)} of {len(chosen)} candidates kept in {out}; run again to go on")
            raise
        winner = best(rows, question.target_rps is not None)
        found: list[dict[str, Any]] = []
        stopped = None
        if winner is not None:
            of_winner = next(c for c in chosen if c.fingerprint() == winner["fingerprint"])
            asked = asked if what_if is not None else default_changes(of_winner)
            asked, found = split(asked, question, of_winner, catalogue)
            try:
                changed = [*swept("what if", tasks(asked, question, of_winner, catalogue))]
            except Interrupted as e:
                stopped = e
                pairs = [(a, r) for a, r in zip(asked, e.results, strict=True) if r is not None]
                note(f"{len(pairs)} of {len(asked)} what-ifs kept in {out}; run again to go on")
                asked, changed = [a for a, _ in pairs], [r for _, r in pairs]
            found = effects(asked, changed, winner, question.attainment) + found
    answer = _answer(question, rows, winner, found)
    _write(answer, out, n_before)
    if stopped is not None:
        raise stopped
    _print(answer, out)


def _answer(
    question: Question, rows: Sequence[dict[str, Any]], winner: Any, found: list[dict[str, Any]]
) -> dict[str, Any]:
    from .. import __version__
    from ..tuner.whatif import best, cost_of, pareto

    target = question.target_rps is not None
    aside = ""
    hoped = best(rows, target, sure=False)
    costs = [cost_of(r, target, sure=False)[0] for r in (hoped, winner) if r is not None]
    if hoped is not None and costs[0] < costs[-1]:
        aside = f"Cheaper, if its prediction holds: {_short(hoped, target)}."
    return {
        "command": "whatif",
        "version": __version__,
        "sentence": sentence(question, winner),
        "aside": aside,
        "question": question.model_dump(mode="json"),
        "runs": question.runs.model_dump(mode="json"),
        "traffic": question.traffic.provenance,
        "best": winner["fingerprint"] if winner else None,
        "rows": list(rows),
        "pareto": pareto(rows),
        "what_if": found,
        "assumptions": _assumptions(),
    }


def _assumptions() -> list[str]:
    from ..tuner.candidate import HOST_BYTES, OVERHEAD_S

    return [
        f"{HOST_BYTES >> 30} GiB of each host's DRAM are not for KV (assumed)",
        f"host time per step {1e3 * OVERHEAD_S:g} ms unless given (vLLM 0.19, one machine)",
        "from a tier slower than computing a prompt loads only what makes it end no later, or "
        "later by less than it saves those that wait; what else lies there is computed "
        "(unloaded_share). A plan with a row's rules does the same",
        "decode steps go without the memory bandwidth that what is loaded beside them takes; steps "
        "with a prompt's pieces lose nothing to loads",
        "disks, memory and network come with the rented GPU unless they have a price",
        "intervals hold two things: samples of traffic (95 % nominal; requests count as fewer, as "
        "their failures come in bursts) and the cost model (all kernels at one end of their 90 % "
        "interval); the two are independent, so their logarithms add in squares",
        "what-ifs are paired, on the same requests and kernels; of another GPU the kernels of both "
        "widen the interval",
        "the best is the cheapest at the unfavourable end of its interval; replicas to be sure are "
        "for kernels at their slow end and traffic at its hard end",
        "a rate squeezes the arrivals of a trace, bursts included; the queue of a rate that is "
        "carried grows by at most 5 % of the time, in the mean of all samples",
        "conversations are judged once about as many are under way as later (95 % of the turns)",
        "dollars per million tokens count prompt and output together",
        "a pipeline's stages have equally many layers and a batch each, begun together; memory is "
        "that of the first or last, with the embedding or the head",
        "quality of answers is not simulated: hold the policy and ratio against its measurement",
    ]


def sentence(question: Question, winner: Any) -> str:
    """The answer in words."""
    target, asked, model = question.target_rps, question.asked, question.model.name
    if winner is None:
        return f"None of the candidates serves {model} with {asked}."
    what = winner["name"]
    if winner["kernels"] != "measured":
        what += f" (its kernels are {winner['kernels']}: mind the interval)"
    rate, low, high = (f"{winner[k]:.3g}" for k in ("capacity_rps", "low_rps", "high_rps"))
    rate += f" ({low} to {high})" if low != high else ""
    limit = f", limited by {winner['limit']}" if winner["limit"] else ""
    least = "at least " if winner["at_least"] else ""
    one = f"one replica carries {least}{rate} req/s{limit}"
    if target is None:
        cost = _dollars(winner["usd_per_mtok"], " per million tokens")
        return f"Take {what}{cost}: with {model} and {asked}, {one}."
    cost = _dollars(winner["fleet_usd_per_h"], " per hour")
    count = winner["replicas"]
    serve = "it serves" if count == 1 else "together they serve"
    replicas = f"{count} {'replica' if count == 1 else 'replicas'}{_to_be_sure(winner)}"
    return (
        f"Take {replicas} of {what}{cost}: {serve} {model} at {target:.3g} req/s "
        f"with {asked}; {one}."
    )


def _dollars(value: float | None, unit: str) -> str:
    return "" if value is None else f", ${value:.3g}{unit}"


def _short(row: Any, target: bool) -> str:
    what = row["name"]
    if row["kernels"] != "measured":
        what += f" (its kernels are {row['kernels']})"
    if not target:
        return f"{what}{_dollars(row['usd_per_mtok'], ' per million tokens')}"
    count = f"{row['replicas']}{_to_be_sure(row)}"
    return f"{count} of {what}{_dollars(row['fleet_usd_per_h'], ' per hour')}"


def _to_be_sure(row: Any) -> str:
    count, sure = row["replicas"], row["replicas_high"]
    if sure is None:
        return " (to be sure, more than could be tried)"
    return f" ({sure} to be sure)" if sure > count else ""


def table(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows as they are printed and written to the CSV."""
    found = []
    for row in rows:
        at = row.get("fleet") or row.get("at_capacity") or {}
        fleet = row.get("replicas") is not None
        found.append(
            {
                **{k: row[k] for k in _WHO},
                "kernels": row["kernels"],
                "capacity_rps": row.get("capacity_rps"),
                "low_rps": row.get("low_rps"),
                "high_rps": row.get("high_rps"),
                "traffic_low_rps": row.get("capacity_low_rps"),
                "traffic_high_rps": row.get("capacity_high_rps"),
                "kernels_low_rps": row.get("kernels_low_rps"),
                "kernels_high_rps": row.get("kernels_high_rps"),
                "limit": row.get("limit"),
                "replicas": row.get("replicas"),
                "replicas_high": row.get("replicas_high"),
                "usd_per_h": row.get("fleet_usd_per_h" if fleet else "usd_per_h"),
                "usd_per_mtok": row.get("fleet_usd_per_mtok" if fleet else "usd_per_mtok"),
                "ttft_ms_p99": at.get("ttft_ms_p99"),
                "tpot_ms_p99": at.get("tpot_ms_p99"),
                "loaded_share": sum(at.get("loaded_share", {}).values()) if at else None,
                "unloaded_share": at.get("unloaded_share"),
                "kv_tokens": row["kv_tokens"],
                "kv_source": row["kv_source"],
                "fingerprint": row["fingerprint"],
                "seeds": " ".join(map(str, row["seeds"])),
                "why_not": row["why_not"],
            }
        )
    return found


def _write(answer: dict[str, Any], out: Path, n_before: int) -> None:
    from ..core.record import write_atomic, write_json
    from ..runtime.machine import provenance_here
    from .whatif_page import page

    rows = table(answer["rows"])
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(out / "whatif.csv", text.getvalue().encode())
    write_atomic(out / "whatif.json", (json.dumps(answer, allow_nan=False) + "\n").encode())
    write_atomic(out / "whatif.html", page(answer).encode())
    # Apart from the answer, which is the same again; rows that the journal had may be older.
    made_by = provenance_here(answer["question"]["seeds"][0]).model_dump(mode="json")
    write_json(out / "provenance.json", made_by | {"journal_rows_before": n_before})


def _remarks(rows: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """What is to be said of candidates, once each, and of which."""
    found: dict[str, list[str]] = {}
    for row in rows:
        texts = [row["why_not"]] if row["why_not"] else row["note"].split("; ")
        for text in filter(None, texts):
            found.setdefault(text, []).append(row["name"])
    return found


def _print(answer: dict[str, Any], out: Path) -> None:
    rows = table(answer["rows"])
    print_table([r for r in rows if not r["why_not"]] or rows, COLUMNS)
    for text, who in _remarks(answer["rows"]).items():
        is_all = len(who) == len(answer["rows"]) > 1
        note(f"{'every candidate' if is_all else ', '.join(who)}: {text}")
    for text in dict.fromkeys(row.get("no_price", "") for row in answer["rows"]):
        if text:
            warn(text)
    if answer["what_if"]:
        print_table(answer["what_if"], ("what", "ratio", "low", "high", "capacity_rps", "why_not"))
    print(f"{answer['sentence']} {answer['aside']}".rstrip())
    note(f"page: {out / 'whatif.html'}")
    if answer["best"] is None:
        raise CacheTuneError("a candidate must be able to do it", **_nearest_miss(answer["rows"]))
    keep = ("command", "sentence", "aside", "best", "pareto", "what_if")
    short = {k: answer[k] for k in keep}
    print_json_line({**short, "rows": rows})


def _nearest_miss(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    free = {id(r): sum(item["n_bytes"] for item in r["memory"]) for r in rows}
    row = max(rows, key=lambda r: (r.get("closest_good_share", -1.0), free[id(r)]))
    remedy = "loosen the SLO, or name other machines, policies or formats"
    if "closest_good_share" not in row:  # its own remedy is in its words
        remedy = ""
    return {"values": f"closest is {row['name']}: {row['why_not']}", "remedy": remedy}
