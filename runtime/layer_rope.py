"""`LayerRope`: cosines and sines of every layer, where layers may turn by different bases.

The library writes them as `rope_parameters` by layer type. Its Llama, Mistral and Qwen layers take
their angles from outside, but its models of these families know one base; so the model is built
with the parameters of its first layer, and each set of parameters gets a rotary module of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..core.errors import ModelError
from ..core.model_spec import rope_by_layer

Angles = tuple[Tensor, Tensor]
"""Cosine and sine, `[1, n, R]` each."""


class LayerRope(nn.Module):
    """The rotary modules of a model and the one of each layer, by number."""

    def __init__(self, rotaries: Sequence[nn.Module], of_layer: Sequence[int]) -> None:
        super().__init__()
        self.rotaries = nn.ModuleList(rotaries)
        self.of_layer = tuple(of_layer)

    @staticmethod
    def of(model: Any) -> LayerRope:
        """Of a library's model: its own rotary module, or those that `install` gave it."""
        found = model.model.rotary_emb
        return found if isinstance(found, LayerRope) else LayerRope([found], [0] * _depth(model))

    def angles(self, like: Tensor, positions: Tensor) -> list[Angles]:
        """By rotary module, for `[1, n]` positions, in the dtype and on the device of `like`."""
        return [rotary(like, positions) for rotary in self.rotaries]

    def frequencies(self) -> list[Tensor]:
        """By rotary module, fp32 `[R/2]` on the host: radians per position."""
        made: list[Any] = list(self.rotaries)
        return [rotary.inv_freq.float().cpu() for rotary in made]

    def forward(self, like: Tensor, positions: Tensor) -> Angles:
        """Whoever asks for one pair of tables for all layers.

        Raises:
            ModelError: there is none.
        """
        raise ModelError(
            "this model's layers differ in their RoPE, and the library's forward has one for all",
            values=f"{len(self.rotaries)} sets of frequencies",
            remedy="run it through LLM or Runner, which drive the layers one by one",
        )


def buildable(config: Any) -> Any:
    """The configuration as the library can build it: with its first layer's RoPE for all."""
    parameters = rope_by_layer(config.to_dict())
    return _with(config, parameters[0]) if parameters else config


def install(model: Any, config: Any) -> None:
    """Give a model that was built from `buildable(config)` the RoPE of every layer."""
    parameters = rope_by_layer(config.to_dict())
    if not parameters:
        return
    sets: list[Mapping[str, Any]] = []
    for of_layer in parameters:
        if of_layer not in sets:
            sets.append(of_layer)
    made = type(model.model.rotary_emb)
    rotaries = [made(config=_with(config, each)) for each in sets]
    device = next(model.parameters()).device
    model.config.rope_parameters = copy.deepcopy(config.rope_parameters)
    model.config.layer_types = list(config.layer_types)
    model.model.rotary_emb = LayerRope(rotaries, [sets.index(p) for p in parameters]).to(device)


def _with(config: Any, parameters: Mapping[str, Any]) -> Any:
    made = copy.deepcopy(config)
    made.rope_parameters = dict(parameters)
    made.standardize_rope_params()
    return made


def _depth(model: Any) -> int:
    return int(model.config.num_hidden_layers)
