"""Many independent simulations: over processes of one machine, or over Ray; resumed from a journal.

A task is a JSON object that says everything, its seed among it; its result is a JSON object. The
results are those of the tasks in their order, whoever computed them and how many did. Each one is
written down when it comes; a sweep that is begun again takes what is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..core.errors import CacheTuneError
from ..core.record import canonical_json

Task = Mapping[str, Any]
Result = dict[str, Any]
Work = Callable[[Task], Result]
"""A function of a module, so that other processes find it by name."""

Backend = Callable[[Work, Sequence[Task], int], Iterator[tuple[int, Result]]]
"""(work, tasks, number of workers) -> (place of the task, result), as they end."""

BACKENDS = ("processes", "ray")


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a sweep; `results` has None where a task was not done."""

    def __init__(self, results: list[Result | None]) -> None:
        super().__init__("interrupted")
        self.results = results


def sweep(
    work: Work,
    tasks: Sequence[Task],
    *,
    workers: int = 1,
    backend: str | Backend = "processes",
    journal: Path | None = None,
    on_done: Callable[[int, int], None] = lambda done, total: None,
) -> list[Result]:
    """Results of `work` on `tasks`, in their order.

    Args:
        work: see `Work`.
        tasks: JSON objects; equal ones are computed once.
        workers: processes, at least 1; 1 computes here.
        backend: of `BACKENDS`, or `processes` that are kept for several sweeps.
        journal: JSON lines, made or continued.
        on_done: called with (tasks done, tasks) after each.

    Raises:
        Interrupted: Ctrl-C; the journal has what was done.
        CacheTuneError: no such backend, it is not installed, or the journal is of another kind.
    """
    run = _backend(backend, workers) if isinstance(backend, str) else backend
    keys = [task_key(work, task) for task in tasks]
    known = Journal(journal).read() if journal is not None else {}
    todo = {k: t for k, t in zip(keys, tasks, strict=True) if k not in known}
    log = Journal(journal)
    done = len(tasks) - sum(k in todo for k in keys)
    on_done(done, len(tasks))
    todo_keys = list(todo)
    try:
        for at, result in run(work, list(todo.values()), workers):
            key = todo_keys[at]
            known[key] = json.loads(canonical_json(result))
            log.append(key, known[key])
            done += keys.count(key)
            on_done(done, len(tasks))
    except KeyboardInterrupt:
        raise Interrupted([known.get(k) for k in keys]) from None
    return [known[k] for k in keys]


def task_key(work: Work, task: Task) -> str:
    """Identity of a result: the function, the package's version and the whole task."""
    from .. import __version__

    text = canonical_json([work.__module__, work.__qualname__, __version__, task])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Journal:
    """Results by key, one JSON line each; a last line that was cut short is forgotten."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def read(self) -> dict[str, Result]:
        """What is there; nothing if there is no file.

        Raises:
            CacheTuneError: a line before the last is not one of a journal.
        """
        if self.path is None or not self.path.exists():
            return {}
        lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        found: dict[str, Result] = {}
        for number, line in enumerate(lines[:-1], 1):
            try:
                row = json.loads(line)
                found[row["key"]] = dict(row["result"])
            except (ValueError, KeyError, TypeError):
                if number == len(lines) - 1:
                    break
                raise CacheTuneError(
                    "a sweep's journal must hold one result per line",
                    values=f"{self.path}, line {number}",
                    remedy="delete the file to begin again, or name another --out",
                ) from None
        if lines[-1] or len(found) < len(lines) - 1:
            self._cut(found)
        return found

    def append(self, key: str, result: Result) -> None:
        """One more line, on the disk before this returns.

        Raises:
            CacheTuneError: no permission, no space.
        """
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as f:
                f.write(canonical_json({"key": key, "result": result}) + "\n")
                f.flush()
                os.fsync(f.fileno())
        except OSError as e:
            raise CacheTuneError(
                "the sweep's journal must be writable",
                values=f"{self.path}: {e.strerror}",
                remedy="free space, or choose another --out",
            ) from None

    def _cut(self, found: dict[str, Result]) -> None:
        from ..core.record import write_atomic

        assert self.path is not None
        rows = (canonical_json({"key": k, "result": r}) + "\n" for k, r in found.items())
        write_atomic(self.path, "".join(rows).encode())


def _backend(name: str, workers: int) -> Backend:
    if workers < 1:
        raise CacheTuneError("a sweep needs a worker", values=str(workers), remedy="pass 1 or more")
    if name == "processes":
        return _here if workers == 1 else _processes
    if name == "ray":
        from .sweep_ray import on_ray

        return on_ray
    raise CacheTuneError(
        f"the backend must be one of {', '.join(BACKENDS)}",
        values=repr(name),
        remedy="leave it out for processes on this machine",
    )


def _here(work: Work, tasks: Sequence[Task], workers: int) -> Iterator[tuple[int, Result]]:
    for at, task in enumerate(tasks):
        yield at, work(task)


def _processes(work: Work, tasks: Sequence[Task], workers: int) -> Iterator[tuple[int, Result]]:
    with processes(min(workers, max(1, len(tasks)))) as run:
        yield from run(work, tasks, workers)


@contextmanager
def processes(workers: int) -> Iterator[Backend]:
    """A backend whose processes stay for several sweeps, with all that they have read and fitted;
    with one worker, this process."""
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from multiprocessing import get_context

    if workers == 1:
        yield _here
        return
    # Not fork: a progress bar has a thread, and a fork may take its locks along.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _worker, (list(sys.path),))

    def run(work: Work, tasks: Sequence[Task], _workers: int) -> Iterator[tuple[int, Result]]:
        futures = {pool.submit(work, dict(task)): at for at, task in enumerate(tasks)}
        for future in as_completed(futures):
            yield futures[future], future.result()

    try:
        yield run
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _worker(path: list[str]) -> None:
    """Ctrl-C is the parent's business; imports work as they do there."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.path[:] = path
