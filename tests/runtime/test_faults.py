"""What goes wrong is found, said once and clearly, and loses nothing."""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cachetune.core.errors import (
    CacheTuneError,
    CapacityError,
    ModelError,
    StoreError,
)
from cachetune.core.layout import blob_bytes
from cachetune.core.model_spec import spec_from_hf_config
from cachetune.core.ops import COMPUTE, RESTORE
from cachetune.core.plan import ReusePlan
from cachetune.runtime import chunk_file
from cachetune.runtime.chunk_store import ChunkCorrupt, ChunkStore
from cachetune.runtime.executor import CpuExecutor
from cachetune.runtime.handlers import Handlers
from cachetune.runtime.llm import LLM, Prompt
from cachetune.runtime.runner import Runner
from cachetune.runtime.tiers import TierConfig

from . import model_cases as cases
from .model_cases import TIERS, plan_with, prompt_workload, tokens

PARTS = (tokens(40), tokens(33), tokens(50), tokens(12))
SPEC = spec_from_hf_config(cases.make_config("llama").to_dict() | {"dtype": "float32"})
WORKERS = ("io.", COMPUTE, RESTORE)
"""What the names of the executor's threads begin with."""
PLAN = plan_with("cachetune", 0.3, layer_group=1)


@pytest.fixture(scope="module")
def loaded() -> Any:
    torch.set_num_threads(1)
    return cases.make_twins("llama")[0]


@pytest.fixture
def runner(loaded: Any, tmp_path: Path) -> Iterator[Runner]:
    with Runner(loaded, tmp_path / "store", TIERS) as runner:
        yield runner


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not [t for t in threading.enumerate() if t.name.startswith(WORKERS)]


def flip(path: Path, layer: int) -> None:
    """Change one bit of the first row group of a layer of `PARTS[1]` or `PARTS[2]`."""
    data = bytearray(path.read_bytes())
    blob = blob_bytes(SPEC, len(PARTS[1]))
    data[len(data) - (4 - layer) * blob + 1000] ^= 4
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "first layer": lambda p: flip(p, 0),
    "last layer": lambda p: flip(p, 3),
    "truncated": lambda p: os.truncate(p, p.stat().st_size // 2),
    "empty": lambda p: os.truncate(p, 0),
    "missing": Path.unlink,
}


def chunk_path(runner: Runner, ids: tuple[int, ...], plan: ReusePlan) -> tuple[str, Path]:
    """Key and file of a chunk."""
    workload = prompt_workload([(ids, (1,))])
    (entry,) = runner.index(plan).lookup(workload.requests[0].chunks)
    assert entry is not None
    (path,) = (runner.store.root / "chunks").glob(f"{entry.key}*")
    return entry.key, path


def answer_without(runner: Runner, damaged: int, plan: ReusePlan) -> list[int]:
    """The tokens when that chunk is computed and the others are reused."""
    workload = prompt_workload([PARTS], n_output=6)
    index = runner.index(plan)
    key, _ = chunk_path(runner, PARTS[damaged], plan)
    index.discard(key)
    return runner.serve(workload, plan, index).token_ids[0]


@pytest.mark.parametrize("load_order", ["layer", "chunk"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_chunk_is_recomputed(runner: Runner, damage: str, load_order: str) -> None:
    plan = PLAN.replace(load_order=load_order, n_io_workers=2)
    workload = prompt_workload([PARTS], n_output=6)
    runner.prepare(workload, plan, "file")
    expected = answer_without(runner, 1, plan)
    key, path = chunk_path(runner, PARTS[1], plan)
    DAMAGE[damage](path)
    index = runner.index(plan)
    result = runner.serve(workload, plan, index)
    assert result.token_ids[0] == expected
    assert (result.n_fallbacks, result.n_read_failures) == (1, 1)
    assert result.n_reused_tokens[0] == 40 + 35
    assert max(s.op.attempt for s in result.timeline.spans) == 1
    with pytest.raises(StoreError):  # it left the store, so that it can be ingested again
        runner.store.entry(key)
    runner.prepare(workload, plan, "file", only_missing=True)
    again = runner.serve(workload, plan, runner.index(plan))
    assert (again.n_fallbacks, again.n_reused_tokens[0]) == (0, 40 + 24 + 35)


def test_several_damaged_chunks_among_several_requests(runner: Runner) -> None:
    """Others are not disturbed, and every buffer comes back."""
    prompts = [PARTS, (PARTS[1], PARTS[2], tokens(9)), (PARTS[0], tokens(20)), (tokens(30),)]
    workload = prompt_workload(prompts, n_output=4)
    runner.prepare(workload, PLAN, "file")
    index = runner.index(PLAN)
    for part in (1, 2):
        index.discard(chunk_path(runner, PARTS[part], PLAN)[0])
    expected = runner.serve(workload, PLAN, index).token_ids
    for part in (1, 2):
        flip(chunk_path(runner, PARTS[part], PLAN)[1], 3)
    result = runner.serve(workload, PLAN, runner.index(PLAN))
    assert result.token_ids == expected
    assert 2 <= result.n_fallbacks <= 4
    assert len({id(b) for b in runner._pool._free}) == len(runner._pool._free) >= 4


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_while_the_store_was_closed(loaded: Any, tmp_path: Path, damage: str) -> None:
    """Also where the file's header, which holds the order, is first read by the request."""
    workload = prompt_workload([PARTS], n_output=6)
    with Runner(loaded, tmp_path, TIERS) as runner:
        runner.prepare(workload, PLAN, "file")
        expected = answer_without(runner, 1, PLAN)
        _, path = chunk_path(runner, PARTS[1], PLAN)
    DAMAGE[damage](path)
    with Runner(loaded, tmp_path, TIERS) as runner:
        result = runner.serve(workload, PLAN, runner.index(PLAN))
        assert result.token_ids[0] == expected


def test_a_file_that_vanishes_after_a_restart(loaded: Any, tmp_path: Path) -> None:
    """The index still lists it, and its order has not been read."""
    workload = prompt_workload([PARTS], n_output=6)
    with Runner(loaded, tmp_path, TIERS) as runner:
        runner.prepare(workload, PLAN, "file")
        expected = answer_without(runner, 1, PLAN)
    with Runner(loaded, tmp_path, TIERS) as runner:
        index = runner.index(PLAN)
        chunk_path(runner, PARTS[1], PLAN)[1].unlink()
        result = runner.serve(workload, PLAN, index)
        assert result.token_ids[0] == expected
        assert (result.n_fallbacks, result.n_read_failures) == (1, 1)


def test_a_chunk_evicted_before_its_turn_is_recomputed(runner: Runner) -> None:
    workload = prompt_workload([PARTS], n_output=6)
    runner.prepare(workload, PLAN, "file")
    expected = answer_without(runner, 1, PLAN)
    index = runner.index(PLAN)
    runner.store.discard(chunk_path(runner, PARTS[1], PLAN)[0])
    result = runner.serve(workload, PLAN, index)
    assert result.token_ids[0] == expected
    assert result.n_fallbacks == 1


@pytest.mark.parametrize("damage", ["last layer", "missing"])
def test_llm_recomputes_and_ingests_again(loaded: Any, tmp_path: Path, damage: str) -> None:
    prompt = Prompt(PARTS[:-1], PARTS[-1], max_tokens=6)
    with LLM(loaded, PLAN, store_dir=tmp_path, tier="file") as llm:
        llm.ingest(PARTS[:-1])
        expected = answer_without(llm.runner, 1, PLAN)
        good = llm.generate([prompt], ignore_eos=True)[0]
        DAMAGE[damage](chunk_path(llm.runner, PARTS[1], PLAN)[1])
        hurt = llm.generate([prompt], ignore_eos=True)[0]
        healed = llm.generate([prompt], ignore_eos=True)[0]
    assert hurt.token_ids == expected
    assert hurt.n_reused_tokens == good.n_reused_tokens - 24
    assert healed == replace(good, ttft_ms=healed.ttft_ms)


def swap(runner: Runner, one: int, two: int) -> None:
    """Give each of two chunk files the other's name."""
    a, b = (chunk_path(runner, PARTS[i], PLAN)[1] for i in (one, two))
    a.rename(b.with_suffix(".x"))
    b.rename(a)
    b.with_suffix(".x").rename(b)


def test_swapped_files_cost_two_recomputes(runner: Runner) -> None:
    workload = prompt_workload([PARTS], n_output=6)
    runner.prepare(workload, PLAN, "file")
    index = runner.index(PLAN)
    for part in (1, 2):
        index.discard(chunk_path(runner, PARTS[part], PLAN)[0])
    expected = runner.serve(workload, PLAN, index).token_ids[0]
    index = runner.index(PLAN)
    swap(runner, 1, 2)
    result = runner.serve(workload, PLAN, index)
    assert result.token_ids[0] == expected and result.n_reused_tokens[0] == 40
    assert 1 <= result.n_fallbacks <= 2 and result.n_read_failures == 2


@pytest.mark.parametrize("failing_read", [1, 2, 5, 9])
def test_read_errors_in_the_middle_of_a_request_are_counted(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, failing_read: int
) -> None:
    """The disk gives up at the n-th read: that chunk is computed, the answer is right."""
    workload = prompt_workload([PARTS], n_output=6)
    runner.prepare(workload, PLAN, "file")
    computed = runner.serve(workload, plan_with("full_recompute"), runner.index(PLAN)).token_ids
    usual, calls = os.preadv, itertools.count(1)
    failed: list[int] = []

    def preadv(fd: int, buffers: Any, offset: int, *more: int) -> int:
        number = next(calls)
        if number == failing_read:
            failed.append(number)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return usual(fd, buffers, offset, *more)

    monkeypatch.setattr(os, "preadv", preadv)
    result = runner.serve(workload, PLAN, runner.index(PLAN))
    monkeypatch.undo()
    assert failed == [failing_read]
    assert (result.n_fallbacks, result.n_read_failures) == (1, 1)
    assert len(runner.store.index(PLAN.selector)) == 2  # it left the store
    again = runner.serve(workload, PLAN, runner.index(PLAN))
    assert again.token_ids == result.token_ids and again.n_read_failures == 0
    assert len(result.token_ids[0]) == len(computed[0]) == 6


def test_a_fixed_schedule_does_not_fall_back(runner: Runner) -> None:
    """Its times would be those of ops that did nothing."""
    workload = prompt_workload([PARTS])
    runner.prepare(workload, PLAN, "file")
    flip(chunk_path(runner, PARTS[1], PLAN)[1], 3)
    with pytest.raises(ChunkCorrupt):
        runner.execute(workload, workload.requests[0], PLAN, runner.index(PLAN))


def test_an_error_in_a_worker_reaches_the_caller(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = prompt_workload([PARTS, (PARTS[2], PARTS[1], tokens(4))], n_output=4)
    runner.prepare(workload, PLAN, "dram")

    def broken(*_: Any) -> None:
        raise ZeroDivisionError("restore")

    monkeypatch.setattr(Handlers, "restore", broken)
    with pytest.raises(ZeroDivisionError, match="restore"):
        runner.serve(workload, PLAN, runner.index(PLAN))
    monkeypatch.undo()
    assert len(runner.serve(workload, PLAN, runner.index(PLAN)).token_ids) == 2


@pytest.mark.parametrize("method", ["submit", "wait"])
@pytest.mark.parametrize("call", [1, 2, 5, 9])
def test_ctrl_c_while_serving(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, method: str, call: int
) -> None:
    """It reaches the caller, no worker goes on, and the runner serves again. (In a process of its
    own, by a signal: test_interrupt.py.)"""
    workload = prompt_workload([PARTS, (PARTS[2], PARTS[1], tokens(4))], n_output=4)
    runner.prepare(workload, PLAN, "file")
    expected = runner.serve(workload, PLAN, runner.index(PLAN)).token_ids
    usual = getattr(CpuExecutor, method)
    calls = itertools.count(1)

    def interrupted(self: CpuExecutor, *args: Any) -> Any:
        if next(calls) == call:
            raise KeyboardInterrupt
        return usual(self, *args)

    monkeypatch.setattr(CpuExecutor, method, interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.serve(workload, PLAN, runner.index(PLAN))
    assert not [t for t in threading.enumerate() if t.name.startswith(WORKERS)]
    monkeypatch.undo()
    assert runner.serve(workload, PLAN, runner.index(PLAN)).token_ids == expected


# Disks


def full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_while_ingesting(
    loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = Prompt(PARTS[:-1], PARTS[-1], max_tokens=3)
    with LLM(loaded, PLAN, store_dir=tmp_path, tier="file") as llm:
        monkeypatch.setattr(chunk_file.os, "fsync", full_disk)
        with pytest.raises(CacheTuneError, match="No space left") as e:
            llm.ingest(PARTS[:-1])
        assert "\n" not in str(e.value)
        assert len(llm.generate([prompt])) == 1  # an answer is not lost for want of space
        monkeypatch.undo()
        assert not list((tmp_path / "chunks").glob("*.tmp"))
        llm.ingest(PARTS[:-1])
        assert llm.generate([prompt])[0].n_reused_tokens == 40 + 24 + 35


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission_to_write(loaded: Any, tmp_path: Path) -> None:
    with LLM(loaded, PLAN, store_dir=tmp_path, tier="file") as llm:
        (tmp_path / "chunks").chmod(0o500)
        try:
            with pytest.raises(StoreError, match="Permission denied"):
                llm.ingest(PARTS[:-1])
        finally:
            (tmp_path / "chunks").chmod(0o700)


def test_denied_permission_is_one_clear_error(
    loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As above, for those who may write anywhere."""

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with LLM(loaded, PLAN, store_dir=tmp_path, tier="file") as llm:
        monkeypatch.setattr(chunk_file.os, "rename", denied)
        with pytest.raises(StoreError, match="Permission denied") as e:
            llm.ingest(PARTS[:1])
        assert "\n" not in str(e.value)
        monkeypatch.undo()
        assert len(llm.ingest(PARTS[:1])) == 1


def test_a_chunk_larger_than_its_tier(loaded: Any, tmp_path: Path) -> None:
    tiers = [TierConfig("dram", "dram", capacity_bytes=4096)]
    with LLM(loaded, PLAN, store_dir=tmp_path, tiers=tiers) as llm:
        with pytest.raises(CapacityError, match="must fit into its tier"):
            llm.ingest(PARTS[:1])
        assert llm.generate([Prompt(PARTS[:-1], PARTS[-1], 2)])[0].n_reused_tokens == 0


def test_the_store_can_be_opened_after_a_failed_start(tmp_path: Path, loaded: Any) -> None:
    with pytest.raises(ModelError):
        LLM("no-such-shape", store_dir=tmp_path)
    ChunkStore(tmp_path, loaded.spec, loaded.fingerprint, TIERS).close()
