"""What a command prints: results on stdout (a table, one JSON line), the rest on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from ..core.errors import CacheTuneError

T = TypeVar("T")


def print_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], title: str = "") -> None:
    """A table of `columns`: ruled on a terminal, aligned text in a pipe. None prints as '-'."""
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    numeric = [
        all(isinstance(row.get(c), int | float | None) for row in rows) and bool(rows)
        for c in columns
    ]
    if sys.stdout.isatty():
        table = Table(title=title or None)
        for column, right in zip(columns, numeric, strict=True):
            table.add_column(column, justify="right" if right else "left")
        for line in cells:
            table.add_row(*line)
        Console().print(table)
        return
    text = [title] if title else []
    widths = [max(len(line[i]) for line in [list(columns), *cells]) for i in range(len(columns))]
    for line in [list(columns), *cells]:
        padded = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, numeric, strict=True)
        ]
        text.append("  ".join(padded).rstrip())
    _write("\n".join(text))


def print_json_line(data: Mapping[str, Any]) -> None:
    """The result for programs: one line, the last of stdout."""
    _write(json.dumps(data, allow_nan=False))


def counts(text: str, option: str) -> list[int]:
    """Whole numbers from 1 on, by comma.

    Raises:
        CacheTuneError: something else; names the option.
    """
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise CacheTuneError(f"{option} must be whole numbers from 1 on, by comma", values=text)
    return found


def print_metrics(result: Mapping[str, Any]) -> None:
    """Times of requests served or simulated, as a table and then all of `result` as JSON."""
    rows = [
        {"metric": m, **{s: result[f"{m}_{s}"] for s in ("mean", "p50", "p90", "p99")}}
        for m in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms", "queue_ms")
    ]
    print_table(rows, ("metric", "mean", "p50", "p90", "p99"))
    print_json_line(result)


def progress(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Pass `items` through, with a bar on stderr when that is a terminal, else one line."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    if not sys.stderr.isatty():
        note(what if total is None else f"{what} ({total})")
        yield from items
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bar:
        yield from bar.track(items, total=total, description=what)


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A callable (what, done, total) that draws bars with the time left on a terminal."""
    if not sys.stderr.isatty():
        seen: set[str] = set()

        def tell(what: str, done: int, total: int) -> None:
            if what not in seen:
                seen.add(what)
                note(f"{what} ({total})")

        yield tell
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        tasks: dict[str, TaskID] = {}

        def draw(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        yield draw


def note(text: str) -> None:
    """A line for people, on stderr."""
    print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Something a reader of the result should know, on stderr."""
    note(f"warning: {text}")


def fail(text: str, status: int) -> int:
    """The one line of an error; returns the exit status."""
    note(f"cachetune: {' '.join(text.split())}")
    return status


def _write(text: str) -> None:
    """Text and a line end to stdout, at once.

    Raises:
        CacheTuneError: the disk behind it is full, or the reader went away.
    """
    try:
        print(text, flush=True)
    except OSError as e:
        # What is left in the buffer would fail again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise CacheTuneError(
            "the result must be written to stdout",
            values=e.strerror or type(e).__name__,
            remedy="free space, or send stdout elsewhere",
        ) from None


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return str(value)
