"""One query per request over K and V of all requests in one pooled buffer (a decode step).

Layout: q and out ``[B, H, D]``; K and V ``[HK, n_slots, D]``; request ``i`` has the ``n_keys[i]``
slots from ``base[i]`` on, both read on the device: the launch depends on no value, so a CUDA graph
can hold it. Program (request, key head, split): the G query heads of a key head are the rows of a
tile, so each key is read once for all of them; splits share a request's key blocks evenly and are
merged by log-sum-exp. Only the last block, or all of a window, compares positions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arch import processors
from .sparse_attention import LOG2E, _visit, merge_kernel
from .tile_plan import TileConfig

MAX_SPLITS = 32


@triton.jit(do_not_specialize=("n_requests",))
def decode_pooled_kernel(
    q_ptr, k_ptr, v_ptr, part_ptr, lse_ptr, base_ptr, n_keys_ptr,
    n_requests, n_heads, window, stride_h, stride_n, scale_log2,
    G: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, WINDOWED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (request, key head, split) writes an fp32 part and its base-2 log-sum-exp."""
    request = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    base = tl.load(base_ptr + request).to(tl.int64)
    n_keys = tl.load(n_keys_ptr + request).to(tl.int32)

    floor_key = 0
    if WINDOWED:
        floor_key = tl.maximum(n_keys - window, 0)
    first_block = floor_key // BLOCK_N
    n_blocks = tl.cdiv(n_keys, BLOCK_N) - first_block
    first = first_block + n_blocks * split // SPLITS
    last = first_block + n_blocks * (split + 1) // SPLITS
    full = first
    if not WINDOWED:
        full = tl.maximum(first, tl.minimum(last, n_keys // BLOCK_N))

    row = tl.arange(0, BLOCK_M)
    channel = tl.arange(0, D_PAD)
    live = row < G
    head_row = request * n_heads + kv_head * G + row
    q_mask = live[:, None] & (channel < D)[None, :]
    q = tl.load(q_ptr + head_row[:, None] * D + channel[None, :], mask=q_mask, other=0.0)
    limit = tl.full([BLOCK_M], 0, tl.int32) + (n_keys - 1)
    floor = tl.full([BLOCK_M], 0, tl.int32) + floor_key

    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    k_head = k_ptr + kv_head * stride_h + base * stride_n
    v_head = v_ptr + kv_head * stride_h + base * stride_n
    if not WINDOWED:
        acc, row_max, row_sum = _visit(
            acc, row_max, row_sum, q, k_head, v_head, first, full, limit, floor, n_keys,
            stride_n, scale_log2, False, WINDOWED, BLOCK_N, D, D_PAD, PRECISION,
        )  # fmt: skip
    acc, row_max, row_sum = _visit(
        acc, row_max, row_sum, q, k_head, v_head, full, last, limit, floor, n_keys,
        stride_n, scale_log2, True, WINDOWED, BLOCK_N, D, D_PAD, PRECISION,
    )  # fmt: skip

    empty = row_sum == 0.0
    acc = acc / tl.where(empty, 1.0, row_sum)[:, None]
    lse = tl.where(empty, float("-inf"), row_max + tl.log2(tl.where(empty, 1.0, row_sum)))
    head_row += split.to(tl.int64) * n_requests * n_heads
    tl.store(lse_ptr + head_row, lse, mask=live)
    tl.store(part_ptr + head_row[:, None] * D + channel[None, :], acc, mask=q_mask)


def decode_config(group: int, head_dim: int, dtype: torch.dtype) -> TileConfig:
    """Tile of one key head's queries; narrower for wide heads and fp32, which would spill."""
    rows = max(16, triton.next_power_of_2(group))
    if head_dim > 128:
        return TileConfig(rows, 32 if dtype != torch.float32 else 16, 4, 2)
    return TileConfig(rows, 32, 4, 2) if dtype == torch.float32 else TileConfig(rows, 64, 4, 3)


def decode_pooled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    base: Tensor,
    n_keys: Tensor,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """`decode_reference.decode_pooled` on the GPU; same arguments, same result.

    Raises:
        ValueError: shapes or strides do not fit.
    """
    (n, n_heads, d), hk = q.shape, k.shape[0]
    fits = k.shape == v.shape and k.shape[2] == d and k.stride() == v.stride() and not n_heads % hk
    if not fits or k.stride(2) != 1 or base.shape != (n,) or n_keys.shape != (n,) or scale <= 0:
        raise ValueError(
            "need k and v [HK, n_slots, D] with equal strides, H a multiple of HK, base and n_keys "
            f"[B], scale > 0; got q {tuple(q.shape)}, k {tuple(k.shape)} {k.stride()}, v "
            f"{tuple(v.shape)} {v.stride()}, {tuple(base.shape)}, {tuple(n_keys.shape)}, {scale}"
        )
    q, c = q.contiguous(), decode_config(n_heads // hk, d, q.dtype)
    out = torch.empty_like(q)
    splits = max(1, min(MAX_SPLITS, -(-2 * processors() // max(1, n * hk))))
    part = torch.empty(splits, n, n_heads, d, dtype=torch.float32, device=q.device)
    lse = torch.empty(splits, n, n_heads, dtype=torch.float32, device=q.device)
    d_pad = triton.next_power_of_2(d)
    if not n:
        return out
    decode_pooled_kernel[(n, hk, splits)](
        q, k, v, part, lse, base, n_keys, n, n_heads, window or 0, k.stride(0), k.stride(1),
        scale * LOG2E, G=n_heads // hk, D=d, D_PAD=d_pad, BLOCK_M=c.block_m, BLOCK_N=c.block_n,
        SPLITS=splits, WINDOWED=window is not None,
        PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32",
        num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    merge_kernel[(n * n_heads,)](
        part, lse, out, n * n_heads, splits,
        D=d, D_PAD=d_pad, SPLITS=triton.next_power_of_2(splits), num_warps=4,
    )  # fmt: skip
    return out
