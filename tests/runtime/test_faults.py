"""What goes wrong is found, said once and clearly, and loses nothing."""

from __future__ import annotations

import errno
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
    WorkloadError,
)
from cachetune.core.layout import blob_bytes
from cachetune.core.model_spec import spec_from_hf_config
from cachetune.core.plan import ReusePlan
from cachetune.runtime import chunk_file
from cachetune.runtime.chunk_store import ChunkCorrupt, ChunkStore
from cachetune.runtime.handlers import Handlers
from cachetune.runtime.llm import LLM, Prompt
from cachetune.runtime.loaded_model import load_model, random_model
from cachetune.runtime.rope_gate import check_rope
from cachetune.runtime.runner import Runner
from cachetune.runtime.tiers import TierConfig
from cachetune.runtime.transformer import Transformer

from . import model_cases as cases
from .model_cases import TIERS, plan_with, prompt_workload, tokens

PARTS = (tokens(40), tokens(33), tokens(50), tokens(12))
SPEC = spec_from_hf_config(cases.make_config("llama").to_dict() | {"dtype": "float32"})
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
    left = [t.name for t in threading.enumerate() if t.name.startswith(("io.", "compute", "rest"))]
    assert not left


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


# Bad input


def test_a_prompt_longer_than_the_context(loaded: Any, tmp_path: Path) -> None:
    with LLM(loaded, store_dir=tmp_path) as llm:
        with pytest.raises(WorkloadError, match=r"1025 tokens, .* has 1024"):
            llm.generate([Prompt([tokens(1000)], tokens(9), max_tokens=16)])
        assert len(llm.generate([Prompt([tokens(999)], tokens(9), max_tokens=16)])) == 1


def test_a_prompt_larger_than_the_kv_capacity(loaded: Any, tmp_path: Path) -> None:
    with Runner(loaded, tmp_path, TIERS, kv_capacity_tokens=64) as runner:
        workload = prompt_workload([(tokens(40), tokens(40))])
        with pytest.raises(CapacityError, match="81 tokens need 6 blocks, the pool has 4"):
            runner.serve(workload, PLAN, runner.index(PLAN))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "at least one prompt"),
        ([Prompt([[]], [1])], "each chunk of prompt 0 must hold at least one token"),
        ([Prompt([[1]], [])], "the suffix of prompt 0 must hold at least one token"),
        ([Prompt([[1]], [2]), Prompt([[1, 256]], [2])], r"prompt 1 .* 0\.\.255, got ids from 1"),
        ([Prompt([[1]], [-1])], r"0\.\.255"),
        ([Prompt([[1]], [1], max_tokens=0)], "max_tokens must be at least 1"),
        ([Prompt(["text"], [1])], "needs a tokenizer"),
    ],
)
def test_prompts_that_say_nothing(
    loaded: Any, tmp_path: Path, prompts: list[Prompt], message: str
) -> None:
    with LLM(loaded, store_dir=tmp_path) as llm, pytest.raises(WorkloadError, match=message):
        llm.generate(prompts)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "phi3"])
def test_families_that_are_not_supported(family: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(family)
    with pytest.raises(ModelError, match=f"llama, mistral, qwen2, qwen3, got .*'{family}'"):
        random_model(config)


@pytest.mark.parametrize(
    ("rope", "name"),
    [
        (dict(rope_type="dynamic", factor=2.0), "dynamic"),
        (dict(rope_type="longrope", short_factor=[1.0] * 8, long_factor=[1.0] * 8), "longrope"),
        (dict(rope_type="default", mrope_section=[2, 3, 3]), "mrope"),
        (dict(rope_type="proportional"), "proportional"),
    ],
)
def test_rope_kinds_that_are_not_supported(rope: dict[str, Any], name: str) -> None:
    config = cases.make_config("llama").to_dict()
    config["rope_parameters"] = {"rope_theta": 1e4, **rope}

    class Config:
        model_type = "llama"

        def to_dict(self) -> dict[str, Any]:
            return config

    with pytest.raises(ModelError, match=f"default, linear, llama3, yarn, got .*{name}"):
        random_model(Config())


@pytest.mark.parametrize("source", ["no-such-shape", "/nowhere"])
def test_models_that_are_not_there(source: str) -> None:
    with pytest.raises(ModelError, match="llama-tiny"):
        load_model(source)


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_the_rope_gate_passes_every_family(family: str) -> None:
    assert check_rope(Transformer(cases.make_twins(family)[0])) < 1e-6


MUTATIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {
    "one position off": lambda c, s: (c.roll(1, 0), s.roll(1, 0)),
    "other direction": lambda c, s: (c, -s),
    "no attention factor": lambda c, s: (c * 1.01, s * 1.01),
    "pairs swapped": lambda c, s: (c.flip(1), s.flip(1)),
    "not rotated": lambda c, s: (torch.ones_like(c), torch.zeros_like(s)),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_rope_gate_catches_a_wrong_rotation(
    loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutation: str
) -> None:
    right = Transformer.rope_table

    def wrong(self: Transformer, n: int) -> Any:
        return MUTATIONS[mutation](*right(self, n))

    monkeypatch.setattr(Transformer, "rope_table", wrong)
    with pytest.raises(ModelError, match="rotated at a new place"):
        LLM(loaded, store_dir=tmp_path)
    monkeypatch.undo()
    LLM(loaded, store_dir=tmp_path).close()  # the store was let go


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
