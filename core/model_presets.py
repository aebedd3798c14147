"""Shapes of well-known models by name, from each model's published `config.json`.

TTFT and memory depend on the shapes alone; no weights come with them.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from .catalogue import key_of, nearest
from .errors import ModelError
from .model_spec import ModelSpec, spec_from_hf_config
from .record import parse_json


class _Shape(NamedTuple):
    """Columns of `_SHAPES`."""

    family: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    positions: int
    rope: str = "default"


_SHAPES = {
    "Llama-2-7B": _Shape("llama", 32, 4096, 11008, 32, 32, 32000, 4096),
    "Llama-3-8B": _Shape("llama", 32, 4096, 14336, 32, 8, 128256, 8192),
    "Llama-3.1-8B": _Shape("llama", 32, 4096, 14336, 32, 8, 128256, 131072, "llama3"),
    "Llama-3.1-70B": _Shape("llama", 80, 8192, 28672, 64, 8, 128256, 131072, "llama3"),
    "Llama-3.2-3B": _Shape("llama", 28, 3072, 8192, 24, 8, 128256, 131072, "llama3"),
    "Mistral-7B": _Shape("mistral", 32, 4096, 14336, 32, 8, 32768, 32768),
    "Qwen2.5-7B": _Shape("qwen2", 28, 3584, 18944, 28, 4, 152064, 131072),
    "Qwen2.5-14B": _Shape("qwen2", 48, 5120, 13824, 40, 8, 152064, 131072),
    "Qwen2.5-32B": _Shape("qwen2", 64, 5120, 27648, 40, 8, 152064, 131072),
    "Qwen2.5-72B": _Shape("qwen2", 80, 8192, 29568, 64, 8, 152064, 131072),
    "Qwen3-8B": _Shape("qwen3", 36, 4096, 12288, 32, 8, 151936, 40960),
    "Qwen3-14B": _Shape("qwen3", 40, 5120, 17408, 40, 8, 151936, 40960),
    "Qwen3-32B": _Shape("qwen3", 64, 5120, 25600, 64, 8, 151936, 40960),
}
"""All in bfloat16 with heads of 128."""

PRESETS = tuple(_SHAPES)


def model_preset(name: str) -> ModelSpec:
    """The model called `name`; case, spaces and dashes do not matter.

    Raises:
        ModelError: no such model; names the nearest.
    """
    known = {key_of(n): n for n in _SHAPES}.get(key_of(name))
    if known is None:
        near = nearest(name, _SHAPES)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(PRESETS)};"
        raise ModelError(
            "the model must be a known one or a config.json",
            values=repr(name),
            remedy=f"{hint} a path to config.json works too",
        )
    s = _SHAPES[known]
    return ModelSpec(
        name=known,
        family=s.family,  # type: ignore[arg-type]
        n_layers=s.layers,
        hidden_size=s.hidden,
        intermediate_size=s.intermediate,
        n_heads=s.heads,
        n_kv_heads=s.kv_heads,
        head_dim=128,
        vocab_size=s.vocab,
        max_position=s.positions,
        rope_kind=s.rope,  # type: ignore[arg-type]
    )


def model_of(name_or_path: str) -> ModelSpec:
    """A preset, or the shapes in a Hugging Face `config.json` (or the folder that holds it).

    Raises:
        ModelError: neither; or the file is not one, or of a family that is not supported.
    """
    path = Path(name_or_path)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        return model_preset(name_or_path)
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ModelError("the model file must be JSON", values=f"{path}: {e}") from None
    return spec_from_hf_config(config, config.get("_name_or_path") or path.parent.name)
