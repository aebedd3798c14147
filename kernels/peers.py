"""What else computes a case's result: the operators that PyTorch offers, compiled or not.

A peer gets the case's inputs and prepares what it may have ready beforehand (layouts, masks,
expanded heads: always in its favour); only the returned action is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import packing, reference
from .registry import KernelCase

Inputs = dict[str, Any]
Action = Callable[[], tuple[Tensor, ...]]

MASK_ELEMENTS_MAX = 1 << 28
"""Dense masks grow with queries x keys; beyond this one alone is 256 MiB."""
COMPILED_QUERIES = 512
FLEX = "flex_attention, positions"


@dataclass(frozen=True)
class Peer:
    """One rival. `same`: it computes the case's result; else `work` is its own bytes and flops.
    `compiled`: by PyTorch's compiler, which takes its time and may round otherwise."""

    prepare: Callable[[Inputs], Action]
    same: bool = True
    work: tuple[int, int] | None = None
    compiled: bool = False


def peers_of(case: KernelCase, device: str, *, compiled: bool = True) -> dict[str, Peer]:
    """Peers of a case that can run on `device`, by name."""
    moved = Peer(lambda x: _copy(case.bytes // 2, device), same=False, work=(case.bytes, 0))
    found = BY_KERNEL[case.kernel](case, device.startswith("cuda"))
    found = {name: peer for name, peer in found.items() if compiled or not peer.compiled}
    return {**found, "copy of as many bytes": moved}


def _copy(n_bytes: int, device: str) -> Action:
    source = torch.randint(0, 255, (n_bytes,), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return lambda: (target.copy_(source),)


# Attention


def _sparse(case: KernelCase, on_gpu: bool) -> dict[str, Peer]:
    n_q, n_keys = case.shapes["n_q"], case.shapes["n_keys"]
    found = {}
    if n_q * n_keys <= MASK_ELEMENTS_MAX:
        found["sdpa, dense mask"] = Peer(_sdpa_mask)
    found[FLEX] = Peer(_flex, compiled=True)
    found["torch.compile of the reference"] = Peer(_compiled_attention, compiled=True)
    if on_gpu:
        flops = 2 * case.shapes["head_dim"] * case.shapes["heads"] * n_keys * (n_keys + 1)
        if n_keys <= 1 << 16:
            found["sdpa cuDNN, all queries"] = Peer(_cudnn_full, same=False, work=(0, flops))
    return found


def _heads_first(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """q [1, H, n_q, D]; k and v [1, HK, n_keys, D], what is hidden made harmless."""
    k, v = (x[name][:, : x["n_keys"]].nan_to_num() for name in ("k", "v"))
    return x["q"].transpose(0, 1)[None].contiguous(), k[None].contiguous(), v[None].contiguous()


def _mask(x: Inputs) -> Tensor:
    """Bool [n_q, n_keys]."""
    at, columns = x["positions"][:, None], torch.arange(x["n_keys"], device=x["q"].device)[None]
    seen: Tensor = columns <= at
    if x["window"] is not None:
        seen = seen & (columns > at - x["window"])
    kept = _kept(x)
    return seen if kept is None else seen & kept[: x["n_keys"]]


def _kept(x: Inputs) -> Tensor | None:
    """A byte per key, as masks of others take it."""
    return None if x["holes"] is None else x["holes"].kept()


def _token_major(out: Tensor) -> tuple[Tensor, ...]:
    # A row that sees nothing is 0 by our contract; softmax over nothing is not a number.
    return (out[0].transpose(0, 1).nan_to_num(),)


def _sdpa_mask(x: Inputs) -> Action:
    q, k, v = _heads_first(x)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    mask = _mask(x)[None, None]

    def run() -> tuple[Tensor, ...]:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=x["scale"])
        return _token_major(out)

    return run


def _cudnn_full(x: Inputs) -> Action:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    _, k, v = _heads_first(x)
    heads = x["q"].shape[1]
    k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (k, v))
    q = torch.randn_like(k)

    def run() -> tuple[Tensor, ...]:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return (F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=x["scale"]),)

    return run


def _flex(x: Inputs) -> Action:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = _heads_first(x)
    # By name: a compiler follows tensors into a closure, not into a dictionary.
    positions, window, keep = x["positions"], x["window"], _kept(x)

    def visible(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        seen: Tensor = column <= positions[row]
        if window is not None:
            seen = seen & (column > positions[row] - window)
        return seen if keep is None else seen & keep[column]

    sizes = (q.shape[2], k.shape[2])
    mask = torch.compile(create_block_mask)(visible, None, None, *sizes, device=q.device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def run() -> tuple[Tensor, ...]:
        out = compiled(q, k, v, block_mask=mask, scale=x["scale"], enable_gqa=True)
        return _token_major(out)

    return run


def _compiled_attention(x: Inputs) -> Action:
    q, k, v = _heads_first(x)
    group = q.shape[1] // k.shape[1]
    positions, columns = x["positions"], torch.arange(x["n_keys"], device=q.device)
    window, keep, scale = x["window"], _kept(x), x["scale"]

    def block(rows: Tensor, at: Tensor) -> Tensor:
        seen = columns[None] <= at[:, None]
        if window is not None:
            seen = seen & (columns[None] > at[:, None] - window)
        if keep is not None:
            seen = seen & keep[columns][None]
        folded = rows.unflatten(1, (k.shape[1], group))
        score = torch.einsum("bhgqd,bhkd->bhgqk", folded, k).float() * scale
        weight = score.masked_fill(~seen, float("-inf")).softmax(-1).to(v.dtype)
        return torch.einsum("bhgqk,bhkd->bhgqd", weight, v).flatten(1, 2)

    compiled = torch.compile(block)

    def run() -> tuple[Tensor, ...]:
        parts = [
            compiled(q[:, :, i : i + COMPILED_QUERIES], positions[i : i + COMPILED_QUERIES])
            for i in range(0, q.shape[2], COMPILED_QUERIES)
        ]
        return _token_major(torch.cat(parts, 2))

    return run


# Moving and packing


def _restore(case: KernelCase, on_gpu: bool) -> dict[str, Peer]:
    found = {"plain torch, index_copy_": Peer(lambda x: _on_rows(x, _restore_plain))}
    made = torch.compile(_restore_plain)
    found["torch.compile of plain torch"] = Peer(lambda x: _on_rows(x, made), compiled=True)
    if on_gpu:
        found["our reference, eager"] = Peer(lambda x: lambda: _restore_eager(x))
    return found


def _on_rows(x: Inputs, restore: Callable[..., tuple[Tensor, ...]]) -> Action:
    """Which rows hold a token is known beforehand; None for all of them."""
    filled = x["positions"] >= 0
    rows = None if bool(filled.all()) else filled.nonzero().flatten()
    return lambda: restore(x, rows)


def _unpacked(x: Inputs) -> tuple[Tensor, Tensor]:
    k, v = (t if isinstance(t, Tensor) else packing.unpack(t) for t in (x["k"], x["v"]))
    return k.float(), v.float()


def _restore_eager(x: Inputs) -> tuple[Tensor, ...]:
    rope = {key: x[key] for key in ("cos_table", "sin_table", "interleaved")}
    reference.restore(*_unpacked(x), x["positions"], x["k_out"], x["v_out"], **rope)
    return x["k_out"], x["v_out"]


def _restore_plain(x: Inputs, rows: Tensor | None) -> tuple[Tensor, ...]:
    """RoPE as anybody writes it, and a scatter: a check of ours, and food for a compiler."""
    k, v = _unpacked(x)
    at = x["positions"]
    if rows is not None:
        k, v, at = k[rows], v[rows], at[rows]
    cos, sin = x["cos_table"][at][:, None], x["sin_table"][at][:, None]
    part, rest = k[..., : 2 * cos.shape[-1]], k[..., 2 * cos.shape[-1] :]
    if x["interleaved"]:
        a, b = part[..., 0::2], part[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = part.chunk(2, -1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    for out, new in ((x["k_out"], torch.cat([turned, rest], -1)), (x["v_out"], v)):
        out.index_copy_(1, at, new.to(out.dtype).transpose(0, 1))
    return x["k_out"], x["v_out"]


def _pack(case: KernelCase, on_gpu: bool) -> dict[str, Peer]:
    def eager(x: Inputs) -> tuple[Tensor, ...]:
        found = packing.pack(**x)
        return found.codes, found.scale, found.zero

    made = torch.compile(eager)
    found = {"torch.compile of the reference": Peer(lambda x: lambda: made(x), compiled=True)}
    if on_gpu:  # elsewhere it is what runs: nothing to hold it against
        found["torch, eager"] = Peer(lambda x: lambda: eager(x))
    return found


def _deviation(case: KernelCase, on_gpu: bool) -> dict[str, Peer]:
    def norm(x: Inputs) -> tuple[Tensor, ...]:
        return ((x["k_new"].float() - x["k_old"].float()).square().flatten(1).sum(1),)

    made = torch.compile(norm)
    return {
        "torch, eager": Peer(lambda x: lambda: norm(x)),
        "torch.compile of the reference": Peer(lambda x: lambda: made(x), compiled=True),
    }


def _decode(case: KernelCase, on_gpu: bool) -> dict[str, Peer]:
    return {"dequantise, then sdpa": Peer(lambda x: lambda: _dequantise_sdpa(x))}


def _dequantise_sdpa(x: Inputs) -> tuple[Tensor, ...]:
    q, pool, table, window = x["q"], x["pool"], x["table"], x["window"]
    out = torch.zeros_like(q)
    k_all, v_all = (packing.unpack(p, q.dtype) for p in (pool.k, pool.v))
    for i, count in enumerate(table.counts.tolist()):
        offset = pool.offsets[table.pages[i, :count].long()]
        token = (table.pages[i, :count, None].long() * packing.GROUP).flatten()
        token = token.repeat_interleave(packing.GROUP)
        token = token + torch.arange(packing.GROUP, device=q.device).repeat(count)
        filled = (offset >= 0).flatten()
        at = (offset + table.base[i, :count, None]).flatten()[filled].long()
        k, v = k_all[token[filled]], v_all[token[filled]]
        if x["cos_table"] is not None:
            turned = x["cos_table"][at], x["sin_table"][at]
            k = reference.apply_rope(k, *turned, x["interleaved"])
        near = int(window.counts[i])
        k = torch.cat([k.transpose(0, 1), window.k[i, :, :near]], 1)
        v = torch.cat([v.transpose(0, 1), window.v[i, :, :near]], 1)
        if k.shape[1]:
            row = q[i][None, :, None]
            out[i] = F.scaled_dot_product_attention(
                row, k[None], v[None], scale=x["scale"], enable_gqa=True
            )[0, :, 0]
    return (out,)


def _pooled(case: KernelCase, on_gpu: bool) -> dict[str, Peer]:
    return {"sdpa, one request after another": Peer(_sdpa_requests)}


def _sdpa_requests(x: Inputs) -> Action:
    """Where each request begins and ends is known beforehand."""
    q, window = x["q"], x["window"]
    spans = []
    for base, n in zip(x["base"].tolist(), x["n_keys"].tolist(), strict=True):
        spans.append((base + max(0, n - (window or n)), base + n))

    def action() -> tuple[Tensor, ...]:
        out = torch.zeros_like(q)
        for i, (start, stop) in enumerate(spans):
            if stop > start:
                k, v = x["k"][None, :, start:stop], x["v"][None, :, start:stop]
                row = q[i][None, :, None]
                made = F.scaled_dot_product_attention(row, k, v, scale=x["scale"], enable_gqa=True)
                out[i] = made[0, :, 0]
        return (out,)

    return action


def _gather(case: KernelCase, on_gpu: bool) -> dict[str, Peer]:
    def select(x: Inputs) -> tuple[Tensor, ...]:
        return (x["source"].index_select(0, x["rows"]).to(x["out"].device),)

    def loop(x: Inputs) -> tuple[Tensor, ...]:
        for i, row in enumerate(x["rows"].tolist()):
            x["out"][i].copy_(x["source"][row], non_blocking=True)
        return (x["out"],)

    return {
        "index_select on the CPU, one copy": Peer(lambda x: lambda: select(x)),
        "a copy per row": Peer(lambda x: lambda: loop(x)),
    }


BY_KERNEL: dict[str, Callable[[KernelCase, bool], dict[str, Peer]]] = {
    "sparse_attention": _sparse,
    "restore": _restore,
    "pack": _pack,
    "deviation": _deviation,
    "decode_quantised": _decode,
    "decode_pooled": _pooled,
    "gather_host": _gather,
}
