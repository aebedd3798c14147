"""Quantise and pack on store, one read of the values; bit for bit what ``packing.pack`` gives.

Layout: input ``[n, HK, D]``; codes, scales and zeros as in ``packing.py``. A program owns 32 tokens
of one head: one group of K per channel, 32 rows of V. Codes that share a byte are whole runs of
channels apart, so a byte tile is built from one load per lane without any shuffle. The scales of V
cross those runs; they are stored first and read back after a barrier, from the L1 cache.

Agreement with the CPU needs IEEE operations that cannot be fused: division is ``div_rn``, the clamp
stands between the product and the rounding, and rounding to even is the addition of 1.5 * 2**23.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .packing import GROUP, Packed, Per, check_format


@triton.jit
def _scale_zero(low, high, BITS: tl.constexpr):
    """fp16 scale and zero of groups with the range ``low .. high``."""
    step = (high - low) * (1.0 / ((1 << BITS) - 1))
    zero = tl.minimum(tl.maximum(low, -65504.0), 65504.0)
    scale = tl.minimum(tl.maximum(step, 5.960464477539063e-08), 65504.0)
    return scale.to(tl.float16), zero.to(tl.float16)


@triton.jit
def _encode(x, scale, zero, BITS: tl.constexpr):
    """int32 codes of fp32 ``x`` under fp16 ``scale`` and ``zero``."""
    inverse = tl.div_rn(tl.zeros_like(scale.to(tl.float32)) + 1.0, scale.to(tl.float32))
    y = (x - zero.to(tl.float32)) * inverse
    y = tl.minimum(tl.maximum(y, 0.0), ((1 << BITS) - 1) * 1.0)
    return ((y + 12582912.0) - 12582912.0).to(tl.int32)


@triton.jit
def _run_codes(
    x_ptr, scale_ptr, zero_ptr, token, live, row, group, start, run,
    BITS: tl.constexpr, PER_CHANNEL: tl.constexpr, D: tl.constexpr, RUN_PAD: tl.constexpr,
):  # fmt: skip
    """Codes ``[tokens, RUN_PAD]`` of channels ``start .. start + run``; makes K's scales."""
    at = tl.arange(0, RUN_PAD)
    inside = at < run
    mask = live[:, None] & inside[None, :]
    channel = start + at
    x = tl.load(x_ptr + row[:, None] * D + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    if PER_CHANNEL:
        low = tl.min(tl.where(live[:, None], x, float("inf")), 0)
        high = tl.max(tl.where(live[:, None], x, float("-inf")), 0)
        scale, zero = _scale_zero(low, high, BITS)
        tl.store(scale_ptr + group * D + channel, scale, mask=inside)
        tl.store(zero_ptr + group * D + channel, zero, mask=inside)
        return _encode(x, scale[None, :], zero[None, :], BITS)
    else:
        groups: tl.constexpr = (D + 31) // 32
        where = row[:, None] * groups + channel[None, :] // 32
        scale = tl.load(scale_ptr + where, mask=mask, other=1.0)
        zero = tl.load(zero_ptr + where, mask=mask, other=0.0)
        return _encode(x, scale, zero, BITS)


@triton.jit(do_not_specialize=("n_tokens",))
def pack_kernel(
    x_ptr, codes_ptr, scale_ptr, zero_ptr, n_tokens, n_heads,
    BITS: tl.constexpr, PER_CHANNEL: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    LANES: tl.constexpr, RUN_PAD: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Program (32 tokens, head). LANES runs per half: 8 / BITS, and 8 for three bits."""
    block = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    token = block * BLOCK_T + tl.arange(0, BLOCK_T)
    live = token < n_tokens
    row = token * n_heads + head
    group = block * n_heads + head
    if not PER_CHANNEL:
        groups: tl.constexpr = (D + 31) // 32
        channel = tl.arange(0, D_PAD)
        mask = live[:, None] & (channel < D)[None, :]
        at = x_ptr + row[:, None] * D + channel[None, :]
        x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        inside = (channel < D)[None, :]
        low = tl.where(inside, x, float("inf")).reshape(BLOCK_T, D_PAD // 32, 32)
        high = tl.where(inside, x, float("-inf")).reshape(BLOCK_T, D_PAD // 32, 32)
        scale, zero = _scale_zero(tl.min(low, 2), tl.max(high, 2), BITS)
        part = tl.arange(0, D_PAD // 32)
        where = row[:, None] * groups + part[None, :]
        mask = live[:, None] & (part < groups)[None, :]
        tl.store(scale_ptr + where, scale, mask=mask)
        tl.store(zero_ptr + where, zero, mask=mask)
        tl.debug_barrier()

    run: tl.constexpr = D // 2 // LANES
    at = tl.arange(0, RUN_PAD)[None, :]
    mask = live[:, None] & (at < run)
    out = codes_ptr + row[:, None] * (D * BITS // 8) + at
    for half in tl.static_range(2):
        start = half * (D // 2)
        first = tl.zeros([BLOCK_T, RUN_PAD], tl.int32)
        second = tl.zeros([BLOCK_T, RUN_PAD], tl.int32)
        top = tl.zeros([BLOCK_T, RUN_PAD], tl.int32)
        for lane in tl.static_range(LANES):
            code = _run_codes(
                x_ptr, scale_ptr, zero_ptr, token, live, row, group, start + lane * run, run,
                BITS, PER_CHANNEL, D, RUN_PAD,
            )  # fmt: skip
            if BITS == 3:
                # Two runs of the 1-bit plane make one run of the 2-bit plane.
                low = (code & 3) << (lane // 2 * 2)
                if lane % 2 == 0:
                    first |= low
                else:
                    second |= low
                top |= (code >> 2) << lane
            else:
                first |= code << (lane * BITS)
        if BITS == 3:
            tl.store(out + half * 2 * run, first.to(tl.uint8), mask=mask)
            tl.store(out + half * 2 * run + run, second.to(tl.uint8), mask=mask)
            tl.store(out + D // 4 + half * run, top.to(tl.uint8), mask=mask)
        else:
            tl.store(out + half * run, first.to(tl.uint8), mask=mask)


def pack(x: Tensor, bits: int, per: Per) -> Packed:
    """`packing.pack` on the GPU; same arguments, the same bytes.

    Raises:
        ValueError: unsupported head dim or bit width.
    """
    n, hk, d = x.shape
    check_format(d, bits)
    channelwise = per == "channel"
    blocks, lanes = triton.cdiv(n, GROUP), 8 if bits == 3 else 8 // bits
    shape = (blocks, hk, d) if channelwise else (n, hk, triton.cdiv(d, GROUP))
    codes = torch.empty(n, hk, d * bits // 8, dtype=torch.uint8, device=x.device)
    scale = torch.empty(shape, dtype=torch.float16, device=x.device)
    zero = torch.empty_like(scale)
    if n:
        pack_kernel[(blocks, hk)](
            x.contiguous(), codes, scale, zero, n, hk,
            BITS=bits, PER_CHANNEL=channelwise, D=d, D_PAD=max(GROUP, triton.next_power_of_2(d)),
            LANES=lanes, RUN_PAD=triton.next_power_of_2(d // 2 // lanes), BLOCK_T=GROUP,
            num_warps=4,
        )  # fmt: skip
    return Packed(codes, scale, zero, bits, per, d)
