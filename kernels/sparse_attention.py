"""Attention of selected queries at any sorted positions over the full KV buffer, in Triton.

Layout: q and out ``[n_q, H, D]``; K and V ``[HK, n_slots, D]``, slot = position; positions int32.
A tile is ``BLOCK_M // G`` queries times the ``G`` query heads of one key head, so each key block is
read once for the group. A program handles one *item* of the plan for one key head; neighbouring
programs share the head, whose keys then stream through the L2 cache together.

The plan is built on the host from the positions, once per request and for all layers. An item is
``(tile, split, begin, full_begin, full_end, end, key_end)``: key blocks ``full_begin .. full_end``
are visible to every query of the tile and skip the mask; those before (window) and after (diagonal)
compare positions. Loop bounds read from a table keep the loops free of branches, without which the
compiler does not pipeline the loads. Few queries: the key range is split and merged by log-sum-exp.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arch import current_arch, processors

ITEM = 8
LOG2E = 1.4426950408889634
MAX_SPLITS = 64


@triton.jit
def _visit(
    acc, row_max, row_sum, q, k_head, v_head, keep, first, last, limit, floor, key_end, stride_n,
    scale_log2, MASKED: tl.constexpr, WINDOWED: tl.constexpr, KEEP: tl.constexpr,
    BLOCK_N: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over key blocks ``first .. last``; MASKED compares positions."""
    in_block = tl.arange(0, BLOCK_N)
    channel = tl.arange(0, D_PAD)
    for block in range(first, last):
        key = block * BLOCK_N + in_block
        k_ptr = k_head + key[None, :] * stride_n + channel[:, None]
        v_ptr = v_head + key[:, None] * stride_n + channel[None, :]
        if MASKED:
            # Slots beyond the tile's last visible key may hold anything, and 0 * NaN is NaN.
            inside = key < key_end
            k = tl.load(k_ptr, mask=inside[None, :] & (channel < D)[:, None], other=0.0)
        elif D == D_PAD:
            k = tl.load(k_ptr)
        else:
            k = tl.load(k_ptr, mask=(channel < D)[:, None], other=0.0)
        score = tl.dot(q, k, input_precision=PRECISION)
        if MASKED:
            seen = key[None, :] <= limit[:, None]
            if WINDOWED:
                seen = seen & (key[None, :] >= floor[:, None])
            score = tl.where(seen, score, float("-inf"))
        if KEEP:
            kept = tl.load(keep + key, mask=key < key_end, other=0) != 0
            score = tl.where(kept[None, :], score, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(score, 1) * scale_log2)
        safe_max = new_max
        if MASKED or KEEP:
            safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2(score * scale_log2 - safe_max[:, None])
        shrink = tl.exp2(row_max - safe_max)
        row_sum = row_sum * shrink + tl.sum(p, 1)
        row_max = new_max
        if MASKED:
            inside = key < key_end
            if KEEP:
                inside = inside & kept
            v = tl.load(v_ptr, mask=inside[:, None] & (channel < D)[None, :], other=0.0)
        elif KEEP:
            v = tl.load(v_ptr, mask=kept[:, None] & (channel < D)[None, :], other=0.0)
        elif D == D_PAD:
            v = tl.load(v_ptr)
        else:
            v = tl.load(v_ptr, mask=(channel < D)[None, :], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=("n_q", "n_keys"))
def sparse_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, pos_ptr, items_ptr, keep_ptr,
    n_q, n_heads, n_keys, window, stride_h, stride_n, scale_log2,
    G: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, WINDOWED: tl.constexpr, KEEP: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (item, key head). SPLIT writes fp32 parts and their base-2 log-sum-exp."""
    item = items_ptr + tl.program_id(0).to(tl.int64) * 8
    kv_head = tl.program_id(1).to(tl.int64)
    tile = tl.load(item).to(tl.int64)
    split = tl.load(item + 1).to(tl.int64)
    begin = tl.load(item + 2)
    full_begin = tl.load(item + 3)
    full_end = tl.load(item + 4)
    end = tl.load(item + 5)
    key_end = tl.load(item + 6)

    row = tl.arange(0, BLOCK_M)
    channel = tl.arange(0, D_PAD)
    token = tile * (BLOCK_M // G) + row // G
    live = (token < n_q) & (row < BLOCK_M // G * G)
    head_row = token * n_heads + kv_head * G + row % G
    q_mask = live[:, None] & (channel < D)[None, :]
    q = tl.load(q_ptr + head_row[:, None] * D + channel[None, :], mask=q_mask, other=0.0)
    pos = tl.load(pos_ptr + token, mask=live, other=-1)
    limit = tl.minimum(pos, n_keys - 1)
    floor = pos - window + 1

    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    k_head = k_ptr + kv_head * stride_h
    v_head = v_ptr + kv_head * stride_h
    if WINDOWED:
        acc, row_max, row_sum = _visit(
            acc, row_max, row_sum, q, k_head, v_head, keep_ptr, begin, full_begin, limit, floor,
            key_end, stride_n, scale_log2, True, WINDOWED, KEEP, BLOCK_N, D, D_PAD, PRECISION,
        )  # fmt: skip
    acc, row_max, row_sum = _visit(
        acc, row_max, row_sum, q, k_head, v_head, keep_ptr, full_begin, full_end, limit, floor,
        key_end, stride_n, scale_log2, False, WINDOWED, KEEP, BLOCK_N, D, D_PAD, PRECISION,
    )  # fmt: skip
    acc, row_max, row_sum = _visit(
        acc, row_max, row_sum, q, k_head, v_head, keep_ptr, full_end, end, limit, floor,
        key_end, stride_n, scale_log2, True, WINDOWED, KEEP, BLOCK_N, D, D_PAD, PRECISION,
    )  # fmt: skip

    empty = row_sum == 0.0
    acc = acc / tl.where(empty, 1.0, row_sum)[:, None]
    if SPLIT:
        lse = tl.where(empty, float("-inf"), row_max + tl.log2(tl.where(empty, 1.0, row_sum)))
        head_row += split * n_q * n_heads
        tl.store(lse_ptr + head_row, lse, mask=live)
    out = out_ptr + head_row[:, None] * D + channel[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=q_mask)


@triton.jit(do_not_specialize=("n_rows", "n_splits"))
def merge_kernel(
    part_ptr, lse_ptr, out_ptr, n_rows, n_splits,
    D: tl.constexpr, D_PAD: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Program = one (query, head) row: weigh its parts by ``2 ** (lse - max)``."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    channel = tl.arange(0, D_PAD)
    live = split < n_splits
    at = split.to(tl.int64) * n_rows + row
    lse = tl.load(lse_ptr + at, mask=live, other=float("-inf"))
    top = tl.max(lse, 0)
    weight = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weight, 0)
    mask = live[:, None] & (channel < D)[None, :]
    part = tl.load(part_ptr + at[:, None] * D + channel[None, :], mask=mask, other=0.0)
    out = tl.sum(part * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    target = out_ptr + row * D + channel
    tl.store(target, out.to(out_ptr.dtype.element_ty), mask=channel < D)


@dataclass(frozen=True)
class TileConfig:
    """Launch shape: rows and keys of a tile (powers of two), warps, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class TilePlan:
    """Everything about the positions that the kernel needs; reusable for all layers.

    Attributes:
        items: int32 ``[n_items, 8]``, the longest first.
        positions: int32 ``[n_q]``, next to ``items`` on the device.
        n_splits: parts per tile; above 1 the parts are merged afterwards.
        n_keys, window, group, head_dim: what the plan was made for.
        config: the tile.
    """

    items: Tensor
    positions: Tensor
    n_splits: int
    n_keys: int
    window: int | None
    group: int
    head_dim: int
    config: TileConfig


def tile_config(n_q: int, group: int, head_dim: int, dtype: torch.dtype) -> TileConfig:
    """The widest tile of the current architecture that neither spills nor runs mostly empty."""
    hopper = 90 <= current_arch() < 120  # 12x has neither their matrix unit nor their memory
    block_m = max(16, min(128, triton.next_power_of_2(max(n_q * group, group))))
    if dtype == torch.float32:
        smallest = max(16, triton.next_power_of_2(group))
        return TileConfig(smallest, 32, 4, 2) if head_dim <= 128 else TileConfig(smallest, 16, 8, 2)
    if head_dim > 128:
        return TileConfig(min(block_m, 64), 32, 4 if block_m < 64 else 8, 2)
    if block_m < 64:
        return TileConfig(block_m, 64, 4, 3)
    # Without wgmma both operands sit in registers: 64 keys per step spill there at D = 128.
    block_n = 64 if hopper or head_dim <= 64 else 32
    if block_m == 64:
        return TileConfig(64, block_n, 4, 2 if hopper else 3)
    return TileConfig(128, block_n, 8, 3)


def plan_tiles(
    positions: Tensor,
    n_keys: int,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    window: int | None = None,
    config: TileConfig | None = None,
    n_splits: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    on_device: bool = False,
) -> TilePlan:
    """Cut sorted ``positions`` ``[n_q]`` into tiles and their key ranges (reads them on the host).

    Args:
        config, n_splits: instead of the ones chosen for the shape. Splits are added until the GPU
            has about two programs per processor, none shorter than four key blocks.
        dtype: of q, k and v; fp32 needs smaller tiles.
        on_device: work where the positions are and read nothing back: they must ascend, unchecked.

    Raises:
        ValueError: positions do not ascend, heads do not divide, or ``G`` exceeds the tile.
    """
    group = n_heads // n_kv_heads
    config = config or tile_config(positions.numel(), group, head_dim, dtype)
    if group * n_kv_heads != n_heads or not 0 < group <= config.block_m:
        raise ValueError(
            f"H must be a multiple of HK and G = H / HK at most block_m; got H={n_heads}, "
            f"HK={n_kv_heads}, block_m={config.block_m}"
        )
    pos = positions.to(positions.device if on_device else "cpu", torch.int64)
    if not on_device and bool((pos[1:] < pos[:-1]).any()):
        raise ValueError(
            "positions must ascend: sort them with torch.sort, apply its indices to q, and undo "
            "them on the output"
        )
    per_tile, bn = config.block_m // group, config.block_n
    start = torch.arange(0, pos.numel(), per_tile, device=pos.device)
    low = pos[start]
    high = pos[(start + per_tile).clamp(max=pos.numel()) - 1]
    key_end = (high + 1).clamp(0, n_keys)
    end = (key_end + bn - 1) // bn
    begin, full_begin = torch.zeros_like(end), torch.zeros_like(end)
    if window is not None:
        begin = torch.minimum((low - window + 1).clamp(min=0) // bn, end)
        full_begin = torch.minimum((high - window + 1).clamp(min=0).add(bn - 1) // bn, end)
    full_end = torch.maximum((low + 1).clamp(0, n_keys) // bn, full_begin)
    full_end = torch.minimum(full_end, end)
    tiles = start.numel()
    if n_splits is None:
        longest = -(-n_keys // bn) if on_device or not tiles else int((end - begin).max())
        wanted = -(-2 * processors() // max(1, tiles * n_kv_heads))
        n_splits = max(1, min(wanted, longest // 4, MAX_SPLITS))
    split = torch.arange(n_splits, device=pos.device)[None, :]
    span = (end - begin)[:, None]
    first = begin[:, None] + span * split // n_splits
    last = begin[:, None] + span * (split + 1) // n_splits

    def clip(bound: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(bound[:, None], first), last)

    tile = torch.arange(tiles, device=pos.device)[:, None].expand_as(first)
    columns = [tile, split.expand_as(first), first, clip(full_begin), clip(full_end), last]
    columns += [key_end[:, None].expand_as(first), torch.zeros_like(first)]
    items = torch.stack(columns, -1).reshape(-1, ITEM)
    order = torch.argsort(items[:, 5] - items[:, 2], descending=True, stable=True)
    return TilePlan(
        items[order].to(positions.device, torch.int32), pos.to(positions.device, torch.int32),
        n_splits, n_keys, window, group, head_dim, config,
    )  # fmt: skip


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    n_keys: int,
    scale: float,
    window: int | None = None,
    keep: Tensor | None = None,
    plan: TilePlan | None = None,
) -> Tensor:
    """`reference.sparse_attention` on the GPU; same arguments, same result.

    Args:
        keep: bool ``[n_slots]``; keys that are False are left out (holes). ``None`` keeps all.
        plan: `plan_tiles` of these positions; without it one is built, which reads the positions
            back to the host. Build it once per request and pass it for every layer.

    Returns:
        ``[n_q, H, D]`` in ``q.dtype``; 0 where a query sees no key.

    Raises:
        ValueError: shapes or strides do not fit, or the plan was made for something else.
    """
    (n_q, n_heads, d), hk = q.shape, k.shape[0]
    if k.shape != v.shape or k.shape[2] != d or k.stride() != v.stride() or k.stride(2) != 1:
        raise ValueError(
            f"k and v must be [HK, n_slots, {d}] with equal strides and contiguous channels; got "
            f"{tuple(k.shape)} {k.stride()} and {tuple(v.shape)} {v.stride()}"
        )
    if n_keys > k.shape[1] or k.shape[1] * k.stride(1) >= 2**31 or scale <= 0:
        raise ValueError(
            f"need n_keys <= n_slots, n_slots * stride < 2**31 and scale > 0; got n_keys={n_keys}, "
            f"n_slots={k.shape[1]}, stride={k.stride(1)}, scale={scale}: split the buffer by heads"
        )
    plan = plan or plan_tiles(positions, n_keys, n_heads, hk, d, window, dtype=q.dtype)
    made_for = (plan.positions.numel(), plan.n_keys, plan.window, plan.group, plan.head_dim)
    if made_for != (n_q, n_keys, window, n_heads // hk, d):
        raise ValueError(
            f"the plan is for (n_q, n_keys, window, G, D) = {made_for}, the call has "
            f"{(n_q, n_keys, window, n_heads // hk, d)}: make a new plan with plan_tiles"
        )
    q, c = q.contiguous(), plan.config
    out = torch.empty_like(q)
    if not n_q:
        return out
    split = plan.n_splits > 1
    part, lse = out, out
    if split:
        part = torch.empty(plan.n_splits, n_q, n_heads, d, dtype=torch.float32, device=q.device)
        lse = torch.empty(plan.n_splits, n_q, n_heads, dtype=torch.float32, device=q.device)
    d_pad = triton.next_power_of_2(d)
    sparse_attention_kernel[(plan.items.shape[0], hk)](
        q, k, v, part, lse, plan.positions, plan.items,
        plan.items if keep is None else keep.view(torch.uint8),
        n_q, n_heads, n_keys, window or 0, k.stride(0), k.stride(1), scale * LOG2E,
        G=plan.group, D=d, D_PAD=d_pad, BLOCK_M=c.block_m, BLOCK_N=c.block_n,
        WINDOWED=window is not None, KEEP=keep is not None, SPLIT=split,
        PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32",
        num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    if split:
        merge_kernel[(n_q * n_heads,)](
            part, lse, out, n_q * n_heads, plan.n_splits,
            D=d, D_PAD=d_pad, SPLITS=triton.next_power_of_2(plan.n_splits), num_warps=4,
        )  # fmt: skip
    return out
