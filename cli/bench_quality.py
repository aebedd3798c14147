"""`cachetune bench quality`: right answers of every policy and ratio, over full recompute's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..calibration.quality_table import Interval, TableRow
    from ..calibration.task_file import TaskRecord, Tokens
    from ..runtime.loaded_model import LoadedModel

EVALUATION_SEED = 7301
"""Of the published results; no selector or model was chosen on its contexts."""

COLUMNS = ("policy", "selector", "ratio", "cross", "local", "overall", "score", "n")

_Contexts = Annotated[int | None, typer.Option(min=2, help="Contexts per task; 60, or the file's.")]
_Seed = Annotated[int, typer.Option(min=0, help="Root of every random stream.")]
_Model = Annotated[Path | None, typer.Option(help="Hugging Face folder; default the toy model.")]
_Out = Annotated[Path, typer.Option(help="Where the quality profile is written.")]
_Tasks = Annotated[
    Path | None,
    typer.Option(help="JSON lines: task, chunks, suffix, answer_positions, answers as token ids."),
]


def command(
    contexts: _Contexts = None,
    seed: _Seed = EVALUATION_SEED,
    model: _Model = None,
    out: _Out = Path("results/cpu/quality.json"),
    tasks: _Tasks = None,
) -> None:
    """Measure the answers of every policy and ratio; resumes what was interrupted.

    Without --tasks: two synthetic tasks that the toy model was trained for. --tasks takes any
    others, one JSON object per line: "task" (a name), "chunks" (lists of token ids), "suffix"
    (token ids), "answer_positions" (indices in the suffix) and "answers" (the token id that
    should follow each); optional "cross_chunk" (booleans, one per answer) and
    "dependent_tokens" (per chunk, the indices that another chunk changes).
    """
    from ..calibration.quality import RATIOS, evaluate
    from ..calibration.quality_log import QualityLog
    from ..calibration.quality_table import make_table, profile_of
    from ..calibration.toy_model import TOY_FOLDER
    from ..core.record import check_writable
    from ..runtime.loaded_model import load_model
    from ..runtime.machine import provenance_here
    from .console import note, print_json_line, progress_bar

    check_writable(out)
    loaded = load_model(model or TOY_FOLDER)
    records, library, source = _questions(loaded, tasks, contexts, seed)
    identity = {
        "model_fingerprint": loaded.fingerprint,
        "tasks": source,
        "seed": seed,
        "ratios": list(RATIOS),
        "rows": "policy, selector, ratio, share, right and asked: cross, local, all",
    }
    log = QualityLog(out.with_name(out.name + ".partial.jsonl"), identity)
    wanted = {(task, i) for task, found in records.items() for i in range(len(found))}
    with progress_bar() as tell:
        tell("contexts", len(log.found), len(wanted))
        for found in evaluate(loaded, records, library, seed=seed, done=log.has):
            log.add(found)
            tell("contexts", len(log.found), len(wanted))
    rows = make_table([found for found in log.found if found[:2] in wanted], seed)
    provenance = provenance_here(seed)
    profile_of(rows, loaded.fingerprint, provenance).write(out)
    _write_table(out.with_suffix(".csv"), rows, provenance.model_dump(mode="json"))
    log.path.replace(out.with_suffix(".raw.jsonl"))
    _print(rows)
    note(f"profile: {out} (table: {out.stem}.csv, raw counts: {out.stem}.raw.jsonl)")
    print_json_line(
        {
            "command": "bench quality",
            "model_fingerprint": loaded.fingerprint,
            "seed": seed,
            "tasks": {task: len(found) for task, found in records.items()},
            "rows": [row.model_dump(mode="json") for row in rows],
        }
    )


def _questions(
    loaded: LoadedModel, path: Path | None, contexts: int | None, seed: int
) -> tuple[dict[str, list[TaskRecord]], Callable[[str, int], list[Tokens]], str]:
    """Records per task, the texts of neighbours for (task, context), and the source's name."""
    import hashlib

    from ..calibration.task_file import library_of, read_task_file, toy_library, toy_records

    if path is None:
        records = toy_records(seed, contexts or 60)
        for found in records.values():
            found[0].check_fits(loaded.spec, "the synthetic tasks")
        # A library of its own, so that no neighbour comes from an evaluated prompt.
        texts = toy_library(seed)
        return records, lambda task, i: texts[task], "toy"
    whole = read_task_file(path, loaded.spec)
    kept = {task: found[:contexts] for task, found in whole.items()}
    source = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return kept, lambda task, i: library_of(whole[task], i), source


def _write_table(path: Path, rows: list[TableRow], provenance: dict[str, Any]) -> None:
    """CSV; the first line, a comment, holds the provenance as JSON."""
    from ..core.record import write_atomic

    measures = ("cross", "local", "overall", "score")
    names = ["task", "policy", "selector", "ratio", "share"]
    names += [f"{m}{end}" for m in measures for end in ("", "_low", "_high")]
    lines = [f"# {json.dumps(provenance)}", ",".join([*names, "n", "n_cross", "n_contexts"])]
    for row in rows:
        cells: list[object] = [row.task, row.policy, row.selector, row.ratio, row.share]
        for measure in measures:
            cells += getattr(row, measure) or ("", "", "")
        lines.append(",".join(map(str, [*cells, row.n, row.n_cross, row.n_contexts])))
    write_atomic(path, ("\n".join(lines) + "\n").encode())


def _print(rows: list[TableRow]) -> None:
    from .console import print_table

    for task in dict.fromkeys(row.task for row in rows):
        of_task = [row for row in rows if row.task == task]
        cells = [
            {
                **row.model_dump(include={"policy", "selector", "ratio", "n"}),
                "cross": _cell(row.cross),
                "local": _cell(row.local),
                "overall": _cell(row.overall),
                "score": _cell(row.score),
            }
            for row in of_task
        ]
        title = f"{task}: share of right answers with 95 % interval, score over full recompute"
        print_table(cells, COLUMNS, f"{title}, {of_task[0].n_contexts} contexts")


def _cell(value: Interval | None) -> str | None:
    return None if value is None else "{:.3f} [{:.3f}, {:.3f}]".format(*value)
