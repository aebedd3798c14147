"""Attention of selected queries at any sorted positions over the full KV buffer, in Triton.

Layout: q and out ``[n_q, H, D]``; K and V ``[HK, n_slots, D]``, slot = position; positions int32.
A tile is ``BLOCK_M // G`` queries times the ``G`` query heads of one key head, so each key block is
read once for the group. A program handles one *item* of the plan for one key head; neighbouring
programs share the head, whose keys then stream through the L2 cache together.

Key blocks that every query of a tile sees (``tile_plan.py``) skip the mask. Loop bounds read from a
table keep the loops free of branches, without which the compiler does not pipeline the loads. Few
queries: the key range is split and merged by log-sum-exp.

Holes (``key_bitmap.py``): the same ranges of key blocks are walked through lists of block numbers,
first the blocks without a hole, with no mask, then those with some, by their bits; a block that is
all hole is in no list.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .key_bitmap import KeyBitmap
from .tile_plan import TilePlan, plan_tiles

LOG2E = 1.4426950408889634


@triton.jit
def _bits(words, start, in_block, BLOCK_N: tl.constexpr):
    """Whether the keys of the block that begins at ``start`` take part: bool ``[BLOCK_N]``."""
    word = tl.load(words + start // 64) >> (start % 64)
    half = word.to(tl.int32)
    if BLOCK_N == 64:
        half = tl.where(in_block < 32, half, (word >> 32).to(tl.int32))
    return ((half >> (in_block % 32)) & 1) != 0


@triton.jit
def _visit(
    acc, row_max, row_sum, q, k_head, v_head, first, last, limit, floor, key_end, stride_n,
    scale_log2, MASKED: tl.constexpr, WINDOWED: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, PRECISION: tl.constexpr,
    HOLES: tl.constexpr = False, words=0, lists=0, gap=0, by=0, gap_2=0, by_2=0,
):  # fmt: skip
    """Online softmax over key blocks ``first .. last``; MASKED compares positions.

    MASKED goes on ``by`` blocks further from ``gap`` on, and by ``by_2`` again from ``gap_2`` on.
    With HOLES these are places in ``lists`` of blocks, and MASKED looks at the keys' bits as well.
    """
    in_block = tl.arange(0, BLOCK_N)
    channel = tl.arange(0, D_PAD)
    for place in range(first, last):
        block = place
        if MASKED and (WINDOWED or HOLES):
            block += tl.where(place >= gap, by, 0) + tl.where(place >= gap_2, by_2, 0)
        if HOLES:
            block = tl.load(lists + block)
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
            if HOLES:
                kept = _bits(words, block * BLOCK_N, in_block, BLOCK_N)
                seen = seen & kept[None, :]
            score = tl.where(seen, score, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(score, 1) * scale_log2)
        safe_max = new_max
        if MASKED:
            safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2(score * scale_log2 - safe_max[:, None])
        shrink = tl.exp2(row_max - safe_max)
        row_sum = row_sum * shrink + tl.sum(p, 1)
        row_max = new_max
        if MASKED:
            inside = key < key_end
            if HOLES:
                inside = inside & kept
            v = tl.load(v_ptr, mask=inside[:, None] & (channel < D)[None, :], other=0.0)
        elif D == D_PAD:
            v = tl.load(v_ptr)
        else:
            v = tl.load(v_ptr, mask=(channel < D)[None, :], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=("n_q", "n_keys", "n_blocks"))
def sparse_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, pos_ptr, items_ptr, words_ptr, lists_ptr, before_ptr,
    n_q, n_heads, n_keys, n_blocks, window, stride_h, stride_n, scale_log2,
    G: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, WINDOWED: tl.constexpr, HOLES: tl.constexpr, SPLIT: tl.constexpr,
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
    first, last, gap, by, gap_2, by_2 = full_end, end, 0, 0, 0, 0
    if HOLES:
        # Rows of `lists`: blocks that are whole, in part, not empty. What is masked are those in
        # part, then all not empty up to full_begin, then those from full_end on.
        before = before_ptr + n_blocks + 1
        first = n_blocks + tl.load(before + full_begin)
        gap = n_blocks + tl.load(before + full_end)
        before += n_blocks + 1
        window_at = tl.load(before + begin)
        n_window = tl.load(before + full_begin) - window_at
        edge_at = tl.load(before + full_end)
        gap_2 = gap + n_window
        last = gap_2 + tl.load(before + end) - edge_at
        by = n_blocks * 2 + window_at - gap
        by_2 = edge_at - window_at - n_window
        full_begin = tl.load(before_ptr + full_begin)
        full_end = tl.load(before_ptr + full_end)
    elif WINDOWED:
        # The window's edge and the diagonal in one loop: a third one takes registers to the limit.
        first, gap, by = begin, full_begin, full_end - full_begin
        last = end - by
    acc, row_max, row_sum = _visit(
        acc, row_max, row_sum, q, k_head, v_head, full_begin, full_end, limit, floor, key_end,
        stride_n, scale_log2, False, WINDOWED, BLOCK_N, D, D_PAD, PRECISION,
        HOLES, words_ptr, lists_ptr,
    )  # fmt: skip
    acc, row_max, row_sum = _visit(
        acc, row_max, row_sum, q, k_head, v_head, first, last, limit, floor, key_end,
        stride_n, scale_log2, True, WINDOWED, BLOCK_N, D, D_PAD, PRECISION,
        HOLES, words_ptr, lists_ptr, gap, by, gap_2, by_2,
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


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    n_keys: int,
    scale: float,
    window: int | None = None,
    holes: KeyBitmap | None = None,
    plan: TilePlan | None = None,
) -> Tensor:
    """`reference.sparse_attention` on the GPU; same arguments, same result.

    Args:
        holes: of at least ``n_keys`` keys; those whose bit is 0 are left out. ``None``: no holes.
            Its lists of blocks are made at the first call and shared by the layers.
        plan: `plan_tiles` of these positions; without it one is built, which reads the positions
            back to the host. Build it once per request and pass it for every layer.

    Returns:
        ``[n_q, H, D]`` in ``q.dtype``; 0 where a query sees no key.

    Raises:
        ValueError: shapes or strides do not fit, or the plan was made for something else.
    """
    _check(k, v, q.shape[2], n_keys, scale, holes)
    (n_q, n_heads, d), hk = q.shape, k.shape[0]
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
    words = lists = before = plan.items
    if holes is not None:
        blocks = holes.blocks(c.block_n)
        words, lists, before = holes.words, blocks.lists, blocks.before
    sparse_attention_kernel[(plan.items.shape[0], hk)](
        q, k, v, part, lse, plan.positions, plan.items, words, lists, before,
        n_q, n_heads, n_keys, lists.shape[1], window or 0, k.stride(0), k.stride(1), scale * LOG2E,
        G=plan.group, D=d, D_PAD=d_pad, BLOCK_M=c.block_m, BLOCK_N=c.block_n,
        WINDOWED=window is not None, HOLES=holes is not None, SPLIT=split,
        PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32",
        # The number of a listed block is loaded a stage before the block.
        num_warps=c.num_warps, num_stages=c.num_stages + (holes is not None),
    )  # fmt: skip
    if split:
        merge_kernel[(n_q * n_heads,)](
            part, lse, out, n_q * n_heads, plan.n_splits,
            D=d, D_PAD=d_pad, SPLITS=triton.next_power_of_2(plan.n_splits), num_warps=4,
        )  # fmt: skip
    return out


def _check(
    k: Tensor, v: Tensor, d: int, n_keys: int, scale: float, holes: KeyBitmap | None
) -> None:
    if k.shape != v.shape or k.shape[2] != d or k.stride() != v.stride() or k.stride(2) != 1:
        raise ValueError(
            f"k and v must be [HK, n_slots, {d}] with equal strides and contiguous channels; got "
            f"{tuple(k.shape)} {k.stride()} and {tuple(v.shape)} {v.stride()}"
        )
    if holes is not None and holes.n_slots < n_keys:
        raise ValueError(f"the bitmap must cover n_keys={n_keys} keys, it has {holes.n_slots}")
    if n_keys > k.shape[1] or k.shape[1] * k.stride(1) >= 2**31 or scale <= 0:
        raise ValueError(
            f"need n_keys <= n_slots, n_slots * stride < 2**31 and scale > 0; got n_keys={n_keys}, "
            f"n_slots={k.shape[1]}, stride={k.stride(1)}, scale={scale}: split the buffer by heads"
        )
