"""Decode attention over packed pages in plain torch: one query token per sequence.

A page is 32 tokens, one quantisation group, so a pool of ``P`` pages is a pair of `Packed` with
``32 * P`` tokens. Within a chunk the tokens may be in any order: attention of the newest token does
not depend on it, and each token carries its position. A page is shared by every sequence that uses
its chunk; where the chunk begins in a sequence is that sequence's ``base``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .packing import GROUP, Packed, unpack
from .reference import apply_rope


@dataclass(frozen=True)
class PagePool:
    """Packed pages, shared by all sequences.

    Attributes:
        k: per channel, ``32 * P`` tokens; before RoPE if the decode is given tables.
        v: per token, ``32 * P`` tokens.
        offsets: int32 ``[P, 32]``, position of each token within its chunk; -1 for an empty slot
            or a token that this pool does not serve (recomputed elsewhere).
    """

    k: Packed
    v: Packed
    offsets: Tensor


@dataclass(frozen=True)
class PageTable:
    """Which pages each of ``B`` sequences reads.

    Attributes:
        pages, base: int32 ``[B, max_pages]``: page, and position of its chunk's first token.
        counts: int32 ``[B]``, pages in use.
    """

    pages: Tensor
    base: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Window:
    """Full-precision KV of suffix and generated tokens.

    Attributes:
        k, v: ``[B, HK, W, D]``, K after RoPE.
        counts: int32 ``[B]``, slots in use.
    """

    k: Tensor
    v: Tensor
    counts: Tensor


def partial_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention over some of the keys and the log of its softmax denominator.

    Args:
        q: ``[H, D]``; k, v: ``[n, HK, D]``.

    Returns:
        fp32 ``[H, D]`` and ``[H]``; 0 and -inf where there is no key.
    """
    group = q.shape[0] // k.shape[1]
    k, v = (x.float().repeat_interleave(group, 1) for x in (k, v))
    score = torch.einsum("hd,nhd->hn", q.float(), k) * scale
    lse = score.logsumexp(1)
    weight = (score - lse.clamp(min=torch.finfo(torch.float32).min)[:, None]).exp()
    return torch.einsum("hn,nhd->hd", weight, v), lse


def merge_parts(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join `partial_attention` results over disjoint keys into the one over all of them."""
    out, lse = torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts])
    total = lse.logsumexp(0)
    weight = (lse - total.clamp(min=torch.finfo(torch.float32).min)).exp()
    return (out * weight[..., None]).sum(0), total


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
    """Each sequence's query attends to its packed pages and its full-precision window.

    Args:
        q: ``[B, H, D]`` after RoPE; it sees every key it is given.
        cos_table, sin_table: fp32 ``[> max position, R/2]`` if K is stored before RoPE.

    Returns:
        ``[B, H, D]`` in ``q.dtype``; 0 for a sequence without keys.

    Raises:
        ValueError: shapes do not fit.
    """
    check_decode(q, pool, table, window)
    out = torch.zeros_like(q)
    for i in range(q.shape[0]):
        pages = table.pages[i, : int(table.counts[i])].long()
        offset = pool.offsets[pages]
        filled = (offset >= 0).flatten()
        position = (offset + table.base[i, : pages.numel(), None]).flatten()[filled].long()
        k, v = (unpack(_take(x, pages))[filled] for x in (pool.k, pool.v))
        if cos_table is not None and sin_table is not None:
            k = apply_rope(k, cos_table[position], sin_table[position], interleaved)
        recent = slice(0, int(window.counts[i]))
        near_k, near_v = (x[i, :, recent].transpose(0, 1) for x in (window.k, window.v))
        parts = [partial_attention(q[i], k, v, scale)]
        parts.append(partial_attention(q[i], near_k, near_v, scale))
        out[i] = merge_parts(parts)[0].to(q.dtype)
    return out


def _take(packed: Packed, pages: Tensor) -> Packed:
    token = (pages[:, None] * GROUP + torch.arange(GROUP, device=pages.device)).flatten()
    group = pages if packed.per == "channel" else token
    return Packed(
        packed.codes[token],
        packed.scale[group],
        packed.zero[group],
        packed.bits,
        packed.per,
        packed.head_dim,
    )


def check_decode(q: Tensor, pool: PagePool, table: PageTable, window: Window) -> None:
    """Refuse inputs whose shapes contradict each other (ValueError)."""
    (batch, heads, d), (tokens, hk) = q.shape, pool.k.codes.shape[:2]
    facts = {
        "pool.k is packed per channel": pool.k.per == "channel",
        "pool.v is packed per token": pool.v.per == "token",
        "head dims of q, pool and window agree": d == pool.k.head_dim == pool.v.head_dim,
        "H is a multiple of HK": heads % hk == 0,
        "pool.v has pool.k's tokens and heads": pool.v.codes.shape[:2] == (tokens, hk),
        "the pool is whole pages": math.prod(pool.offsets.shape) == tokens and tokens % GROUP == 0,
        "table has one row per query": table.pages.shape == table.base.shape
        and table.pages.shape[0] == batch == table.counts.numel() == window.counts.numel(),
        "window is [B, HK, W, D]": window.k.shape == window.v.shape
        and window.k.shape[:2] == (batch, hk)
        and window.k.shape[3] == d,
    }
    broken = [rule for rule, holds in facts.items() if not holds]
    if broken:
        raise ValueError(
            f"decode inputs contradict each other: not true that {'; '.join(broken)} "
            f"(q {tuple(q.shape)}, pool {tokens} tokens of {hk} heads, pages "
            f"{tuple(table.pages.shape)}, window {tuple(window.k.shape)}): "
            "see PagePool, PageTable and Window"
        )


def decode_pooled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    base: Tensor,
    n_keys: Tensor,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """One query per request over a buffer that all requests share. Reads nothing on the host.

    Args:
        q: ``[B, H, D]``, after RoPE.
        k, v: ``[HK, n_slots, D]``, K after RoPE; request ``i`` has the slots from ``base[i]`` on.
        base: integers ``[B]``.
        n_keys: integers ``[B]``, slots in use, the query's own included; 0 gives 0.
        scale: multiplies the scores.
        window: keys seen at most; ``None`` for all.

    Returns:
        ``[B, H, D]`` in ``q.dtype``; the arithmetic is fp32.
    """
    (b, h, d), (hk, n_slots, _) = q.shape, k.shape
    slot = torch.arange(n_slots, device=q.device)
    first, end = base[:, None], (base + n_keys)[:, None]
    if window is not None:
        first = torch.maximum(first, end - window)
    seen = (slot >= first) & (slot < end)
    # Slots that nobody uses may hold NaN, which a weight of 0 would let through.
    values = v.float().masked_fill(~seen.any(0)[None, :, None], 0.0)
    score = torch.einsum("bkgd,knd->bkgn", q.float().view(b, hk, h // hk, d), k.float()) * scale
    score = score.masked_fill(~seen[:, None, None], -math.inf)
    top = score.amax(-1, keepdim=True)
    weight = (score - torch.where(top == -math.inf, 0.0, top)).exp()
    total = weight.sum(-1, keepdim=True)
    out = torch.einsum("bkgn,knd->bkgd", weight / torch.where(total == 0, 1.0, total), values)
    return out.reshape(b, h, d).to(q.dtype)
