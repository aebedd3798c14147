"""Reading packed codes inside a Triton kernel; the byte layout is the one of ``packing.py``.

The functions take a channel and return its code, so that a kernel can walk channels in the order
its arithmetic wants (rotary pairs, heads, tiles). Bytes that hold several channels are loaded once
per channel; the repeats hit the L1 cache, and memory traffic stays at the packed size.
"""

from __future__ import annotations

import triton
import triton.language as tl

FP8 = 88
"""In the place of a bit width: e4m3 floats, a byte each, without a scale."""


@triton.jit
def _values(data, mask, BITS: tl.constexpr):
    """fp32 of values that are not packed; bytes of e4m3 are widened by arithmetic, which every
    GPU has (hardware conversion begins with sm_89). NaN becomes 480."""
    if BITS == 16:
        return tl.load(data, mask=mask, other=0.0).to(tl.float32)
    else:
        byte = tl.load(data, mask=mask, other=0).to(tl.int32)
        # e4m3's exponent and fraction, where fp32 has its own, are 2**-120 of the value.
        size = ((byte & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
        return tl.where(byte >= 0x80, -size, size)


@triton.jit
def _field(data, channel, mask, WIDTH: tl.constexpr, D: tl.constexpr):
    """The WIDTH-bit field of one plane: uint8 of the shape of ``data + channel``."""
    run: tl.constexpr = D * WIDTH // 16
    half = channel // (D // 2)
    rest = channel % (D // 2)
    byte = tl.load(data + half * run + rest % run, mask=mask, other=0)
    if WIDTH == 8:
        return byte
    shift = (rest // run * WIDTH).to(tl.uint8)
    return (byte >> shift) & ((1 << WIDTH) - 1)


@triton.jit
def load_codes(data, channel, mask, BITS: tl.constexpr, D: tl.constexpr):
    """fp32 codes 0 .. 2**BITS - 1 of ``channel`` in the rows that start at ``data``."""
    if BITS == 3:
        low = _field(data, channel, mask, 2, D)
        high = _field(data + D // 4, channel, mask, 1, D)
        return (low | (high << 2)).to(tl.float32)
    else:
        return _field(data, channel, mask, BITS, D).to(tl.float32)


@triton.jit
def load_keys(
    data, scale, zero, row, group, channel, mask, BITS: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """fp32 keys ``[tokens, channels]``; one scale row ``group`` for the whole block.

    ``row`` int64 ``[tokens, 1]`` counts (token, head) rows, ``group`` (token group, head) rows.
    """
    if BITS == 16 or BITS == 88:
        return _values(data + row * D + channel, mask, BITS)
    else:
        code = load_codes(data + row * (D * BITS // 8), channel, mask, BITS, D)
        inside = channel < D
        s = tl.load(scale + group * D + channel, mask=inside, other=0.0).to(tl.float32)
        z = tl.load(zero + group * D + channel, mask=inside, other=0.0).to(tl.float32)
        return code * s + z


@triton.jit
def load_values(data, scale, zero, row, channel, mask, BITS: tl.constexpr, D: tl.constexpr):
    """fp32 values ``[tokens, channels]``; one scale per token and 32 channels."""
    if BITS == 16 or BITS == 88:
        return _values(data + row * D + channel, mask, BITS)
    else:
        groups: tl.constexpr = (D + 31) // 32
        code = load_codes(data + row * (D * BITS // 8), channel, mask, BITS, D)
        at = row * groups + channel // 32
        s = tl.load(scale + at, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(zero + at, mask=mask, other=0.0).to(tl.float32)
        return code * s + z
