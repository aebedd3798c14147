"""Decode attention straight from 8/4/3/2-bit pages: one query token per sequence, split over keys.

Layout: `decode_reference`. A program owns one key head of one sequence and a share of its pages;
the ``G`` query heads of the group are the rows of its tile, so codes are read once for all of them.
One step of the loop is one page: its codes become keys in registers, as rotary pairs, are turned to
the page's place in this sequence, and meet the two halves of the query in two products. The share
after the last is the full-precision window. Parts are merged by log-sum-exp.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arch import processors
from .codes import load_keys, load_values
from .decode_reference import PagePool, PageTable, Window, check_decode
from .sparse_attention import LOG2E, merge_kernel
from .tile_plan import MAX_SPLITS


@triton.jit
def _fold(acc, row_max, row_sum, score, seen, v, PRECISION: tl.constexpr):
    """One step of the online softmax; ``score`` is in base 2 already."""
    score = tl.where(seen[None, :], score, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(score, 1))
    safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.exp2(score - safe_max[:, None])
    shrink = tl.exp2(row_max - safe_max)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_max, row_sum * shrink + tl.sum(p, 1)


@triton.jit
def decode_kernel(
    q_ptr, k_codes, k_scale, k_zero, v_codes, v_scale, v_zero, offsets, pages, base, counts,
    cos_ptr, sin_ptr, near_k, near_v, near_counts, part_ptr, lse_ptr,
    n_heads, n_kv, max_pages, near_slots, n_shares, n_rows, scale_log2,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, ROTARY: tl.constexpr, PAIRS_PAD: tl.constexpr,
    PASS_PAD: tl.constexpr, TURN: tl.constexpr, INTERLEAVED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (share of the keys, key head, sequence); share ``n_shares`` is the window."""
    share = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    row = tl.arange(0, ROWS)
    live = row < G
    q_at = (batch * n_heads + head * G + row).to(tl.int64)
    slot = tl.arange(0, 32)
    pair = tl.arange(0, PAIRS_PAD)[None, :]
    pair_mask = pair < ROTARY // 2
    if INTERLEAVED:
        first = pair * 2
        second = pair * 2 + 1
    else:
        first = pair
        second = pair + ROTARY // 2
    rest = ROTARY + tl.arange(0, PASS_PAD)[None, :]
    channel = tl.arange(0, D_PAD)[None, :]
    q_row = q_ptr + q_at[:, None] * D
    qa = tl.load(q_row + first, mask=live[:, None] & pair_mask, other=0.0)
    qb = tl.load(q_row + second, mask=live[:, None] & pair_mask, other=0.0)
    q_rest = tl.load(q_row + rest, mask=live[:, None] & (rest < D), other=0.0)
    q_all = tl.load(q_row + channel, mask=live[:, None] & (channel < D), other=0.0)

    acc = tl.zeros([ROWS, D_PAD], tl.float32)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    count = tl.load(counts + batch)
    each = (count + n_shares - 1) // n_shares
    last = tl.minimum(count, (share + 1) * each)
    for i in range(share * each, tl.where(share < n_shares, last, 0)):
        page = tl.load(pages + batch * max_pages + i).to(tl.int64)
        offset = tl.load(offsets + page * 32 + slot)
        seen = offset >= 0
        token = ((page * 32 + slot) * n_kv + head)[:, None]
        group = page * n_kv + head
        # A slot without a token holds codes of no meaning, finite all the same.
        whole = (slot >= 0)[:, None]
        ka = load_keys(
            k_codes, k_scale, k_zero, token, group, first, whole & pair_mask, K_BITS, D
        )  # fmt: skip
        kb = load_keys(
            k_codes, k_scale, k_zero, token, group, second, whole & pair_mask, K_BITS, D
        )  # fmt: skip
        if TURN:
            start = tl.load(base + batch * max_pages + i)
            angle = (start + offset).to(tl.int64)[:, None] * (ROTARY // 2) + pair
            turned = seen[:, None] & pair_mask
            cos = tl.load(cos_ptr + angle, mask=turned, other=0.0)
            sin = tl.load(sin_ptr + angle, mask=turned, other=0.0)
            ka, kb = ka * cos - kb * sin, kb * cos + ka * sin
        score = tl.dot(qa, tl.trans(ka.to(qa.dtype)), input_precision=PRECISION)
        score = tl.dot(qb, tl.trans(kb.to(qb.dtype)), score, input_precision=PRECISION)
        if ROTARY < D:
            kept = load_keys(
                k_codes, k_scale, k_zero, token, group, rest, whole & (rest < D), K_BITS, D
            )  # fmt: skip
            score = tl.dot(q_rest, tl.trans(kept.to(qa.dtype)), score, input_precision=PRECISION)
        v_mask = whole & (channel < D)
        v = load_values(v_codes, v_scale, v_zero, token, channel, v_mask, V_BITS, D)
        acc, row_max, row_sum = _fold(
            acc, row_max, row_sum, score * scale_log2, seen, v.to(qa.dtype), PRECISION
        )  # fmt: skip

    near = tl.load(near_counts + batch)
    for start in range(0, tl.where(share == n_shares, near, 0), 32):
        seen = start + slot < near
        at = ((batch * n_kv + head) * near_slots + start + slot)[:, None] * D + channel
        mask = seen[:, None] & (channel < D)
        k = tl.load(near_k + at, mask=mask, other=0.0)
        v = tl.load(near_v + at, mask=mask, other=0.0)
        score = tl.dot(q_all, tl.trans(k), input_precision=PRECISION) * scale_log2
        acc, row_max, row_sum = _fold(acc, row_max, row_sum, score, seen, v, PRECISION)

    empty = row_sum == 0.0
    total = tl.where(empty, 1.0, row_sum)
    out = share.to(tl.int64) * n_rows + q_at
    lse = tl.where(empty, float("-inf"), row_max + tl.log2(total))
    tl.store(lse_ptr + out, lse, mask=live)
    mask = live[:, None] & (channel < D)
    tl.store(part_ptr + out[:, None] * D + channel, acc / total[:, None], mask=mask)


def decode_quantised(
    q: Tensor,
    pool: PagePool,
    table: PageTable,
    window: Window,
    scale: float,
    cos_table: Tensor | None = None,
    sin_table: Tensor | None = None,
    interleaved: bool = False,
) -> Tensor:
    """`decode_reference.decode_quantised` on the GPU; same arguments, same result.

    Raises:
        ValueError: shapes do not fit, or half of the channels or of the rotated pairs is under 16.
    """
    check_decode(q, pool, table, window)
    (batch, heads, d), hk = q.shape, pool.k.codes.shape[1]
    pairs = d // 2 if cos_table is None else cos_table.shape[1]
    if pairs < 16 or (cos_table is None) != (sin_table is None) or 2 * pairs > d:
        raise ValueError(
            f"need both tables or none, and 16 <= R/2 <= D/2; got R/2={pairs}, D={d}: "
            "smaller models use decode_reference"
        )
    out = torch.empty_like(q)
    if not batch:
        return out
    max_pages = table.pages.shape[1]
    shares = -(-2 * processors() // (batch * hk))
    shares = max(1, min(shares, max_pages // 4, MAX_SPLITS - 1))
    part = torch.empty(shares + 1, batch, heads, d, dtype=torch.float32, device=q.device)
    lse = torch.empty(shares + 1, batch, heads, dtype=torch.float32, device=q.device)
    d_pad = triton.next_power_of_2(d)
    decode_kernel[(shares + 1, hk, batch)](
        q.contiguous(), pool.k.codes, pool.k.scale, pool.k.zero, pool.v.codes, pool.v.scale,
        pool.v.zero, pool.offsets, table.pages, table.base, table.counts,
        q if cos_table is None else cos_table, q if sin_table is None else sin_table,
        window.k.contiguous(), window.v.contiguous(), window.counts, part, lse,
        heads, hk, max_pages, window.k.shape[2], shares, batch * heads, scale * LOG2E,
        K_BITS=pool.k.bits, V_BITS=pool.v.bits, G=heads // hk,
        ROWS=max(16, triton.next_power_of_2(heads // hk)), D=d, D_PAD=d_pad, ROTARY=2 * pairs,
        PAIRS_PAD=triton.next_power_of_2(pairs),
        PASS_PAD=max(16, triton.next_power_of_2(d - 2 * pairs)),
        TURN=cos_table is not None, INTERLEAVED=interleaved,
        PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32", num_warps=4, num_stages=2,
    )  # fmt: skip
    merge_kernel[(batch * heads,)](
        part, lse, out, batch * heads, shares + 1,
        D=d, D_PAD=d_pad, SPLITS=triton.next_power_of_2(shares + 1), num_warps=4,
    )  # fmt: skip
    return out
