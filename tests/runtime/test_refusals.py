"""What is not supported, or says nothing, is refused by name, and the store is let go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cachetune.core.errors import CapacityError, ModelError, WorkloadError
from cachetune.runtime.llm import LLM, Prompt
from cachetune.runtime.loaded_model import load_model, random_model
from cachetune.runtime.rope_gate import check_rope
from cachetune.runtime.runner import Runner
from cachetune.runtime.transformer import Transformer

from . import model_cases as cases
from .model_cases import TIERS, plan_with, prompt_workload, tokens

PLAN = plan_with("cachetune", 0.3)


@pytest.fixture(scope="module")
def loaded() -> Any:
    torch.set_num_threads(1)
    return cases.make_twins("llama")[0]


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
        ([Prompt([[1]], [1], max_tokens=0)], "max_tokens must be a whole number, at least 1"),
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

    def wrong(self: Transformer, n: int, layer: int = 0) -> Any:
        return MUTATIONS[mutation](*right(self, n, layer))

    monkeypatch.setattr(Transformer, "rope_table", wrong)
    with pytest.raises(ModelError, match="rotated at a new place"):
        LLM(loaded, store_dir=tmp_path)
    monkeypatch.undo()
    LLM(loaded, store_dir=tmp_path).close()  # the store was let go
