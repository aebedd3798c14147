"""The packed KV format (8/4/3/2 bits, asymmetric) and its torch implementation.

    value = zero + code * scale,   code in 0 .. 2**bits - 1,   zero and scale fp16

K is quantised per *channel* over groups of 32 tokens (its outliers live in channels), V per *token*
over groups of 32 channels (KIVI, arXiv 2402.02750). A ragged last group is simply shorter.

Codes lie along the channel axis, each half of the channels in its own bytes, so that the two
partners of a rotary pair are a fixed number of bytes apart. With ``h = D/2`` and ``c = 8/bits``
codes per byte, channel ``r`` of a half sits in byte ``r % (h/c)`` at bit ``bits * (r // (h/c))``:
one shift of a run of bytes gives a run of channels. Three bits are a 2-bit plane (the low bits)
followed by a 1-bit plane, each of them laid out so.

Every step is an IEEE fp32 operation in a stated order, so CPU and GPU agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

GROUP = 32
BITS = (8, 4, 3, 2)
FP16_MAX = 65504.0
SCALE_MIN = 2.0**-24
Per = Literal["channel", "token"]


@dataclass(frozen=True)
class Packed:
    """Packed keys or values of ``n`` tokens.

    Attributes:
        codes: uint8 ``[n, HK, D * bits / 8]``.
        scale, zero: fp16; per channel ``[ceil(n/32), HK, D]``, per token ``[n, HK, ceil(D/32)]``.
        bits: 8, 4, 3 or 2.
        per: what one group belongs to: ``channel`` (K) or ``token`` (V).
        head_dim: ``D``.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    per: Per
    head_dim: int

    def tokens(self, start: int, stop: int) -> Packed:
        """Views of tokens ``start .. stop``; ``start`` must begin a group (ValueError)."""
        if start % GROUP:
            raise ValueError(f"start must be a multiple of {GROUP}, got {start}: take whole groups")
        group = slice(start // GROUP, -(-stop // GROUP))
        rows = group if self.per == "channel" else slice(start, stop)
        scale, zero = self.scale[rows], self.zero[rows]
        return Packed(self.codes[start:stop], scale, zero, self.bits, self.per, self.head_dim)


def check_format(head_dim: int, bits: int) -> None:
    """Refuse a head dim or bit width that the byte layout cannot hold (ValueError)."""
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, got {bits}; store wider values unpacked")
    if head_dim % 16:
        raise ValueError(f"head dim must be a multiple of 16, got {head_dim}; pad it with zeros")


def planes(bits: int) -> tuple[int, ...]:
    """Widths in bits of the byte planes of a code, low bits first."""
    return (2, 1) if bits == 3 else (bits,)


def pack(x: Tensor, bits: int, per: Per) -> Packed:
    """Quantise ``x`` ``[n, HK, D]`` (any float dtype); ``per="channel"`` for K, ``"token"`` for V.

    Values beyond the fp16 range saturate. A group whose values are all equal is exact up to the
    rounding of ``zero`` to fp16.

    Raises:
        ValueError: unsupported head dim or bit width.
    """
    d = x.shape[2]
    check_format(d, bits)
    x32 = x.float()
    low, high = _group_range(x32, per)
    levels = float(2**bits - 1)
    zero = low.clamp(-FP16_MAX, FP16_MAX).half()
    step = (high - low) * torch.tensor(1.0 / levels, dtype=torch.float32)
    scale = step.clamp(SCALE_MIN, FP16_MAX).half()
    # Codes come from the *rounded* scale and zero: what unpack will use is what is inverted here.
    codes = x32.clone() if x32 is x else x32
    for part, group in _groups(codes, per):
        part.sub_(group(zero.float())).mul_(group(1.0 / scale.float()))
    codes = codes.clamp_(0.0, levels).round_().to(torch.uint8)
    return Packed(_to_bytes(codes, bits), scale, zero, bits, per, d)


def unpack(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """``[n, HK, D]`` values of a `Packed`, computed in fp32 and cast to ``dtype``."""
    values = _from_bytes(packed.codes, packed.bits, packed.head_dim).float()
    scale, zero = packed.scale.float(), packed.zero.float()
    for part, group in _groups(values, packed.per):
        part.mul_(group(scale)).add_(group(zero))
    return values.to(dtype)


def _groups(x: Tensor, per: Per) -> Iterator[tuple[Tensor, Callable[[Tensor], Tensor]]]:
    """The whole groups and the ragged last one of ``x``: views, each with how its scales broadcast.

    Views rather than scales repeated to the shape of ``x``: three times faster on a CPU.
    """
    dim = 0 if per == "channel" else 2
    whole = x.shape[dim] // GROUP
    if whole:
        part = x.narrow(dim, 0, whole * GROUP).unflatten(dim, (whole, GROUP))
        yield part, lambda value: value.narrow(dim, 0, whole).unsqueeze(dim + 1)
    if x.shape[dim] % GROUP:
        part = x.narrow(dim, whole * GROUP, x.shape[dim] % GROUP).unsqueeze(dim)
        yield part, lambda value: value.narrow(dim, whole, 1).unsqueeze(dim + 1)


def _group_range(x: Tensor, per: Per) -> tuple[Tensor, Tensor]:
    dim = 0 if per == "channel" else 2
    ranges = [(part.amin(dim + 1), part.amax(dim + 1)) for part, _ in _groups(x, per)]
    if not ranges:
        empty = x.narrow(dim, 0, 0)
        return empty, empty
    return torch.cat([r[0] for r in ranges], dim), torch.cat([r[1] for r in ranges], dim)


def _to_bytes(codes: Tensor, bits: int) -> Tensor:
    n, hk, d = codes.shape
    out, shift = [], 0
    for width in planes(bits):
        field = (codes >> shift) & (2**width - 1)
        field = field.view(n, hk, 2, 8 // width, d * width // 16)
        lanes = [field[:, :, :, i] << (width * i) for i in range(8 // width)]
        byte = lanes[0]
        for lane in lanes[1:]:
            byte = byte | lane
        out.append(byte.reshape(n, hk, d * width // 8))
        shift += width
    return torch.cat(out, 2)


def _from_bytes(data: Tensor, bits: int, d: int) -> Tensor:
    n, hk, _ = data.shape
    codes = data.new_zeros(n, hk, d)
    start, shift = 0, 0
    for width in planes(bits):
        run = d * width // 16
        plane = data[:, :, start : start + 2 * run].view(n, hk, 2, run)
        lanes = codes.view(n, hk, 2, 8 // width, run)
        for lane in range(8 // width):
            lanes[:, :, :, lane] |= ((plane >> (lane * width)) & (2**width - 1)) << shift
        start, shift = start + 2 * run, shift + width
    return codes
