"""Stored KV to its place in one pass: dequantise, rotate K at the new position, scatter K and V.

Layout: K and V arrive token-major ``[n, HK, D]`` (or packed, ``packing.py``), K before RoPE; the
buffers are ``[HK, n_slots, D]``. A program owns K or V of 32 tokens of one head; for K that is one
quantisation group, so its scales are one row. K is handled as rotary pairs: tile column ``i`` holds
both partners and one cosine. K and V of the same tokens are neighbours in the grid; one program for
both needs twice the registers. Every byte is read from memory once and written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .codes import FP8, load_keys, load_values
from .packing import GROUP, Packed


@triton.jit(do_not_specialize=("n_tokens",))
def restore_kernel(
    k_ptr, k_scale, k_zero, v_ptr, v_scale, v_zero, pos_ptr, cos_ptr, sin_ptr, k_out, v_out,
    n_tokens, n_heads, stride_h, stride_n,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    ROTARY: tl.constexpr, PAIRS_PAD: tl.constexpr, PASS_PAD: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Program (K or V, block of 32 tokens, head). Bits 16 stand for unpacked values, 88 for fp8."""
    block = tl.program_id(1).to(tl.int64)
    head = tl.program_id(2).to(tl.int64)
    token = block * BLOCK_T + tl.arange(0, BLOCK_T)
    pos = tl.load(pos_ptr + token, mask=token < n_tokens, other=-1).to(tl.int64)
    live = (token < n_tokens) & (pos >= 0)
    row = (token * n_heads + head)[:, None]
    group = block * n_heads + head
    target = head * stride_h + pos[:, None] * stride_n

    if tl.program_id(0) == 0:
        pair = tl.arange(0, PAIRS_PAD)[None, :]
        pair_mask = live[:, None] & (pair < ROTARY // 2)
        if INTERLEAVED:
            first = pair * 2
            second = pair * 2 + 1
        else:
            first = pair
            second = pair + ROTARY // 2
        angle = pos[:, None] * (ROTARY // 2) + pair
        cos = tl.load(cos_ptr + angle, mask=pair_mask, other=0.0)
        sin = tl.load(sin_ptr + angle, mask=pair_mask, other=0.0)
        a = load_keys(k_ptr, k_scale, k_zero, row, group, first, pair_mask, K_BITS, D)
        b = load_keys(k_ptr, k_scale, k_zero, row, group, second, pair_mask, K_BITS, D)
        out_type = k_out.dtype.element_ty
        tl.store(k_out + target + first, (a * cos - b * sin).to(out_type), mask=pair_mask)
        tl.store(k_out + target + second, (b * cos + a * sin).to(out_type), mask=pair_mask)

        if ROTARY < D:
            rest = ROTARY + tl.arange(0, PASS_PAD)[None, :]
            mask = live[:, None] & (rest < D)
            kept = load_keys(k_ptr, k_scale, k_zero, row, group, rest, mask, K_BITS, D)
            tl.store(k_out + target + rest, kept.to(out_type), mask=mask)
    else:
        channel = tl.arange(0, D_PAD)[None, :]
        v_mask = live[:, None] & (channel < D)
        v = load_values(v_ptr, v_scale, v_zero, row, channel, v_mask, V_BITS, D)
        tl.store(v_out + target + channel, v.to(v_out.dtype.element_ty), mask=v_mask)


def _parts(x: Tensor | Packed, per: str) -> tuple[Tensor, Tensor, Tensor, int, tuple[int, ...]]:
    if isinstance(x, Tensor):
        x = x.contiguous()
        if x.dtype == torch.float8_e4m3fn:
            return x.view(torch.uint8), x.view(torch.uint8), x.view(torch.uint8), FP8, (*x.shape,)
        return x, x, x, 16, tuple(x.shape)
    if x.per != per:
        raise ValueError(f"K is packed per channel and V per token; got {x.per} instead of {per}")
    return x.codes, x.scale, x.zero, x.bits, (x.codes.shape[0], x.codes.shape[1], x.head_dim)


def restore(
    k: Tensor | Packed,
    v: Tensor | Packed,
    positions: Tensor,
    k_out: Tensor,
    v_out: Tensor,
    cos_table: Tensor,
    sin_table: Tensor,
    interleaved: bool = False,
) -> None:
    """`reference.restore` and `reference.restore_quantised` on the GPU, in place.

    Args:
        k, v: ``[n, HK, D]``, each values (also ``float8_e4m3fn``) or packed (bit widths may
            differ); K before RoPE.
        positions: int32 or int64 ``[n]``, each once, any order; negative ones are rows that fill
            up the last group of one of several chunks, and go nowhere.
        k_out, v_out: ``[HK, n_slots, D]`` with equal strides.
        cos_table, sin_table: fp32 ``[> max position, R/2]``; ``R <= D`` channels rotate.

    Raises:
        ValueError: shapes, strides, packing or table widths do not fit.
    """
    k_data, k_scale, k_zero, k_bits, shape = _parts(k, "channel")
    v_data, v_scale, v_zero, v_bits, v_shape = _parts(v, "token")
    n, hk, d = shape
    fits = v_shape == shape and positions.shape == (n,) and k_out.shape == v_out.shape
    if not fits or k_out.shape[0] != hk or k_out.shape[2] != d:
        raise ValueError(
            f"need k and v [n, HK, D], positions [n], buffers [HK, n_slots, D]; got {shape}, "
            f"{v_shape}, {tuple(positions.shape)}, {tuple(k_out.shape)}, {tuple(v_out.shape)}"
        )
    if k_out.stride() != v_out.stride() or k_out.stride(2) != 1:
        raise ValueError("k_out and v_out need equal strides, channels contiguous: allocate alike")
    pairs = cos_table.shape[1]
    tables_fit = cos_table.shape == sin_table.shape and 0 < 2 * pairs <= d
    if not tables_fit or cos_table.dtype != torch.float32 or sin_table.dtype != torch.float32:
        raise ValueError(
            f"tables must be fp32 [positions, R/2] with R <= D={d}; got {tuple(cos_table.shape)} "
            f"{cos_table.dtype} and {tuple(sin_table.shape)}: build them with reference.rope_tables"
        )
    if not n:
        return
    restore_kernel[(2, triton.cdiv(n, GROUP), hk)](
        k_data, k_scale, k_zero, v_data, v_scale, v_zero, positions,
        cos_table.contiguous(), sin_table.contiguous(), k_out, v_out,
        n, hk, k_out.stride(0), k_out.stride(1),
        K_BITS=k_bits, V_BITS=v_bits, D=d, D_PAD=triton.next_power_of_2(d), ROTARY=2 * pairs,
        PAIRS_PAD=triton.next_power_of_2(pairs),
        PASS_PAD=triton.next_power_of_2(max(1, d - 2 * pairs)),
        INTERLEAVED=interleaved, BLOCK_T=GROUP, num_warps=4 if d <= 128 else 8,
    )  # fmt: skip
