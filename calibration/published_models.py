"""Shapes of the models that published results used, and their kernels' cost on a GPU."""

from __future__ import annotations

from functools import cache

from ..core.model_spec import ModelSpec
from ..simulator.kernel_cost import KernelCost
from ..simulator.model_cost import ModelCost

_SHAPES = {
    "LongAlpaca-7B": ("llama", 32, 4096, 11008, 32, 32, 128, 32001),
    "LongAlpaca-13B": ("llama", 40, 5120, 13824, 40, 40, 128, 32001),
    "Llama-7B": ("llama", 32, 4096, 11008, 32, 32, 128, 32000),
    "Llama-70B": ("llama", 80, 8192, 28672, 64, 8, 128, 32000),
    "Llama-3.1-8B": ("llama", 32, 4096, 14336, 32, 8, 128, 128256),
    "Llama-3.1-70B-FP8": ("llama", 80, 8192, 28672, 64, 8, 128, 128256),
    "Llama-3.2-3B": ("llama", 28, 3072, 8192, 24, 8, 128, 128256),
    "Mistral-7B": ("mistral", 32, 4096, 14336, 32, 8, 128, 32768),
    "Qwen3-8B": ("qwen3", 36, 4096, 12288, 32, 8, 128, 151936),
    "Qwen3-32B": ("qwen3", 64, 5120, 25600, 64, 8, 128, 151936),
}
"""Family, layers, hidden, intermediate, heads, KV heads, head size, vocabulary: config.json."""


@cache
def model_of(name: str) -> ModelSpec:
    """The shape of a model by name."""
    family, layers, hidden, inter, heads, kv_heads, head_dim, vocab = _SHAPES[name]
    return ModelSpec.model_validate(
        {"name": name, "family": family, "n_layers": layers, "hidden_size": hidden,
         "intermediate_size": inter, "n_heads": heads, "n_kv_heads": kv_heads,
         "head_dim": head_dim, "vocab_size": vocab, "max_position": 131072}
    )  # fmt: skip


@cache
def cost_of(model: str, gpu: str, tp: int = 1) -> ModelCost:
    """Kernel times of a model on `tp` GPUs."""
    return ModelCost(model_of(model), KernelCost.load(gpu), tp)
