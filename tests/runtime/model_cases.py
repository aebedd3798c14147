"""Tiny random models of every family, each with an untouched twin, and prompts for them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cachetune.core.chunk_index import content_id_of
from cachetune.core.plan import RatioRule, ReusePlan
from cachetune.core.workload import Content, Request, Workload
from cachetune.runtime.loaded_model import LoadedModel, load_model
from cachetune.runtime.runner import Runner, RunResult
from cachetune.runtime.tiers import TierConfig

TIERS = (TierConfig("dram", "dram"), TierConfig("file", "file"))
VOCAB = 256
WEIGHT_SCALE = 4.0
"""The library's initial weights give almost flat attention, where any mistake looks exact."""

_SHAPE: dict[str, Any] = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCAB,
    max_position_embeddings=1024,
)
_ROPE: dict[str, dict[str, Any]] = {
    "llama-llama3": dict(
        rope_type="llama3",
        factor=4.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    ),
    "llama-linear": dict(rope_type="linear", factor=2.0),
    "llama-yarn": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64),
}
FAMILIES = (
    "llama",
    *_ROPE,
    "qwen2",
    "qwen3",
    "mistral",
    "mistral-window",
)


def make_config(name: str) -> Any:
    """The Hugging Face configuration of a tiny model."""
    import transformers as hf

    if name in _ROPE:
        return hf.LlamaConfig(**_SHAPE, rope_parameters={"rope_theta": 1e4, **_ROPE[name]})
    if name.startswith("mistral"):
        window = 24 if name == "mistral-window" else None
        return hf.MistralConfig(**_SHAPE, sliding_window=window)
    family = {"llama": hf.LlamaConfig, "qwen2": hf.Qwen2Config, "qwen3": hf.Qwen3Config}[name]
    return family(**_SHAPE, **({"head_dim": 16} if name == "qwen3" else {}))


def make_twins(name: str, seed: int = 0) -> tuple[LoadedModel, Any]:
    """A model that is ready to be driven, and an unmodified copy of it (SDPA)."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(make_config(name), dtype=torch.float32)
        with torch.no_grad():
            for part in model.modules():
                if isinstance(part, torch.nn.Linear):
                    part.weight.mul_(WEIGHT_SCALE)
                    if part.bias is not None:  # Qwen2's, which start at 0
                        part.bias.normal_(std=0.5)
                elif type(part).__name__.endswith("RMSNorm"):
                    part.weight.uniform_(0.5, 1.5)
    twin = copy.deepcopy(model).eval()
    twin.set_attn_implementation("sdpa")
    return load_model(model), twin


def tokens(n: int, number: int = 0) -> tuple[int, ...]:
    """`n` random token ids; `number` tells texts of one length apart."""
    draw = np.random.default_rng([n, number]).integers(3, VOCAB, n)
    return tuple(int(t) for t in draw)


def prompt_workload(
    prompts: Sequence[Sequence[Sequence[int]]], n_output: int = 1, gap_ns: int = 0
) -> Workload:
    """One request per prompt; the last part of a prompt is its suffix."""
    contents = {}
    requests = []
    for number, parts in enumerate(prompts):
        chunks, suffix = [tuple(p) for p in parts[:-1]], tuple(parts[-1])
        names = [content_id_of(c) for c in chunks]
        for name, ids in zip(names, chunks, strict=True):
            contents[name] = Content(n_tokens=len(ids), token_ids=ids)
        requests.append(
            Request(
                request_id=number,
                arrival_ns=number * gap_ns,
                chunks=tuple(names),
                suffix_tokens=len(suffix),
                suffix_ids=suffix,
                max_output_tokens=n_output,
                output_tokens=n_output,
            )
        )
    return Workload(name="prompts", contents=contents, requests=tuple(requests))


def plan_with(policy: str, *ratios: float, **knobs: Any) -> ReusePlan:
    """A plan with these ratios, one per band, for every tier."""
    rules = (RatioRule(ratios=ratios or (0.0,)),)
    return ReusePlan.model_validate({"policy": policy, "rules": rules, **knobs})


@dataclass
class Bench:
    """One model under test, a store for it, and its twin."""

    runner: Runner
    twin: Any

    @staticmethod
    def make(name: str, folder: Path) -> Bench:
        loaded, twin = make_twins(name)
        return Bench(Runner(loaded, folder, TIERS), twin)

    def run(self, parts: Sequence[Sequence[int]], plan: ReusePlan, tier: str = "dram") -> RunResult:
        """The fixed DAG of one prompt; its chunks are prepared."""
        workload = prompt_workload([parts])
        self.runner.prepare(workload, plan, tier)
        return self.runner.execute(
            workload,
            workload.requests[0],
            plan,
            self.runner.index(plan, tier),
            keep_suffix_logits=True,
        )

    @torch.inference_mode()
    def reference_logits(self, parts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits of the suffix by the twin, fp32 `[n_suffix, vocab]`."""
        ids = torch.tensor([[t for part in parts for t in part]])
        logits: torch.Tensor = self.twin(ids).logits[0, -len(parts[-1]) :]
        return logits

    @torch.inference_mode()
    def reference_tokens(self, parts: Sequence[Sequence[int]], n: int) -> list[int]:
        """`n` greedy tokens by the twin's own `generate`."""
        ids = torch.tensor([[t for part in parts for t in part]])
        out = self.twin.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=n,
            min_new_tokens=n,
            eos_token_id=None,
            pad_token_id=0,
        )
        made: list[int] = out[0, ids.shape[1] :].tolist()
        return made
