"""Layers that turn by bases of their own: against the library's layers with tables of float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from cachetune.core.errors import ModelError
from cachetune.core.model_spec import spec_from_hf_config
from cachetune.runtime.layer_rope import LayerRope, buildable
from cachetune.runtime.loaded_model import LoadedModel, load_model, random_model
from cachetune.runtime.rope_gate import check_rope
from cachetune.runtime.runner import Runner
from cachetune.runtime.transformer import Transformer

from . import model_cases as cases
from .model_cases import Bench, plan_with, tokens

BASES = (10_000.0, 500.0, 10_000.0, 500.0)
TYPES = ["full_attention", "sliding_attention"] * 2
ROPE: dict[str, dict[str, Any]] = {
    "full_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
}


def config_of(family: str) -> Any:
    made = type(cases.make_config(family))
    shape = cases._SHAPE | ({"head_dim": 16} if family == "qwen3" else {})
    try:
        return made(**shape, layer_types=list(TYPES), rope_parameters=copy.deepcopy(ROPE))
    except AttributeError:  # it takes the base that it adds itself for a layer type's parameters
        pytest.skip(f"transformers {transformers.__version__} has no RoPE by layer for {family}")


def twins(family: str) -> tuple[LoadedModel, Any]:
    """Ours, and the library's model with each layer's tables handed to it from outside."""
    from transformers import AutoModelForCausalLM

    loaded = random_model(config_of(family))
    with torch.no_grad():
        for part in loaded.hf.modules():
            if isinstance(part, torch.nn.Linear):
                part.weight.mul_(cases.WEIGHT_SCALE)
    twin = AutoModelForCausalLM.from_config(buildable(config_of(family)), dtype=torch.float32)
    twin.load_state_dict(loaded.hf.state_dict())
    # Its masks and cache: no layer has a window.
    twin.config.layer_types, twin.model.has_sliding_layers = ["full_attention"] * 4, False
    twin.eval().set_attn_implementation("sdpa")
    for layer, base in zip(twin.model.layers, BASES, strict=True):
        layer.register_forward_pre_hook(angles_of(base), with_kwargs=True)
    return load_model(loaded.hf), twin


def angles_of(base: float) -> Callable[..., Any]:
    def hook(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        at = torch.arange(args[0].shape[1], dtype=torch.float64)
        angle = at[:, None] * base ** -(torch.arange(8, dtype=torch.float64) / 8)
        both = torch.cat([angle, angle], -1)[None]
        return args, {**kwargs, "position_embeddings": (both.cos().float(), both.sin().float())}

    return hook


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_every_layer_turns_by_its_own_base(family: str, tmp_path: Path) -> None:
    loaded, twin = twins(family)
    assert loaded.spec.rope_bases == BASES
    assert check_rope(Transformer(loaded)) < 1e-6
    parts = (tokens(70), tokens(9))
    with Runner(loaded, tmp_path, cases.TIERS) as runner:
        bench = Bench(runner, twin)
        want = bench.reference_logits(parts)
        for plan in (plan_with("full_recompute"), plan_with("full_reuse")):  # the first is exact
            (found,) = bench.run(parts, plan).suffix_logits.values()
            torch.testing.assert_close(found, want, atol=2e-4, rtol=2e-4)


def test_the_gate_tells_another_layers_base(monkeypatch: pytest.MonkeyPatch) -> None:
    transformer = Transformer(twins("qwen3")[0])
    right = Transformer.rope_table
    monkeypatch.setattr(Transformer, "rope_table", lambda self, n, layer=0: right(self, n, 0))
    with pytest.raises(ModelError, match="rotated at a new place"):
        check_rope(transformer)


def test_a_folder_keeps_the_bases(tmp_path: Path) -> None:
    loaded = random_model(config_of("qwen3"))
    loaded.hf.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert again.fingerprint == loaded.fingerprint and again.spec.rope_bases == BASES
    assert again.rope.of_layer == (0, 1, 0, 1)
    with pytest.raises(ModelError, match="one for all"):
        again.hf.model.rotary_emb(torch.zeros(1), torch.arange(2)[None])
    swapped = copy.deepcopy(loaded.hf)
    swapped.model.rotary_emb = LayerRope(list(loaded.rope.rotaries), (1, 0, 1, 0))
    assert load_model(swapped).fingerprint != loaded.fingerprint


def test_one_base_is_as_before() -> None:
    """No list, and the fingerprint that stores were written with."""
    spec = cases.make_twins("llama")[0].spec
    assert spec.rope_bases == ()
    assert spec.replace(name="", rope_bases=(1e4,) * 4).fingerprint() != spec.fingerprint()
    data = spec.model_dump(mode="json")
    assert type(spec).model_validate({k: v for k, v in data.items() if k != "rope_bases"}) == spec


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"full_attention": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"sliding_attention": {"rope_theta": 1e4, "mrope_section": [2, 3, 3]}}, "mrope"),
        ({"sliding_attention": None}, "none of sliding_attention"),
    ],
)
def test_what_a_layer_may_not_have(changes: dict[str, Any], message: str) -> None:
    config = config_of("qwen3").to_dict()
    config["rope_parameters"] = {**ROPE, **changes}
    with pytest.raises(ModelError, match=message):
        spec_from_hf_config(config)
    config["rope_parameters"], config["layer_types"] = ROPE, None
    with pytest.raises(ModelError, match="type of every layer"):
        spec_from_hf_config(config)
