"""Hugging Face by itself on the same weights: the baseline that is not ours."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..core.workload import Workload
    from ..runtime.loaded_model import LoadedModel


def peers_of(device: str) -> tuple[str, ...]:
    """Ways to run it; cuDNN's attention is the fastest on Hopper, and PyTorch may pick another."""
    return ("hf generate", "hf generate, cuDNN") if device == "cuda" else ("hf generate",)


def generate_ms(loaded: LoadedModel, workload: Workload, name: str, n_tokens: int = 1) -> float:
    """`generate` for the first request's whole prompt, greedy, SDPA attention, milliseconds.

    The prompt's ids are on the device before the clock starts, the token is on the host when it
    stops.
    """
    import torch

    from ..runtime.attention import ATTENTION_NAME

    request, contents = workload.requests[0], workload.contents
    ids = [t for c in request.chunks for t in contents[c].token_ids or ()]
    model: Any = loaded.hf
    device = next(model.parameters()).device
    prompt = torch.tensor([[*ids, *(request.suffix_ids or ())]], device=device)
    model.set_attn_implementation("sdpa")
    try:
        with torch.inference_mode(), _backend(name):
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter_ns()
            made = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=n_tokens,
                min_new_tokens=n_tokens,
                do_sample=False,
                pad_token_id=0,
            )
            int(made[0, -1])
            return (time.perf_counter_ns() - started) / 1e6
    finally:
        model.set_attn_implementation(ATTENTION_NAME)


def _backend(name: str) -> Any:
    from contextlib import nullcontext

    if not name.endswith("cuDNN"):
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    # cuDNN first, the others where it refuses.
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)
