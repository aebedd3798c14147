"""`LLM`: prompts as text or ids, what is kept between calls and objects, and plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cachetune.core.chunk_index import content_id_of
from cachetune.core.errors import (
    CacheTuneError,
    CapacityError,
    PlanError,
    StoreError,
    WorkloadError,
)
from cachetune.core.plan import RatioRule, ReusePlan, TunedPlan
from cachetune.runtime.llm import LLM, Completion, Prompt
from cachetune.runtime.loaded_model import LoadedModel
from cachetune.runtime.machine import device_here
from cachetune.runtime.tiers import TierConfig
from torch import nn

from . import model_cases as cases
from .model_cases import plan_with, tokens

CHUNKS = ("the first passage. ", "a second, longer passage follows. ", "and a third one. ")
PROMPT = Prompt(CHUNKS, "question?", max_tokens=5)
IDS = Prompt((tokens(40), tokens(33)), tokens(9), max_tokens=5)


class Letters:
    """A tokenizer of bytes; as `tokenizers` does, `encode` may give an object with `ids`."""

    class Encoding:
        def __init__(self, ids: list[int]) -> None:
            self.ids = ids

    def __init__(self, wrapped: bool = False) -> None:
        self.wrapped = wrapped

    def encode(self, text: str) -> Any:
        ids = list(text.encode())
        return self.Encoding(ids) if self.wrapped else ids

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("latin-1")


@pytest.fixture(scope="module")
def twins() -> tuple[LoadedModel, Any]:
    torch.set_num_threads(1)
    return cases.make_twins("llama")


@pytest.fixture(scope="module")
def loaded(twins: tuple[LoadedModel, Any]) -> LoadedModel:
    return twins[0]


def tuned(loaded: LoadedModel, **changes: Any) -> TunedPlan:
    fields: dict[str, Any] = dict(
        plan=plan_with("cachetune", 0.5),
        hardware_fingerprint=device_here(1).fingerprint(),
        model_fingerprint=loaded.fingerprint,
    )
    return TunedPlan(**{**fields, **changes})


@pytest.mark.parametrize("wrapped", [False, True])
def test_text_is_the_same_as_its_ids(loaded: LoadedModel, wrapped: bool) -> None:
    letters = Letters()
    as_ids = Prompt([letters.encode(c) for c in CHUNKS], letters.encode("question?"), 5)
    with LLM(loaded, tokenizer=Letters(wrapped)) as llm:
        text, ids = llm.generate([PROMPT, as_ids], ignore_eos=True)
    assert text.token_ids == ids.token_ids
    assert text.text == letters.decode(text.token_ids)
    assert text.n_prompt_tokens == sum(len(c) for c in CHUNKS) + len("question?")


def test_without_a_tokenizer_there_is_no_text(loaded: LoadedModel) -> None:
    with LLM(loaded) as llm:
        (answer,) = llm.generate([IDS])
    assert answer.text is None
    assert isinstance(answer, Completion)
    assert answer.ttft_ms > 0


def test_the_second_call_reuses_what_the_first_ingested(loaded: LoadedModel) -> None:
    with LLM(loaded, plan_with("cachetune", 0.3)) as llm:
        first, second = (llm.generate([IDS])[0] for _ in range(2))
        assert first.n_reused_tokens == 0
        assert second.n_reused_tokens == 40 + 33 - 9
        moved = llm.generate([Prompt([tokens(20), tokens(40)], tokens(9), 5)])[0]
        assert moved.n_reused_tokens == 40 - 12


def test_never_ingesting_keeps_nothing(loaded: LoadedModel) -> None:
    with LLM(loaded, ingest="never") as llm:
        assert [llm.generate([IDS])[0].n_reused_tokens for _ in range(2)] == [0, 0]
        assert llm.ingest(IDS.chunks) == [content_id_of(c) for c in (tokens(40), tokens(33))]
        assert llm.generate([IDS])[0].n_reused_tokens > 0


def test_full_recompute_ingests_nothing(loaded: LoadedModel, twins: tuple[Any, Any]) -> None:
    with LLM(loaded, plan_with("full_recompute")) as llm:
        answers = [llm.generate([IDS], ignore_eos=True)[0] for _ in range(2)]
        assert llm.runner.store.counters.puts == 0
    bench = cases.Bench(llm.runner, twins[1])
    expected = bench.reference_tokens((*IDS.chunks, IDS.suffix), 5)
    assert [a.token_ids for a in answers] == [expected] * 2


@pytest.mark.parametrize("tier", ["dram", "file"])
def test_the_store_outlives_the_object(loaded: LoadedModel, tmp_path: Path, tier: str) -> None:
    plan = plan_with("cachetune", 0.3)
    with LLM(loaded, plan, store_dir=tmp_path, tier=tier) as llm:
        llm.ingest(IDS.chunks)
        before = llm.generate([IDS], ignore_eos=True)[0]
    with LLM(loaded, plan, store_dir=tmp_path, tier=tier) as llm:
        after = llm.generate([IDS], ignore_eos=True)[0]
        assert llm.runner.store.counters.puts == 0
    assert after.token_ids == before.token_ids
    assert after.n_reused_tokens == before.n_reused_tokens == 40 + 33 - 9


def test_a_temporary_store_is_removed(loaded: LoadedModel) -> None:
    with LLM(loaded) as llm:
        root = llm.runner.store.root
        llm.ingest(IDS.chunks)
        assert root.is_dir()
    assert not root.exists()
    llm.close()  # closing again does no harm


def test_chunks_kept_as_prefix_are_kept_alone_too_when_they_move(loaded: LoadedModel) -> None:
    """A `prefix` entry of the first place serves no other place."""
    first, second = IDS.chunks
    with LLM(loaded, plan_with("cachetune", 0.0)) as llm:
        llm.runner.ingestor.ingest_prefix([first], selector="low_pass", tier="dram")
        swapped = Prompt([second, first], IDS.suffix, 2)
        llm.generate([swapped])
        assert llm.generate([swapped])[0].n_reused_tokens == 40 + 33


def test_ingesting_again_encodes_nothing(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(loaded) as llm:
        ids = llm.ingest(IDS.chunks)

        def encode(*_: Any, **__: Any) -> None:
            raise AssertionError("encoded again")

        monkeypatch.setattr(llm.runner.transformer, "encode", encode)
        assert llm.ingest(IDS.chunks) == ids


@pytest.mark.parametrize("as_list", [False, True])
def test_an_end_of_text_token_ends_the_output(twins: tuple[Any, Any], as_list: bool) -> None:
    """Some models name several."""
    loaded = twins[0]
    with LLM(loaded, plan_with("full_recompute")) as llm:
        free = llm.generate([IDS], ignore_eos=True)[0].token_ids
        stop = free[2]
        config = loaded.hf.generation_config
        usual = config.eos_token_id
        config.eos_token_id = [1, stop] if as_list else stop
        try:
            (ended,) = llm.generate([IDS])
            (full,) = llm.generate([IDS], ignore_eos=True)
        finally:
            config.eos_token_id = usual
    assert ended.token_ids == free[: free.index(stop) + 1]
    assert full.token_ids == free


def test_many_prompts_come_back_in_order(loaded: LoadedModel) -> None:
    prompts = [Prompt([tokens(16, i), tokens(24, i)], tokens(4, i), 1 + i % 3) for i in range(8)]
    with LLM(loaded, plan_with("cachetune", 1.0, max_num_seqs=3)) as llm:
        together = llm.generate(prompts, ignore_eos=True)
        alone = [llm.generate([p], ignore_eos=True)[0] for p in prompts]
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    assert [len(a.token_ids) for a in together] == [1 + i % 3 for i in range(8)]


# Plans


def test_a_plan_from_a_file(loaded: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    tuned(loaded).write(path)
    for source in (path, str(path), tuned(loaded)):
        with LLM(loaded, source) as llm:
            assert llm.plan == plan_with("cachetune", 0.5)


def test_without_a_plan_the_defaults_hold(loaded: LoadedModel) -> None:
    with LLM(loaded) as llm:
        assert llm.plan == ReusePlan()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hardware_fingerprint": "0" * 16}, "this machine, got .* machine is 0000"),
        ({"model_fingerprint": "f" * 16}, "this model, got .* model is ffff"),
    ],
)
def test_a_plan_for_another_machine_or_model(
    loaded: LoadedModel, tmp_path: Path, change: dict[str, str], message: str
) -> None:
    plan = tuned(loaded, **change)
    path = tmp_path / "plan.json"
    plan.write(path)
    for source in (plan, path):
        with pytest.raises(PlanError, match=message):
            LLM(loaded, source)
        with LLM(loaded, source, allow_mismatch=True) as llm:
            assert len(llm.generate([IDS])) == 1


def test_a_plan_for_another_number_of_threads(loaded: LoadedModel) -> None:
    """Threads are part of the machine: other times hold."""
    with pytest.raises(PlanError, match="this machine"):
        LLM(loaded, tuned(loaded, hardware_fingerprint=device_here(7).fingerprint()))


def test_a_plan_file_that_is_not_there(loaded: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="must be readable"):
        LLM(loaded, tmp_path / "none.json")


def test_a_ratio_per_tier_holds_where_the_chunk_lies(loaded: LoadedModel) -> None:
    rules = (RatioRule(tier="file", ratios=(0.5,)), RatioRule(ratios=(0.1,)))
    for tier, recomputed in (("dram", 3), ("file", 16)):
        with LLM(loaded, ReusePlan(rules=rules), tier=tier) as llm:
            llm.ingest(IDS.chunks)
            assert llm.generate([IDS])[0].n_reused_tokens == 40 + 33 - recomputed


def test_objects_on_one_model_leave_nothing_on_it(loaded: LoadedModel) -> None:
    """Hooks of closed objects would slow every request and never be freed."""
    for _ in range(2):
        with LLM(loaded) as llm:
            llm.ingest(IDS.chunks)
            llm.generate([IDS])
    assert not [m for m in loaded.hf.modules() if m._forward_hooks]


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        (["a text"], "list of prompts, got str"),
        ("a text", "list of prompts, got str"),
        (IDS, "list of prompts, got one prompt"),
        ([Prompt([[1.5, 2]], [3])], "token ids, got 'float'"),
        ([Prompt("a text", [3])], "list of texts or of token ids, got str"),
        ([Prompt(None, [3])], "list of texts or of token ids, got NoneType"),  # type: ignore[arg-type]
        ([Prompt([b"abc"], [3])], "token ids, got 'bytes'"),
        ([Prompt([], [3], max_tokens=2.5)], "whole number, at least 1, got 2.5"),  # type: ignore[arg-type]
        ([Prompt([], [3], tenant=None)], "named by a text, got None"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_prompt_is_refused(loaded: LoadedModel, prompts: Any, says: str) -> None:
    with LLM(loaded) as llm, pytest.raises(WorkloadError, match=says):
        llm.generate(prompts)


def test_prompts_may_be_what_can_be_read_once(loaded: LoadedModel) -> None:
    with LLM(loaded) as llm:
        once: Any = (Prompt([], tokens(n), max_tokens=1) for n in (3, 4))
        assert [c.n_prompt_tokens for c in llm.generate(once)] == [3, 4]


def test_one_text_is_not_taken_for_many_chunks(loaded: LoadedModel) -> None:
    with LLM(loaded, tokenizer=Letters()) as llm:
        with pytest.raises(WorkloadError, match="pass \\[chunk"):
            llm.ingest("a passage")
        assert len(llm.runner.store.index("low_pass")) == 0


def test_a_chunk_that_no_prompt_could_hold_is_refused(loaded: LoadedModel) -> None:
    with LLM(loaded) as llm:
        with pytest.raises(WorkloadError, match="at most 1022, got 1023 tokens"):
            llm.ingest([tokens(1023)])
        llm.ingest([tokens(1022)])
        found = llm.generate([Prompt([tokens(1022)], tokens(1), max_tokens=1)])
        assert found[0].n_reused_tokens == 1022


def test_a_chunk_larger_than_its_tier_keeps_no_other_out(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is it encoded for nothing at every answer."""
    large, *others = tokens(600), tokens(40), tokens(33)
    prompt = Prompt([large, *others], tokens(2), max_tokens=1)
    with LLM(loaded, tiers=[TierConfig("dram", "dram", capacity_bytes=200_000)]) as llm:
        llm.generate([prompt])
        again = llm.generate([prompt])[0]
        assert again.n_reused_tokens > 0
        assert len(llm.runner.store.index("low_pass")) == 2
        monkeypatch.setattr(llm.runner.ingestor.transformer, "encode", None)
        llm.generate([prompt])
        with pytest.raises(CapacityError, match="fit into its tier"):
            llm.ingest([large])


@pytest.mark.parametrize(
    ("model", "knobs", "says"),
    [
        (5, {}, "a causal LM of Hugging Face, got int"),
        (nn.Linear(2, 2), {}, "a causal LM of Hugging Face, got Linear"),
        (None, {"plan": {"policy": "epic"}}, "path of one, got dict"),
        (None, {"compute_threads": 0}, "compute_threads=0"),
        (None, {"ingest": "befor"}, "ingest='befor'"),
    ],
)
def test_what_it_cannot_be_made_of_is_refused(
    loaded: LoadedModel, model: Any, knobs: dict[str, Any], says: str
) -> None:
    with pytest.raises(CacheTuneError, match=says):
        LLM(loaded if model is None else model, **knobs)


def test_a_closed_one_says_so(loaded: LoadedModel) -> None:
    llm = LLM(loaded)
    llm.close()
    llm.close()
    for call in (lambda: llm.generate([IDS]), lambda: llm.ingest([tokens(40)])):
        with pytest.raises(StoreError, match="closed"):
            call()


def test_an_unknown_tier_is_refused_at_once(loaded: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="one of dram, file, got 'nvme'"):
        LLM(loaded, tier="nvme", store_dir=tmp_path / "store")
    assert not (tmp_path / "store").exists()
