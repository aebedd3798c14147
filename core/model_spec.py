"""`ModelSpec`: what the decider needs to know of a transformer, and nothing of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Literal, Self, get_args

from pydantic import Field, ValidationError, model_validator

from .errors import ModelError
from .record import Record, canonical_json, first_problem

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_KINDS = ("default", "linear", "llama3", "yarn")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

PACKED_BITS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}
"""Bits of a code, by the stored format that has codes."""
FP8_BYTES = 1

Dtype = Literal["float32", "bfloat16", "float16"]
Stored = Literal["native", "fp8", "int8", "int4", "int3", "int2"]
STORED_FORMATS: tuple[Stored, ...] = get_args(Stored)


class ModelSpec(Record):
    """Shapes of a decoder. All counts are per model, not per device.

    `kv_bytes_per_token` and the flop counts are what the cost model and the policies read.
    """

    name: str
    family: Literal["llama", "mistral", "qwen2", "qwen3"]
    n_layers: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    n_heads: int = Field(gt=0)
    n_kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    max_position: int = Field(gt=0)
    dtype: Dtype = "bfloat16"
    rope_kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    """Where layers differ, that of the first layer which is not `default`."""
    rope_bases: tuple[float, ...] = ()
    """RoPE's base layer by layer, where layers differ in their RoPE."""
    sliding_window: int | None = None
    stored: Stored = "native"
    """What the chunk store keeps of K and V: `dtype` as it is, FP8 (e4m3), or codes of so many
    bits."""

    @model_validator(mode="after")
    def _check(self) -> ModelSpec:
        if self.is_packed and self.head_dim % 16:
            raise ValueError(
                f"head_dim must be a multiple of 16 to be stored as {self.stored}, "
                f"got {self.head_dim}"
            )
        if len(self.rope_bases) not in (0, self.n_layers):
            raise ValueError(
                "rope_bases must name a base for every layer or none, got "
                f"{len(self.rope_bases)} for {self.n_layers} layers"
            )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                "n_heads must be a multiple of n_kv_heads, got "
                f"{self.n_heads} and {self.n_kv_heads}"
            )
        return self

    def fingerprint(self) -> str:
        """Of the model itself: however its KV is stored, it is the same."""
        data = self.model_dump(mode="json", exclude={"stored"})
        if not self.rope_bases:  # as it was before layers could differ: stores keep their keys
            del data["rope_bases"]
        return hashlib.sha256(canonical_json(data).encode()).hexdigest()[:16]

    def stored_as(self, stored: str) -> Self:
        """The same model, its chunks kept in another format; lossy but for `native`.

        Raises:
            ModelError: no such format, or heads that it cannot hold.
        """
        if stored not in STORED_FORMATS or (stored in PACKED_BITS and self.head_dim % 16):
            raise ModelError(
                f"chunks must be stored as one of {', '.join(STORED_FORMATS)}; of those with codes "
                "a head must have a multiple of 16 channels",
                values=f"{stored}, head dim {self.head_dim}",
                remedy="name one of them, or store them native",
            )
        return self.replace(stored=stored)

    @property
    def stored_dtype(self) -> str:
        """By name, what the chunk store keeps: `dtype`, or the other format."""
        return self.dtype if self.stored == "native" else self.stored

    @property
    def is_packed(self) -> bool:
        """Whether the chunk store keeps codes with scales, not values."""
        return self.stored in PACKED_BITS

    @property
    def stored_value_bytes(self) -> int:
        """Bytes of a value where the chunk store keeps values."""
        return FP8_BYTES if self.stored == "fp8" else DTYPE_BYTES[self.dtype]

    @property
    def kv_bytes_per_token_layer(self) -> int:
        """Bytes of K and V of one token in one layer, where attention reads them."""
        return 2 * self.n_kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V of one token in all layers."""
        return self.n_layers * self.kv_bytes_per_token_layer

    @property
    def layer_params(self) -> int:
        """Weights of one layer's matrices (norms left out)."""
        q_out = self.n_heads * self.head_dim
        kv_out = 2 * self.n_kv_heads * self.head_dim
        return self.hidden_size * (2 * q_out + kv_out + 3 * self.intermediate_size)

    @property
    def n_params(self) -> int:
        """Weights of all layers, the embedding and the head (counted apart)."""
        return self.n_layers * self.layer_params + 2 * self.vocab_size * self.hidden_size

    def linear_flops(self, n_tokens: int, n_layers: int) -> int:
        """Multiply-adds times two of the matrices for `n_tokens` rows through `n_layers`."""
        return 2 * self.layer_params * n_tokens * n_layers

    def attention_flops(self, n_pairs: int, n_layers: int) -> int:
        """Flops of QK^T and PV for `n_pairs` visible (query, key) pairs per layer."""
        return 4 * self.n_heads * self.head_dim * n_pairs * n_layers

    def prefill_flops(self, n_query: int, n_context: int) -> int:
        """Flops of prefilling `n_query` tokens behind `n_context` cached ones, head left out."""
        pairs = n_query * n_context + n_query * (n_query + 1) // 2
        return self.linear_flops(n_query, self.n_layers) + self.attention_flops(
            pairs, self.n_layers
        )


def spec_from_hf_config(config: Mapping[str, Any], name: str = "") -> ModelSpec:
    """A `ModelSpec` from the mapping of a Hugging Face `config.json`.

    Raises:
        ModelError: a family or RoPE kind that is not supported, by name, with the list; or a
            shape that is missing or contradictory.
    """
    try:
        return _spec_of(config, name)
    except KeyError as e:
        problem = f"no {e.args[0]}"
    except ValidationError as e:
        problem = ", got ".join(part for part in first_problem(e) if part)
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as e:
        problem = str(e)
    raise ModelError(
        "config.json must give the shapes of a decoder",
        values=problem,
        remedy="use the file that came with the model",
    )


def _spec_of(config: Mapping[str, Any], name: str) -> ModelSpec:
    family = str(config.get("model_type", ""))
    if family not in FAMILIES:
        raise ModelError(
            f"the model family must be one of {', '.join(FAMILIES)}",
            values=f"model_type={family!r}",
            remedy="use a model of a supported family",
        )
    by_layer = rope_by_layer(config)
    kinds = [_rope_kind(rope) for rope in by_layer or [_rope(config)]]
    kind = next((k for k in kinds if k != "default"), "default")
    n_heads = int(config["num_attention_heads"])
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return ModelSpec(
        name=name or str(config.get("_name_or_path") or family),
        family=family,  # type: ignore[arg-type]
        n_layers=int(config["num_hidden_layers"]),
        hidden_size=int(config["hidden_size"]),
        intermediate_size=int(config["intermediate_size"]),
        n_heads=n_heads,
        n_kv_heads=int(config.get("num_key_value_heads") or n_heads),
        head_dim=int(config.get("head_dim") or int(config["hidden_size"]) // n_heads),
        vocab_size=int(config["vocab_size"]),
        max_position=int(config.get("max_position_embeddings", 2048)),
        dtype=dtype.removeprefix("torch."),  # type: ignore[arg-type]
        rope_kind=kind,  # type: ignore[arg-type]
        rope_bases=tuple(float(rope["rope_theta"]) for rope in by_layer),
        sliding_window=int(window) if window else None,
    )


def rope_by_layer(config: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """The RoPE parameters of each layer, its base included, where `config.json` has them by layer
    type; empty where all layers share one set.

    Raises:
        ModelError: a layer whose type has none.
    """
    rope = _rope(config)
    if not any(isinstance(value, Mapping) for value in rope.values()):
        return ()
    types = list(config.get("layer_types") or ())
    missing = sorted({str(t) for t in types if not isinstance(rope.get(t), Mapping)})
    if len(types) != int(config["num_hidden_layers"]) or missing:
        raise ModelError(
            "RoPE parameters by layer type need the type of every layer, and parameters for each",
            values=f"{len(types)} layer_types, {config['num_hidden_layers']} layers, parameters of "
            f"{', '.join(map(str, rope))}" + (f", none of {', '.join(missing)}" if missing else ""),
            remedy="use a model all of whose layers turn K",
        )
    base = config.get("rope_theta", rope.get("rope_theta", 10000.0))
    return tuple({"rope_theta": base, **rope[t]} for t in types)


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return found


def _rope_kind(rope: Mapping[str, Any]) -> str:
    kind = str(rope.get("rope_type", rope.get("type", "default")))
    if kind not in ROPE_KINDS or "mrope_section" in rope:
        why = "it depends on the prompt length or on several axes, so cached K cannot be moved"
        raise ModelError(
            f"the RoPE kind must be one of {', '.join(ROPE_KINDS)}",
            values=f"rope_type={'mrope' if 'mrope_section' in rope else kind!r}",
            remedy=f"{why}; use another model",
        )
    return kind
