"""How each kernel of the registry gets its inputs, is run, and is counted.

Inputs are random, never zeros (a GPU runs zeros measurably faster), and the same for a seed on one
device; a GPU draws its own, as a CPU would take longer to draw them than all else together. On the
``meta`` device they have shapes and no data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import decode_pooled as pooled_gpu
from . import decode_quantised as decode_gpu
from . import decode_reference, packing, reference
from . import deviation as deviation_gpu
from . import gather_host as gather_gpu
from . import pack as pack_gpu
from . import restore as restore_gpu
from . import sparse_attention as sparse_gpu
from .codes import FP8
from .key_bitmap import KeyBitmap
from .tile_plan import TilePlan, plan_tiles

Inputs = dict[str, Any]
SPARE_SLOTS = 16
ROPE_BASE = 10000.0


@dataclass(frozen=True)
class Family:
    """The functions behind one kernel's cases; see `registry.KernelCase` for their contracts."""

    make: Callable[..., Inputs]
    reference: Callable[[Inputs], tuple[Tensor, ...]]
    launch: Callable[[Inputs], tuple[Tensor, ...]]
    work: Callable[..., tuple[int, int]]
    rounds: bool = True


def _random(seed: int, device: str, dtype: str, *shape: int) -> Tensor:
    kind = getattr(torch, dtype)
    if device == "meta":
        return torch.empty(shape, dtype=kind, device="meta")
    where = device if device.startswith("cuda") else "cpu"
    generator = torch.Generator(where).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=where).to(device, kind)


def _positions(n_q: int, n_keys: int, clustered: bool) -> Tensor:
    """Sorted, each once: uniform over the keys, or three quarters of them in the first eighth.

    The same for every seed, because the flops of a case depend on them.
    """
    generator = torch.Generator().manual_seed(0)
    if not clustered:
        return torch.randperm(n_keys, generator=generator)[:n_q].sort().values
    dense, edge = 3 * n_q // 4, n_keys // 8
    front = torch.randperm(edge, generator=generator)[:dense]
    back = edge + torch.randperm(n_keys - edge, generator=generator)[: n_q - dense]
    return torch.cat([front, back]).sort().values


def _kept(pos: Tensor, n_slots: int) -> Tensor:
    """bool [n_slots]: chunks of 200 keys, one in four missing, one in four with every third key;
    the first query sees nothing. The same for every seed, as the positions are."""
    chunk = torch.arange(n_slots) // 200 % 4
    kept = (chunk == 1) | (chunk == 3) | ((chunk == 2) & (torch.arange(n_slots) % 3 == 0))
    kept[: int(pos[0]) + 1] = False
    return kept


def _make_sparse(
    seed: int, device: str, *, dtype: str, n_q: int, n_keys: int, heads: int, kv_heads: int,
    head_dim: int, window: int | None = None, holes: bool = False, clustered: bool = False,
) -> Inputs:  # fmt: skip
    pos = _positions(n_q, n_keys, clustered)
    kept = _kept(pos, n_keys + SPARE_SLOTS) if holes else None
    plan = plan_tiles(pos, n_keys, heads, kv_heads, head_dim, window, dtype=getattr(torch, dtype))
    moved = {"items": plan.items.to(device), "positions": plan.positions.to(device)}
    kv = [
        _random(seed + i, device, dtype, kv_heads, n_keys + SPARE_SLOTS, head_dim) for i in (1, 2)
    ]
    if device != "meta":
        for x in kv:  # slots not in use and slots left out may hold anything
            x[:, n_keys:] = float("nan")
            if kept is not None:
                x[:, ~kept] = float("nan")
    return {
        "q": _random(seed, device, dtype, n_q, heads, head_dim),
        "k": kv[0],
        "v": kv[1],
        "positions": pos.to(device),
        "n_keys": n_keys,
        "scale": head_dim**-0.5,
        "window": window,
        "holes": None if kept is None else KeyBitmap.of(kept).to(device),
        "plan": TilePlan(**{**vars(plan), **moved}),
    }


def _sparse_reference(x: Inputs) -> tuple[Tensor, ...]:
    return (reference.sparse_attention(**{key: x[key] for key in x if key != "plan"}),)


def _sparse_work(
    *, dtype: str, n_q: int, n_keys: int, heads: int, kv_heads: int, head_dim: int,
    window: int | None = None, holes: bool = False, clustered: bool = False,
) -> tuple[int, int]:  # fmt: skip
    pos = _positions(n_q, n_keys, clustered)
    kept = _kept(pos, n_keys) if holes else torch.ones(n_keys, dtype=torch.bool)
    before = torch.nn.functional.pad(kept.cumsum(0), (1, 0))
    seen = before[pos + 1] - before[(pos + 1 - (window or n_keys)).clamp(min=0)]
    size = getattr(torch, dtype).itemsize
    moved = 2 * size * head_dim * (int(kept.sum()) * kv_heads + n_q * heads)
    return moved, 4 * head_dim * heads * int(seen.sum())


def _make_restore(
    seed: int, device: str, *, dtype: str, n: int, kv_heads: int, head_dim: int, k_bits: int,
    v_bits: int, rotary_dim: int | None = None, interleaved: bool = False, chunk: int | None = None,
) -> Inputs:  # fmt: skip
    slots = n + SPARE_SLOTS
    pairs = (rotary_dim or head_dim) // 2
    inv_freq = ROPE_BASE ** -(torch.arange(pairs) / pairs)
    tables = reference.rope_tables(inv_freq, torch.arange(slots))
    order = torch.randperm(slots, generator=torch.Generator().manual_seed(seed))
    order[:n][~_filled(n, chunk)] = -1
    shape = (n, kv_heads, head_dim)
    values = [_random(seed + i, device, dtype, *shape) for i in (1, 2)]
    return {
        "k": _stored(values[0], k_bits, "channel"),
        "v": _stored(values[1], v_bits, "token"),
        "positions": order[:n].to(device),
        "k_out": _random(seed + 3, device, dtype, kv_heads, slots, head_dim),
        "v_out": _random(seed + 4, device, dtype, kv_heads, slots, head_dim),
        "cos_table": tables[0].to(device),
        "sin_table": tables[1].to(device),
        "interleaved": interleaved,
    }


def _filled(n: int, chunk: int | None) -> Tensor:
    """bool [n]: rows that hold a token, where each chunk's are filled up to whole groups."""
    size = chunk or n
    return torch.arange(n) % (-(-size // packing.GROUP) * packing.GROUP) < size


def _stored(x: Tensor, bits: int, per: packing.Per) -> Tensor | packing.Packed:
    """As a store would keep it: values, fp8 with every magnitude it has, or packed."""
    if bits == FP8:
        spread = x.float() * torch.exp2(16 * x.float().frac() - 8)
        return spread.clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    if bits == 16:
        return x
    return (_meta_pack if x.device.type == "meta" else packing.pack)(x, bits, per)


def _meta_pack(x: Tensor, bits: int, per: packing.Per) -> packing.Packed:
    n, hk, d = x.shape
    groups = (-(-n // 32), hk, d) if per == "channel" else (n, hk, -(-d // 32))
    codes = torch.empty(n, hk, d * bits // 8, dtype=torch.uint8, device="meta")
    scale = torch.empty(groups, dtype=torch.float16, device="meta")
    return packing.Packed(codes, scale, scale, bits, per, d)


def _restore_reference(x: Inputs) -> tuple[Tensor, ...]:
    k_out, v_out = x["k_out"].clone(), x["v_out"].clone()
    k, v = (t if isinstance(t, Tensor) else packing.unpack(t) for t in (x["k"], x["v"]))
    rope = {key: x[key] for key in ("cos_table", "sin_table", "interleaved")}
    reference.restore(k.float(), v.float(), x["positions"], k_out, v_out, **rope)
    return k_out, v_out


def _restore_launch(x: Inputs) -> tuple[Tensor, ...]:
    restore_gpu.restore(**x)
    return x["k_out"], x["v_out"]


def _restore_work(
    *, dtype: str, n: int, kv_heads: int, head_dim: int, k_bits: int, v_bits: int,
    rotary_dim: int | None = None, interleaved: bool = False, chunk: int | None = None,
) -> tuple[int, int]:  # fmt: skip
    n = int(_filled(n, chunk).sum())
    size, values = getattr(torch, dtype).itemsize, n * kv_heads * head_dim
    read = sum(_stored_bytes(values, bits, size) for bits in (k_bits, v_bits))
    tables = 4 * n * (rotary_dim or head_dim)
    return read + 2 * size * values + tables + 8 * n, 3 * n * kv_heads * (rotary_dim or head_dim)


def _stored_bytes(values: int, bits: int, size: int) -> int:
    if bits in (16, FP8):
        return values * (size if bits == 16 else 1)
    return values * bits // 8 + values // 8


def _make_pack(
    seed: int, device: str, *, dtype: str, n: int, kv_heads: int, head_dim: int, bits: int, per: str
) -> Inputs:
    x = _random(seed, device, dtype, n, kv_heads, head_dim)
    if device != "meta":
        # One head on half steps of a scale of exactly 1, where rounding to even shows.
        levels = 2**bits - 1
        half = (x[:, 0].float() * levels).round().abs().remainder(2 * levels) / 2
        half[0::32], half[:, 0::32] = 0.0, 0.0
        half[1::32], half[:, 1::32] = float(levels), float(levels)
        x[:, 0] = half.to(x.dtype)
    return {"x": x, "bits": bits, "per": per}


def _pack_work(
    *, dtype: str, n: int, kv_heads: int, head_dim: int, bits: int, per: str
) -> tuple[int, int]:
    values, size = n * kv_heads * head_dim, getattr(torch, dtype).itemsize
    return values * size + _stored_bytes(values, bits, size), 6 * values


def _fields(p: packing.Packed) -> tuple[Tensor, ...]:
    return p.codes, p.scale, p.zero


def _make_deviation(
    seed: int, device: str, *, dtype: str, n: int, kv_heads: int, head_dim: int
) -> Inputs:
    first, second = (_random(seed + i, device, dtype, n, kv_heads, head_dim) for i in (0, 1))
    return {"k_new": first, "k_old": second}


def _deviation_work(*, dtype: str, n: int, kv_heads: int, head_dim: int) -> tuple[int, int]:
    values = n * kv_heads * head_dim
    return 2 * values * getattr(torch, dtype).itemsize + 4 * n, 3 * values


def _make_decode(
    seed: int, device: str, *, dtype: str, batch: int, pages: int, heads: int, kv_heads: int,
    head_dim: int, k_bits: int, v_bits: int, window: int, turn: bool = True,
    rotary_dim: int | None = None, interleaved: bool = False,
) -> Inputs:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    pool, shape = 2 * pages, (64 * pages, kv_heads, head_dim)
    pack = _meta_pack if device == "meta" else packing.pack
    pages_of = [torch.randperm(pool, generator=generator)[:pages] for _ in range(batch)]
    offsets = torch.arange(32).repeat(pool, 1)
    offsets[1::3, 5::7] = -1  # slots without a token
    if pages > 1:
        offsets[pages_of[0][0]] = -1  # and a page without any, which its sequence sees first
    counts = pages - torch.arange(batch) % 3
    counts[-1] = pages if batch == 1 else 0
    near = (window - torch.arange(batch)).clamp(min=0)
    near[-1] *= batch == 1  # with no page either: a sequence that sees nothing
    pairs = (rotary_dim or head_dim) // 2
    inv_freq = ROPE_BASE ** -(torch.arange(pairs) / pairs)
    tables = reference.rope_tables(inv_freq, torch.arange(32 * pages))
    base = 32 * torch.arange(pages).repeat(batch, 1)

    def whole(x: Tensor) -> Tensor:
        return x.to(device, torch.int32).contiguous()

    shape_near = (batch, kv_heads, window, head_dim)
    k_near, v_near = (_random(seed + i, device, dtype, *shape_near) for i in (3, 4))
    return {
        "q": _random(seed, device, dtype, batch, heads, head_dim),
        "pool": decode_reference.PagePool(
            pack(_random(seed + 1, device, dtype, *shape), k_bits, "channel"),
            pack(_random(seed + 2, device, dtype, *shape), v_bits, "token"),
            whole(offsets),
        ),
        "table": decode_reference.PageTable(
            whole(torch.stack(pages_of)), whole(base), whole(counts)
        ),
        "window": decode_reference.Window(k_near, v_near, whole(near)),
        "scale": head_dim**-0.5,
        "cos_table": tables[0].to(device) if turn else None,
        "sin_table": tables[1].to(device) if turn else None,
        "interleaved": interleaved,
    }


def _decode_work(
    *, dtype: str, batch: int, pages: int, heads: int, kv_heads: int, head_dim: int, k_bits: int,
    v_bits: int, window: int, turn: bool = True, rotary_dim: int | None = None,
    interleaved: bool = False,
) -> tuple[int, int]:  # fmt: skip
    size, tokens = getattr(torch, dtype).itemsize, 32 * batch * pages
    values = tokens * kv_heads * head_dim
    moved = sum(_stored_bytes(values, bits, size) for bits in (k_bits, v_bits))
    moved += 2 * size * batch * head_dim * (window * kv_heads + heads)
    return moved, 4 * heads * head_dim * (tokens + batch * window)


def _make_pooled(
    seed: int, device: str, *, dtype: str, batch: int, n_keys: int, heads: int, kv_heads: int,
    head_dim: int, window: int | None = None,
) -> Inputs:  # fmt: skip
    """Lengths fall from `n_keys`; with several requests the last sees nothing."""
    lengths = n_keys - (n_keys // (2 * batch)) * torch.arange(batch)
    lengths[-1] = n_keys if batch == 1 else 0
    room = n_keys + SPARE_SLOTS
    base = room * torch.randperm(batch, generator=torch.Generator().manual_seed(0))
    kv = [_random(seed + i, device, dtype, kv_heads, batch * room, head_dim) for i in (1, 2)]
    if device != "meta":
        slot = torch.arange(batch * room)
        used = ((slot >= base[:, None]) & (slot < (base + lengths)[:, None])).any(0)
        for x in kv:
            x[:, ~used] = float("nan")
    return {
        "q": _random(seed, device, dtype, batch, heads, head_dim),
        "k": kv[0],
        "v": kv[1],
        "base": base.to(device),
        "n_keys": lengths.to(device, torch.int32),
        "scale": head_dim**-0.5,
        "window": window,
    }


def _pooled_work(
    *, dtype: str, batch: int, n_keys: int, heads: int, kv_heads: int, head_dim: int,
    window: int | None = None,
) -> tuple[int, int]:  # fmt: skip
    lengths = n_keys - (n_keys // (2 * batch)) * torch.arange(batch)
    lengths[-1] = n_keys if batch == 1 else 0
    seen = int(lengths.clamp(max=window or n_keys).sum())
    size = getattr(torch, dtype).itemsize
    return 2 * size * head_dim * (seen * kv_heads + batch * heads), 4 * head_dim * heads * seen


def _make_gather(seed: int, device: str, *, dtype: str, n: int, row_bytes: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    host = "meta" if device == "meta" else "cpu"
    words = torch.empty(2 * n, row_bytes, dtype=getattr(torch, dtype), device=host)
    if host == "cpu":
        words.random_(0, 256, generator=generator)
    return {
        "source": words.pin_memory() if device.startswith("cuda") else words,
        "rows": torch.randperm(2 * n, generator=generator)[:n],
        "out": torch.zeros(n, row_bytes, dtype=words.dtype, device=device),
        "path": "kernel",
    }


def _gather_launch(x: Inputs) -> tuple[Tensor, ...]:
    gather_gpu.gather_host(**x)
    return (x["out"],)


def _gather_work(*, dtype: str, n: int, row_bytes: int) -> tuple[int, int]:
    return 2 * n * row_bytes, 0


FAMILIES = {
    "sparse_attention": Family(
        _make_sparse,
        _sparse_reference,
        lambda x: (sparse_gpu.sparse_attention(**x),),
        _sparse_work,
    ),
    "restore": Family(_make_restore, _restore_reference, _restore_launch, _restore_work),
    "pack": Family(
        _make_pack,
        lambda x: _fields(packing.pack(**x)),
        lambda x: _fields(pack_gpu.pack(**x)),
        _pack_work,
        rounds=False,
    ),
    "deviation": Family(
        _make_deviation,
        lambda x: (reference.deviation(**x),),
        lambda x: (deviation_gpu.deviation(**x),),
        _deviation_work,
    ),
    "decode_quantised": Family(
        _make_decode,
        lambda x: (decode_reference.decode_quantised(**x),),
        lambda x: (decode_gpu.decode_quantised(**x),),
        _decode_work,
    ),
    "decode_pooled": Family(
        _make_pooled,
        lambda x: (decode_reference.decode_pooled(**x),),
        lambda x: (pooled_gpu.decode_pooled(**x),),
        _pooled_work,
    ),
    "gather_host": Family(
        _make_gather,
        lambda x: (x["source"][x["rows"]].to(x["out"].device),),
        _gather_launch,
        _gather_work,
        rounds=False,
    ),
}
