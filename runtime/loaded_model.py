"""`LoadedModel`: a Hugging Face decoder, its spec and its fingerprint.

The library's layers, weights and RoPE are used as they are. Pre-RoPE K is caught by a hook on
`k_norm` where the family has one, else on `k_proj`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn

from ..core.errors import ModelError
from ..core.model_spec import DTYPE_BYTES, ModelSpec, Stored, spec_from_hf_config
from ..core.record import parse_json
from .layer_rope import LayerRope, buildable, install
from .shapes import CONFIGS, config_of

SHAPES: dict[str, dict[str, int]] = {
    "llama-tiny": dict(n=4, hidden=128, heads=4, kv=2, ffn=256, vocab=512),
    "llama-10m": dict(n=8, hidden=256, heads=8, kv=4, ffn=768, vocab=4096),
    "llama-25m": dict(n=10, hidden=384, heads=6, kv=2, ffn=1152, vocab=4096),
    "llama-110m": dict(n=12, hidden=768, heads=12, kv=4, ffn=3072, vocab=8192),
}
"""Shapes with random weights: TTFT does not depend on weights. The last has 110 million of them."""

STAGING_BYTES = 64 << 20
"""Weights of a GPU are read in pieces of that size."""


@dataclass(frozen=True)
class LoadedModel:
    """A decoder that is ready to be driven layer by layer."""

    hf: Any
    spec: ModelSpec
    fingerprint: str

    def stored_as(self, stored: Stored) -> LoadedModel:
        """See `ModelSpec.stored_as`."""
        return replace(self, spec=self.spec.stored_as(stored))

    @property
    def rope(self) -> LayerRope:
        """Its cosines and sines, layer by layer."""
        return LayerRope.of(self.hf)

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers, first to last."""
        return list(self.hf.model.layers)


def load_model(
    source: str | Path | nn.Module, dtype: str = "float32", seed: int = 0
) -> LoadedModel:
    """A model from a Hugging Face folder, a shape's name (random weights) or a module.

    Args:
        source: folder with `config.json`, a key of `SHAPES` or `CONFIGS`, or a causal-LM module.
        dtype: float32, bfloat16 or float16; ignored for a module.
        seed: of the random weights.

    Raises:
        ModelError: unknown source, family or RoPE kind.
    """
    if isinstance(source, nn.Module) and hasattr(source, "config"):
        return _wrap(source, type(source).__name__)
    if not isinstance(source, str | Path):
        raise ModelError(
            "the model must be a folder, a shape's name or a causal LM of Hugging Face",
            values=type(source).__name__,
            remedy="load it with AutoModelForCausalLM, or name its folder",
        )
    if dtype not in DTYPE_BYTES:
        raise ModelError(
            f"the dtype must be one of {', '.join(DTYPE_BYTES)}",
            values=repr(dtype),
            remedy="name one of them",
        )
    if str(source) in SHAPES:
        return _wrap(_random_llama(str(source), dtype, seed), str(source))
    if str(source) in CONFIGS:
        return _wrap(_random(config_of(str(source)), dtype, seed), str(source))
    folder = Path(source)
    if not (folder / "config.json").is_file():
        raise ModelError(
            "the model must be a folder with config.json or a known shape",
            values=repr(str(source)),
            remedy=f"known shapes: {', '.join([*SHAPES, *CONFIGS])}",
        )
    spec_from_hf_config(_read_config(folder / "config.json"))
    return _wrap(_read_weights(folder, dtype), folder.name)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:  # not UTF-8 is a ValueError too
        problem = str(e)
    else:
        if isinstance(config, dict):
            return config
        problem = type(config).__name__
    raise ModelError(
        "the model's config.json must hold one JSON object",
        values=f"{path}: {problem}",
        remedy="download the model again",
    )


def _read_weights(folder: Path, dtype: str) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder)
        library: Any = AutoModelForCausalLM
        model, info = library.from_pretrained(
            folder,
            config=buildable(config),
            dtype=getattr(torch, dtype),
            output_loading_info=True,
        )
        install(model, config)
    except (OSError, ValueError, RuntimeError, AttributeError, SafetensorError) as e:
        raise ModelError(
            "the model's weights must be readable and fit its config.json",
            values=f"{folder}: {str(e).strip().splitlines()[0][:160]}",
            remedy="download the model again",
        ) from e
    finally:
        if bars:
            logging.enable_progress_bar()
    if missing := sorted(info["missing_keys"]):  # the library would make them up
        raise ModelError(
            "the model's weights must all be there",
            values=f"{folder} without {missing[0]} (and {len(missing) - 1} more)",
            remedy="download the model again",
        )
    return model


def random_model(config: Any, dtype: str = "float32", seed: int = 0) -> LoadedModel:
    """A model of any supported Hugging Face configuration with random weights."""
    return _wrap(_random(config, dtype, seed), f"random-{config.model_type}")


def _random(config: Any, dtype: str, seed: int) -> Any:
    """As the library makes it. Whoever takes it on reads all weights once, for the fingerprint."""
    spec_from_hf_config(config.to_dict())
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        library: Any = AutoModelForCausalLM
        model = library.from_config(buildable(config), dtype=getattr(torch, dtype))
    install(model, config)
    return model


def _random_llama(name: str, dtype: str, seed: int) -> Any:
    from transformers import LlamaConfig

    shape = SHAPES[name]
    config = LlamaConfig(
        hidden_size=shape["hidden"],
        intermediate_size=shape["ffn"],
        num_hidden_layers=shape["n"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv"],
        vocab_size=shape["vocab"],
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    )
    return _random(config, dtype, seed)


def _wrap(model: Any, name: str) -> LoadedModel:
    from .attention import ATTENTION_NAME, register_attention

    config = model.config.to_dict()
    parameter = next(model.parameters())
    config["dtype"] = str(parameter.dtype).removeprefix("torch.")
    spec = spec_from_hf_config(config, name)
    register_attention()
    fingerprint = _fingerprint(model, spec)
    model.set_attn_implementation(ATTENTION_NAME)
    model.eval()
    model.requires_grad_(False)
    return LoadedModel(model, spec, fingerprint)


def _fingerprint(model: nn.Module, spec: ModelSpec) -> str:
    """Hash of the RoPE frequencies, the spec without its name, and every weight."""
    digest = xxhash.xxh3_128()
    digest.update(spec.replace(name="").fingerprint().encode())
    rope = LayerRope.of(model)
    for frequencies in rope.frequencies():
        digest.update(frequencies.numpy().tobytes())
    if len(rope.rotaries) > 1:
        digest.update(bytes(rope.of_layer))
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        for part in _bytes_of(parameter.detach()):
            digest.update(part)
    return digest.hexdigest()[:16]


def _bytes_of(x: torch.Tensor) -> Iterator[memoryview]:
    """All bytes; those of a GPU through one piece of pinned memory, as pageable memory is slow.

    A part holds until the next one is asked for.
    """
    flat = x.contiguous().view(-1).view(torch.uint8)
    if not flat.is_cuda:
        yield flat.cpu().numpy().data
        return
    # Named, because a model is made with its GPU as the default device.
    staging = torch.empty(
        min(STAGING_BYTES, flat.numel()), dtype=torch.uint8, device="cpu", pin_memory=True
    )
    for piece in flat.split(STAGING_BYTES):
        here = staging[: piece.numel()]
        here.copy_(piece)
        yield here.numpy().data
