"""CacheBlend's score: how far each token's keys moved when they were computed in the new context.

Layout: both inputs ``[n, HK, D]``, read as rows of ``HK * D``. A program owns a few rows and walks
their channels, so each byte is read once and one fp32 per token is written. Choosing the tokens is
`reference.top_indices`, which is device-independent and settles ties by the lower index.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=("n_tokens",))
def deviation_kernel(
    new_ptr, old_ptr, out_ptr, n_tokens,
    WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Program = BLOCK_T tokens; WIDTH = HK * D channels in steps of BLOCK_W."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = token < n_tokens
    total = tl.zeros([BLOCK_T, BLOCK_W], tl.float32)
    for start in range(0, WIDTH, BLOCK_W):
        channel = start + tl.arange(0, BLOCK_W)
        at = token[:, None] * WIDTH + channel[None, :]
        mask = live[:, None] & (channel < WIDTH)[None, :]
        new = tl.load(new_ptr + at, mask=mask, other=0.0).to(tl.float32)
        old = tl.load(old_ptr + at, mask=mask, other=0.0).to(tl.float32)
        gap = new - old
        total += gap * gap
    tl.store(out_ptr + token, tl.sum(total, 1), mask=live)


def deviation(k_new: Tensor, k_old: Tensor) -> Tensor:
    """`reference.deviation` on the GPU: fp32 ``[n]`` from two ``[n, HK, D]``.

    Raises:
        ValueError: the shapes differ.
    """
    if k_new.shape != k_old.shape:
        raise ValueError(
            f"k_new {tuple(k_new.shape)} and k_old {tuple(k_old.shape)} must have one shape: "
            "pass the same tokens of the same layer"
        )
    n, width = k_new.shape[0], k_new.shape[1] * k_new.shape[2]
    out = torch.empty(n, dtype=torch.float32, device=k_new.device)
    if n:
        deviation_kernel[(triton.cdiv(n, 4),)](
            k_new.contiguous(), k_old.contiguous(), out, n,
            WIDTH=width, BLOCK_T=4, BLOCK_W=min(1024, triton.next_power_of_2(width)), num_warps=4,
        )  # fmt: skip
    return out
