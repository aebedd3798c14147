"""The maths of the kernels in plain torch: what Triton is tested against, and the CPU path.

Shapes: ``n`` tokens, ``H`` query heads, ``HK`` key/value heads (``H = G * HK``; query head ``h``
reads key head ``h // G``), ``D`` head dim. New tokens arrive token-major ``[n, heads, D]``; KV
buffers are head-major ``[HK, n_slots, D]`` and slot ``j`` holds the token at position ``j``. The
packed format is in ``packing.py``, decode attention over it in ``decode_reference.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.ops import QUERY_BLOCK
from .key_bitmap import KeyBitmap
from .packing import Packed, unpack

# Tokens at a time, so that what lies between two steps stays in the CPU's cache.
RESTORE_BLOCK = 512


def rope_tables(
    inv_freq: Tensor, positions: Tensor, attention_scaling: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of ``position * inv_freq``, in fp32 as Hugging Face forms the angle.

    One column per rotated *pair*: column ``i`` turns channels ``(i, i + R/2)`` in the halves layout
    and ``(2i, 2i + 1)`` in the interleaved one. (A Hugging Face table is this one twice, side by
    side: take ``cos_hf[:, : R // 2]``.)

    Args:
        inv_freq: ``[R/2]``, radians per position, scaling of the RoPE kind included.
        positions: ``[n]`` integers.
        attention_scaling: YaRN's factor, multiplied into both tables.

    Returns:
        ``(cos, sin)``, each fp32 ``[n, R/2]``.
    """
    angle = positions.to(torch.float32)[:, None] * inv_freq.to(torch.float32)[None, :]
    return angle.cos() * attention_scaling, angle.sin() * attention_scaling


def apply_rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    rotary_dim: int | None = None,
) -> Tensor:
    """Rotate the first ``rotary_dim`` channels of ``x``; the others pass unchanged.

    Args:
        x: ``[n, heads, D]``.
        cos, sin: fp32 ``[n, R/2]`` of `rope_tables`, row ``i`` for token ``i``.
        interleaved: pairs are neighbours (GPT-J) instead of halves (NeoX, Llama).
        rotary_dim: ``R``; by default twice the tables' width.

    Returns:
        ``[n, heads, D]`` in ``x.dtype``; the arithmetic is fp32, rounded once.

    Raises:
        ValueError: ``R`` is odd, wider than ``D``, or does not fit the tables.
    """
    r = 2 * cos.shape[-1] if rotary_dim is None else rotary_dim
    if r % 2 or r > x.shape[-1] or cos.shape != sin.shape or cos.shape[-1] != r // 2:
        raise ValueError(
            f"rotary_dim must be even, at most D, and twice the tables' width; got rotary_dim={r}, "
            f"D={x.shape[-1]}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}: "
            "build the tables with rope_tables from this model's inv_freq"
        )
    if cos.shape[0] != x.shape[0]:
        raise ValueError(
            f"one table row per token: x has {x.shape[0]} tokens, the tables {cos.shape[0]} rows; "
            "index the tables with the tokens' positions first"
        )
    first, second = (
        (slice(0, r, 2), slice(1, r, 2)) if interleaved else (slice(0, r // 2), slice(r // 2, r))
    )
    c, s = cos[:, None, :], sin[:, None, :]
    y = x.float()
    out = torch.empty_like(y)
    torch.mul(y[..., first], c, out=out[..., first]).addcmul_(y[..., second], s, value=-1)
    torch.mul(y[..., second], c, out=out[..., second]).addcmul_(y[..., first], s)
    out[..., r:] = y[..., r:]
    return out.to(x.dtype)


def restore(
    k_raw: Tensor,
    v_raw: Tensor,
    positions: Tensor,
    k_out: Tensor,
    v_out: Tensor,
    *,
    cos_table: Tensor | None = None,
    sin_table: Tensor | None = None,
    inv_freq: Tensor | None = None,
    attention_scaling: float = 1.0,
    interleaved: bool = False,
) -> None:
    """Rotate stored keys at their new positions and put K and V into their slots, in place.

    Args:
        k_raw, v_raw: ``[n, HK, D]``, also ``float8_e4m3fn``; K before RoPE.
        positions: int64 ``[n]``, each once, in any order: the slot and the angle. Rows whose
            position is negative only fill up a group, and are left out.
        k_out, v_out: ``[HK, n_slots, D]``; slot ``positions[i]`` receives token ``i``.
        cos_table, sin_table: fp32 ``[> max position, R/2]``, indexed by position; or
        inv_freq: ``[R/2]``, from which the needed rows are computed here.

    Raises:
        ValueError: both or neither of the tables and ``inv_freq``, or shapes disagree.
    """
    if (inv_freq is None) == (cos_table is None) or (cos_table is None) != (sin_table is None):
        raise ValueError("give either cos_table and sin_table, or inv_freq, not both or neither")
    hk, _, d = k_out.shape
    if k_raw.shape != (positions.numel(), hk, d) or v_raw.shape != k_raw.shape:
        raise ValueError(
            f"k_raw and v_raw must be [n, HK, D] = {(positions.numel(), hk, d)} to fit positions "
            f"and k_out; got {tuple(k_raw.shape)}, {tuple(v_raw.shape)}: transpose to token-major"
        )
    for start in range(0, positions.numel(), RESTORE_BLOCK):
        part = slice(start, start + RESTORE_BLOCK)
        at, k, v = positions[part], _wide(k_raw[part]), _wide(v_raw[part])
        if bool((at < 0).any()):
            there = (at >= 0).nonzero().flatten()
            at, k, v = at[there], k[there], v[there]
        if inv_freq is not None:
            cos, sin = rope_tables(inv_freq, at, attention_scaling)
        else:
            assert cos_table is not None and sin_table is not None  # as checked above
            cos, sin = cos_table.index_select(0, at), sin_table.index_select(0, at)
        _scatter(k_out, at, apply_rope(k, cos, sin, interleaved).to(k_out.dtype))
        _scatter(v_out, at, v.to(v_out.dtype))


def _wide(x: Tensor) -> Tensor:
    """FP8 as fp32, so that what is rotated is rounded once."""
    return x.float() if x.dtype == torch.float8_e4m3fn else x


def _scatter(out: Tensor, at: Tensor, rows: Tensor) -> None:
    """``out[:, at] = rows``, in 16-byte words where they fit: two to four times faster."""
    if all(_fits_words(x) for x in (out, rows)):
        out, rows = out.view(torch.complex128), rows.view(torch.complex128)
    out.index_copy_(1, at, rows.transpose(0, 1))


def _fits_words(x: Tensor) -> bool:
    per_word = 16 // x.element_size()
    steps = (x.shape[-1], x.storage_offset(), *x.stride()[:-1])
    return x.stride(-1) == 1 and not any(step % per_word for step in steps)


class RopeArguments(TypedDict, total=False):
    """How `restore` rotates: its keyword arguments."""

    cos_table: Tensor | None
    sin_table: Tensor | None
    inv_freq: Tensor | None
    attention_scaling: float
    interleaved: bool


def restore_quantised(
    k: Packed,
    v: Packed,
    positions: Tensor,
    k_out: Tensor,
    v_out: Tensor,
    **rope: Unpack[RopeArguments],
) -> None:
    """`restore` from packed K (pre-RoPE, per channel) and packed V (per token).

    Dequantised values stay fp32 until after the rotation, so each is rounded once.
    """
    for start in range(0, positions.numel(), RESTORE_BLOCK):
        stop = min(start + RESTORE_BLOCK, positions.numel())
        k_raw, v_raw = (unpack(x.tokens(start, stop)) for x in (k, v))
        restore(k_raw, v_raw, positions[start:stop], k_out, v_out, **rope)


class Seen(NamedTuple):
    """What a block of queries sees: keys ``first`` to ``last - 1``, where ``mask`` is set."""

    start: int
    stop: int
    first: int
    last: int
    mask: Tensor | None
    """bool ``[(stop - start) * G, last - first]``; None: all of them."""
    empty: Tensor | None
    """bool ``[stop - start]``, queries that see no key; None: there are none."""


def seen_blocks(
    positions: Tensor, slot: Tensor, group: int, window: int | None = None
) -> Iterator[Seen]:
    """`QUERY_BLOCK` queries after the other, those that see no key at all left out.

    Args:
        positions: int64 ``[n_q]``, ascending.
        slot: int64 ``[n]``, ascending: the positions of the keys.
        group: ``G``, query heads of a key head.
        window: see `sparse_attention`.

    Raises:
        ValueError: positions are not sorted.
    """
    if bool((positions[1:] < positions[:-1]).any()):
        raise ValueError(
            "positions must be ascending integers, one per query: sort them with torch.sort, "
            "apply its indices to q, and undo them on the output"
        )
    for start in range(0, positions.numel(), QUERY_BLOCK):
        pos = positions[start : start + QUERY_BLOCK]
        first, last = 0, int(torch.searchsorted(slot, pos[-1:], right=True))
        if window:
            first = int(torch.searchsorted(slot, pos[:1] - window, right=True))
        if last <= first:
            continue
        seen = slot[first:last] <= pos[:, None]
        if window:
            seen &= slot[first:last] > pos[:, None] - window
        mask = empty = None
        if not bool(seen.all()):
            none = ~seen.any(1)
            if bool(none.any()):  # such a row sees all for now; a mask of nothing gives NaN
                empty, seen = none, seen | none[:, None]
            mask = seen.repeat_interleave(group, 0)
        yield Seen(start, start + pos.numel(), first, last, mask, empty)


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    n_keys: int,
    scale: float,
    window: int | None = None,
    holes: KeyBitmap | None = None,
    seen: Iterable[Seen] | None = None,
) -> Tensor:
    """Selected queries attend to the full KV buffer, causal by *position*, not by row.

    The query at position ``p`` sees keys ``j`` with ``p - window < j <= p`` and ``j < n_keys``.

    Args:
        q: ``[n_q, H, D]``, after RoPE.
        k, v: ``[HK, n_slots, D]``, K after RoPE. Every slot up to the last position in use must be
            finite, also for the queries before it (0 * NaN is NaN), unless it is a hole.
        positions: int64 ``[n_q]``, sorted ascending.
        n_keys: slots in use.
        scale: multiplies the scores, usually ``D ** -0.5``.
        window: keys seen at most, the query's own included; ``None`` for all.
        holes: keys whose bit is 0 are left out of attention. ``None``: no holes.
        seen: `seen_blocks` of these positions and slots ``0 .. n_keys - 1``, where another layer
            has them already; without holes.

    Returns:
        ``[n_q, H, D]`` in ``q.dtype``. A query that sees no key gives 0.

    Raises:
        ValueError: heads do not divide, shapes disagree, or positions are not sorted.
    """
    (n_q, h, d), hk = q.shape, k.shape[0]
    if (
        h % hk
        or k.shape != v.shape
        or k.shape[2] != d
        or n_keys > k.shape[1]
        or positions.shape != (n_q,)
    ):
        raise ValueError(
            "need H a multiple of HK, k and v of one shape, n_keys <= n_slots and a position for "
            f"each query; got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, "
            f"n_keys={n_keys}, positions {tuple(positions.shape)}"
        )
    if seen is None:
        slot = torch.arange(n_keys, device=q.device)
        if holes is not None:
            # Compressed, because a slot left out may hold NaN, which a mask would let through.
            slot = slot[holes.kept()[:n_keys]]
            k, v = k.index_select(1, slot), v.index_select(1, slot)
        seen = seen_blocks(positions, slot, h // hk, window)
    out = q.new_zeros(n_q, h, d)
    for block in seen:
        keys, values = k[:, block.first : block.last], v[:, block.first : block.last]
        out[block.start : block.stop] = _attend(
            q[block.start : block.stop], keys, values, block, scale
        )
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, block: Seen, scale: float) -> Tensor:
    """One query block ``[m, H, D]`` over its keys ``[HK, n, D]``."""
    (m, h, d), hk = q.shape, k.shape[0]
    # The G query heads of a key head become rows: one pass over its keys, 10x faster for one query.
    rows = q.view(m, hk, h // hk, d).transpose(0, 1).reshape(1, hk, m * (h // hk), d)
    with _planned_nowhere() if rows.is_cuda else nullcontext():
        out = F.scaled_dot_product_attention(
            rows, k[None], v[None], attn_mask=block.mask, scale=scale
        )
    out = out.view(hk, m, h // hk, d).transpose(0, 1).reshape(m, h, d)
    return out if block.empty is None else out.masked_fill_(block.empty[:, None, None], 0.0)


def _planned_nowhere() -> AbstractContextManager[None]:
    """Without cuDNN, which plans for each length of keys, and not for every one."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def deviation(k_new: Tensor, k_old: Tensor) -> Tensor:
    """Squared L2 distance of each token's keys, summed over heads (CacheBlend's score).

    Args:
        k_new, k_old: ``[n, HK, D]``, both rotated at the same positions, or both before RoPE.

    Returns:
        fp32 ``[n]``.

    Raises:
        ValueError: the shapes differ.
    """
    if k_new.shape != k_old.shape:
        raise ValueError(
            f"k_new {tuple(k_new.shape)} and k_old {tuple(k_old.shape)} must have one shape: "
            "pass the same tokens of the same layer"
        )
    return (k_new.float() - k_old.float()).square_().sum((1, 2))


def top_indices(score: Tensor, count: int) -> Tensor:
    """The ``count`` largest of ``score`` ``[n]``; ties go to the lower index.

    Returns:
        int64 ``[count]``, ascending.

    Raises:
        ValueError: ``count`` is negative or larger than ``n``.
    """
    if not 0 <= count <= score.numel():
        raise ValueError(f"count must be in 0..{score.numel()}, got {count}: clamp it first")
    order = torch.sort(score, descending=True, stable=True).indices
    return order[:count].sort().values
