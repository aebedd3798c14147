"""The gate every model passes before it is served: stored K, rotated anew, equals fresh K."""

from __future__ import annotations

import torch

from ..core.errors import ModelError
from ..core.rng import rng
from .kv_buffer import KvBuffer
from .stages import Stages
from .transformer import Transformer

N_PROBE_TOKENS = 24
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3}
"""Largest relative L2 error; half precision allows a rounding of the model's own rotation."""


@torch.inference_mode()
def check_rope(transformer: Transformer | Stages) -> float:
    """Largest relative error over layers of re-rotated K of a probe chunk; 0 is perfect.

    The probe is computed in place at an offset, so every layer's fresh K is the model's own;
    the same K, caught before RoPE, is rotated by our restore with that layer's table.

    Raises:
        ModelError: the error exceeds the dtype's tolerance: this model's RoPE is not understood.
    """
    spec = transformer.spec
    offset = min(200, spec.max_position - N_PROBE_TOKENS)
    draw = rng(0, "rope_gate").integers(0, spec.vocab_size, N_PROBE_TOKENS)
    ids = torch.from_numpy(draw)
    positions = torch.arange(offset, offset + N_PROBE_TOKENS)
    fresh, raw = transformer.encode_at(ids, positions)
    device = transformer.device
    again = KvBuffer(spec, fresh.n_slots, [(spec.n_layers, device)])
    here = device.upload(positions)
    worst = 0.0
    for layer in range(spec.n_layers):
        cos, sin = transformer.rope_table(offset + N_PROBE_TOKENS, layer)
        device.restore(
            device.upload(raw.host_k[layer]), device.upload(raw.host_v[layer]), here,
            again.k[layer], again.v[layer], cos, sin,
        )  # fmt: skip
        of_layer = transformer.device_of(layer)
        true = of_layer.to_host(fresh.k[layer][:, offset:], "rope gate").float()
        found = device.to_host(again.k[layer][:, offset:], "rope gate").float()
        worst = max(worst, float((found - true).norm() / (true.norm() + 1e-12)))
    if worst > TOLERANCE[spec.dtype]:
        raise ModelError(
            "stored keys, rotated at a new place, must equal the model's own",
            values=f"relative error {worst:.1e}, at most {TOLERANCE[spec.dtype]:.0e} is allowed",
            remedy="this model's RoPE is not supported; serve it with policy full_recompute",
        )
    return worst
