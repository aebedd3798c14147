"""Ctrl-C in the middle of serving and of ingesting: the store opens clean afterwards."""

from __future__ import annotations

import _thread
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from cachetune.core.plan import ReusePlan
from cachetune.runtime.executor import CpuExecutor
from cachetune.runtime.runner import Runner

from . import model_cases as cases
from .model_cases import TIERS, prompt_workload, tokens

SCRIPT = """
import faulthandler, signal, sys, threading
from pathlib import Path

faulthandler.register(signal.SIGUSR1, all_threads=True)
# A shell's background job, and so what it starts, ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)
from {package} import model_cases as cases
from cachetune.runtime.runner import Runner

loaded, _ = cases.make_twins("llama")
plan = cases.plan_with("cachetune", 0.3)
runner = Runner(loaded, Path(sys.argv[1]), cases.TIERS)
print("ready", flush=True)
try:
    for number in range(10**6):
        chunks = [cases.tokens(64, 10 * number + i) for i in range(3)]
        workload = cases.prompt_workload([(*chunks, cases.tokens(8))] * 3, n_output=4)
        runner.prepare(workload, plan, "file")
        runner.serve(workload, plan, runner.index(plan))
        if number == 0:
            print("served", flush=True)
except KeyboardInterrupt:
    alive = [t.name for t in threading.enumerate() if t is not threading.main_thread()]
    print("interrupted, threads left:", alive, flush=True)
    sys.exit(130)  # the store is not closed
"""

ROOT = Path(__file__).resolve().parents[2]


def start(folder: Path) -> subprocess.Popen[str]:
    package = __package__ or "tests.runtime"
    paths = [str(ROOT), str(ROOT / ".typing"), str(ROOT / "tests")]
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(package=package), str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
    )


def ended(process: subprocess.Popen[str], within_s: float = 60) -> tuple[str, str]:
    """What it printed; where it stood if it does not end. It is gone afterwards."""
    try:
        return process.communicate(timeout=within_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGUSR1)
        time.sleep(1)
        process.kill()
        return process.communicate()


def test_ctrl_c_leaves_a_store_that_opens_clean(tmp_path: Path) -> None:
    process = start(tmp_path)
    assert process.stdout is not None
    while (line := process.stdout.readline()) not in ("served\n", ""):
        pass
    time.sleep(random.Random().uniform(0.0, 0.3))  # anywhere in a round: each must do
    process.send_signal(signal.SIGINT)
    out, errors = ended(process)
    assert process.returncode == 130, line + out + errors
    assert "interrupted, threads left: []" in out, out + errors
    loaded, _ = cases.make_twins("llama")
    plan = cases.plan_with("cachetune", 0.3)
    with Runner(loaded, tmp_path, TIERS) as runner:
        assert not list((tmp_path / "chunks").glob("*.tmp"))
        _all_chunks_verify(runner, plan)
        chunks = [tokens(64, i) for i in range(3)]
        workload = prompt_workload([(*chunks, tokens(8))], n_output=4)
        result = runner.serve(workload, plan, runner.index(plan))
        assert result.n_reused_tokens[0] == 64 + 2 * (64 - 19)
        assert (result.n_fallbacks, result.n_read_failures) == (0, 0)


def test_an_interrupt_within_the_start_of_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Thread.start` is left before the thread is up; closing waits for it all the same."""
    begin = threading.Thread.start
    n_workers = 0

    def interrupted(thread: threading.Thread) -> None:
        nonlocal n_workers
        n_workers += 1
        _thread.start_new_thread(lambda: (time.sleep(0.05), begin(thread)), ())
        raise KeyboardInterrupt

    def source(request_id: int, attempt: int) -> Any:
        raise AssertionError

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt), CpuExecutor([None], source) as executor:  # type: ignore[list-item]
        executor.warm(["a stream"])
    assert n_workers == 1
    assert "a stream" not in [thread.name for thread in threading.enumerate()]


def _all_chunks_verify(runner: Runner, plan: ReusePlan) -> None:
    """Every chunk that is listed can be read whole."""
    kept = [entry for entry, _ in runner.index(plan)._entries.values()]
    assert len(kept) >= 3
    n_layers = runner.spec.n_layers
    for entry in kept:
        runner.store.read(entry.key, 0, n_layers, [entry.n_tokens] * n_layers, 1 << 20)
