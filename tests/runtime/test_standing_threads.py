"""Work of a name goes to the thread that did the last of it."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
from cachetune.core.plan import ReusePlan
from cachetune.runtime.runner import Runner
from cachetune.runtime.standing_threads import StandingThreads
from fake_cuda import FakeCuda

from .model_cases import TIERS, make_twins, plan_with, prompt_workload, tokens


def ident(threads: StandingThreads, name: str = "compute") -> int:
    found: list[int] = []
    threads.start(name, lambda: found.append(threading.get_ident())).join()
    return found[0]


def test_a_thread_stands_ready_for_the_next_work_of_its_name() -> None:
    threads = StandingThreads()
    first = ident(threads)
    assert [ident(threads) for _ in range(50)] == [first] * 50
    assert ident(threads, "other") != first


def test_while_it_is_busy_another_one_begins() -> None:
    threads, gate, met = StandingThreads(), threading.Event(), threading.Event()

    def wait() -> None:
        met.set()
        assert gate.wait(20)

    long = threads.start("compute", wait)
    assert met.wait(20)
    other = ident(threads)
    gate.set()
    long.join()
    assert len({other, ident(threads), ident(threads)}) <= 2


def test_an_error_is_told_and_the_thread_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: told.append(args.exc_value))
    threads = StandingThreads()
    first = ident(threads)
    threads.start("compute", lambda: 1 / 0).join()
    assert isinstance(told[0], ZeroDivisionError) and ident(threads) == first


def test_what_was_done_is_let_go() -> None:
    class Big:
        pass

    threads, big = StandingThreads(), Big()
    seen = weakref.ref(big)
    threads.start("compute", lambda big=big: None).join()
    del big
    gc.collect()
    ident(threads, "other")
    assert seen() is None


def test_runs_of_a_gpu_compute_on_one_thread(tmp_path: object) -> None:
    device, ran = FakeCuda(), set()
    device.standing = StandingThreads()
    workload = prompt_workload([[tokens(40), tokens(9, 1)]], 2)
    plan: ReusePlan = plan_with("cachetune", 0.3)
    with Runner(
        make_twins("llama")[0], str(tmp_path), TIERS, device=device, kv_capacity_tokens=512
    ) as runner:
        runner.prepare(workload, plan, "dram")
        index = runner.index(plan)
        start = device.standing.start

        def note(name: str, work: object) -> object:
            return start(name, lambda: (ran.add(threading.get_ident()), work()))  # type: ignore[operator]

        device.standing.start = note  # type: ignore[method-assign,assignment]
        made = [runner.serve(workload, plan, index).token_ids for _ in range(4)]
    assert len(ran) == 1 and made == made[:1] * 4 and len(made[0][0]) == 2
