"""kill -9 at random moments of ingest, evict, place, discard, serve and of opening itself.

Six stores live through it side by side, one per stored format: values as they are, FP8, and codes
of 8, 4, 3 and 2 bits.
"""

from __future__ import annotations

import mmap
import random
import signal
import time
from collections import Counter
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from cachetune.runtime.loaded_model import LoadedModel

from ..runtime import model_cases as cases
from . import kill_cases
from .soak_log import Counts, Soak


def kill_one(root: Path, loaded: LoadedModel, number: int, draw: random.Random) -> str:
    """Start a process, kill it at a random moment; returns what it was at."""
    context = get_context("fork")  # the model is there already: no second import
    phase = mmap.mmap(-1, 1)
    ours, theirs = context.Pipe()
    child = context.Process(
        target=kill_cases.work_forever, args=(root, loaded, number, phase, theirs), daemon=True
    )
    # Ctrl-C inside the hooks of a fork would be swallowed; it waits until the fork is done.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    child.start()
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        if number % 10 == 9:
            time.sleep(draw.uniform(0, 0.03))
        else:
            assert ours.poll(60), "the process did not get ready"
            time.sleep(draw.uniform(0.0, 0.5))
    finally:
        child.kill()
        child.join()
    code = child.exitcode
    child.close()
    ours.close()
    theirs.close()
    assert code == -signal.SIGKILL, f"the process ended by itself: {code}"
    return kill_cases.PHASES[phase[0]]


@torch.inference_mode()
def kill_round(root: Path, loaded: LoadedModel, number: int) -> Counts:
    """One kill, then everything is checked, and the store serves; formats change every 5 rounds,
    which is how many acts a process may be set on."""
    draw = random.Random(number)
    stored = kill_cases.FORMATS[number // 5 % len(kill_cases.FORMATS)]
    root, loaded = root / stored, loaded.stored_as(stored)
    counts: Counts = {f"killed_in_{name}": 0 for name in kill_cases.PHASES}
    counts |= {f"rounds_{name}": 0 for name in kill_cases.FORMATS}
    counts[f"rounds_{stored}"] = 1
    counts[f"killed_in_{kill_one(root, loaded, number, draw)}"] = 1
    with kill_cases.open_runner(loaded, root) as runner:
        repairs = runner.store.repairs
        assert repairs["bad_files_removed"] == repairs["index_rebuilt"] == 0, repairs
        counts |= repairs
        counts |= kill_cases.check_store(runner, draw)
        workload = kill_cases.workload_of(draw)
        index = runner.index(kill_cases.PLAN)
        result = runner.serve(workload, kill_cases.PLAN, index)
        assert (result.n_fallbacks, result.n_read_failures) == (0, 0)
        assert {len(made) for made in result.token_ids.values()} == {4}
        counts["tokens_reused"] = sum(result.n_reused_tokens.values())
    return counts


def test_twelve_kills(tmp_path: Path) -> None:
    """Of a full run the first in each format, and every act twice."""
    torch.set_num_threads(1)
    loaded, _ = cases.make_twins("llama")
    total = Counter[str]()
    for number in (5 * i + i % 5 for i in range(12)):
        total.update({k: int(v) for k, v in kill_round(tmp_path, loaded, number).items()})
    assert sum(total[f"killed_in_{name}"] for name in kill_cases.PHASES) == 12
    assert all(total[f"rounds_{stored}"] == 2 for stored in kill_cases.FORMATS)
    assert total["reads"] > 0


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_kills(soak: Soak, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    loaded, _ = cases.make_twins("llama")
    one_round = partial(kill_round, tmp_path, loaded)
    soak.run("kills", "tests/soak/test_soak_kills.py", one_round)
