"""Sweeps: the same results whoever computes them; a journal that survives an end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cachetune.core.errors import CacheTuneError
from cachetune.tuner.sweep import Interrupted, processes, sweep
from sweep_work import draws

TASKS = [{"seed": i % 5, "n": 100 + i} for i in range(12)]


def fails_on_second(task: Any) -> dict[str, Any]:
    if task["n"] == 101:
        raise KeyboardInterrupt
    return draws(task)


def test_results_do_not_depend_on_the_number_of_workers():
    alone = sweep(draws, TASKS)
    assert [r["n"] for r in alone] == [t["n"] for t in TASKS]
    assert sweep(draws, TASKS, workers=2) == alone


def test_processes_stay_for_several_sweeps():
    alone = sweep(draws, TASKS)
    with processes(2) as run:
        assert sweep(draws, TASKS[:7], workers=2, backend=run) == alone[:7]
        assert sweep(draws, TASKS[7:], workers=2, backend=run) == alone[7:]


def test_a_sweep_resumes_where_it_was_interrupted(tmp_path: Path):
    journal = tmp_path / "journal.jsonl"
    with pytest.raises(Interrupted) as stop:
        sweep(fails_on_second, TASKS, journal=journal)
    assert [r is not None for r in stop.value.results] == [True] + [False] * 11
    assert len(journal.read_text().splitlines()) == 1
    journal.unlink()
    whole = sweep(draws, TASKS, journal=journal)
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:5]) + lines[5][:20])  # the machine died while writing
    told = []
    assert sweep(draws, TASKS, journal=journal, on_done=lambda *a: told.append(a)) == whole
    assert told[0] == (5, 12) and told[-1] == (12, 12)
    assert sorted(journal.read_bytes().splitlines()) == sorted(b"".join(lines).splitlines())


def test_bad_journals_backends_and_counts_are_refused(tmp_path: Path):
    journal = tmp_path / "journal.jsonl"
    journal.write_text('nonsense\n{"key": "a", "result": {}}\n')
    with pytest.raises(CacheTuneError, match="line 1"):
        sweep(draws, TASKS, journal=journal)
    with pytest.raises(CacheTuneError, match="processes, ray"):
        sweep(draws, TASKS, backend="threads")
    with pytest.raises(CacheTuneError, match="needs a worker"):
        sweep(draws, TASKS, workers=0)


@pytest.mark.slow
def test_ray_gives_the_same_results(tmp_path: Path):
    """A local cluster of two processes; in a process of its own, since Ray leaves threads."""
    pytest.importorskip("ray")
    program = tmp_path / "on_ray.py"
    program.write_text(
        "import json\n"
        "from cachetune.tuner.sweep import sweep\n"
        "from sweep_work import draws\n"
        f"print(json.dumps(sweep(draws, {TASKS!r}, workers=2, backend='ray')))\n"
    )
    done = subprocess.run(
        [sys.executable, str(program)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == sweep(draws, TASKS)
