"""Streams on cores: compute alone on its own, restores elsewhere, no core for two processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from cachetune.core.ops import COMPUTE, RESTORE
from cachetune.runtime import cores

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs two cores that threads can be bound to",
)

CLAIM = """
import sys
sys.path[:] = sys.argv[2:]
from cachetune.runtime.cores import claim
print(claim(1, {0, 1, 2}, sys.argv[1]), flush=True)
sys.stdin.read()
"""


def bound(stream: str, n_threads: int = 1) -> set[int]:
    """Where a thread of `stream` ends up."""
    found: list[set[int]] = []

    def work() -> None:
        cores.bind(stream, 0, n_threads)
        found.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0]


def test_restores_keep_off_the_core_that_computes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cores, "_claims", {})
    monkeypatch.setattr(cores.tempfile, "gettempdir", lambda: str(tmp_path))
    usable = os.sched_getaffinity(0)
    compute, restore = bound(COMPUTE), bound(RESTORE)
    assert len(compute) == 1 and restore == usable - compute
    assert bound("io.0") == usable  # reads go where there is room
    assert bound(COMPUTE, n_threads=len(usable)) == usable  # none would be left
    assert os.sched_getaffinity(0) == usable  # of the caller


def test_a_core_is_one_process_s(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIM, str(tmp_path), *sys.path],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(4)
    ]  # fmt: skip
    try:
        found = [p.stdout.readline().strip() for p in processes if p.stdout]
    finally:
        for process in processes:
            process.communicate()
    assert sorted(found) == ["[0]", "[1]", "[2]", "[]"]
    again = subprocess.run(
        [sys.executable, "-c", CLAIM, str(tmp_path), *sys.path],
        input="", capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert again.stdout.strip() == "[0]"  # claims end with their process


def test_a_folder_that_cannot_be_written_binds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_claims", {})
    assert cores.claim(1, {0, 1}, "/nowhere") == []
