"""Decode over packed pages: equal to dense float64 attention over what the pages hold."""

import math

import pytest
import torch
from cachetune.kernels import packing
from cachetune.kernels.decode_reference import (
    PagePool,
    PageTable,
    Window,
    decode_quantised,
    merge_parts,
    partial_attention,
)
from cachetune.kernels.reference import apply_rope, rope_tables
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

torch.set_num_threads(1)
FEW = settings(max_examples=20, deadline=None, derandomize=True)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@FEW
@given(st.integers(0, 9999), st.lists(st.integers(0, 20), min_size=1, max_size=5))
def test_parts_merge_to_the_whole(seed: int, sizes: list[int]) -> None:
    n = sum(sizes)
    q, k, v = draw(seed, 4, 16), draw(seed + 1, n, 2, 16), draw(seed + 2, n, 2, 16)
    whole = partial_attention(q, k, v, 0.25)
    parts = [partial_attention(q, *x, 0.25) for x in zip(k.split(sizes), v.split(sizes))]  # noqa: B905
    merged = merge_parts(parts)
    torch.testing.assert_close(merged[0], whole[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(merged[1], whole[1], atol=1e-5, rtol=1e-5)
    if not n:
        assert not whole[0].any() and bool((whole[1] == -math.inf).all())


@FEW
@given(
    st.integers(0, 9999),
    st.integers(0, 6),
    st.integers(0, 9),
    st.sampled_from([(8, 4), (3, 2), (4, 3)]),
    st.booleans(),
)
def test_decode_is_dense_attention(
    seed: int, count: int, near: int, bits: tuple[int, int], turn: bool
) -> None:
    d, hk, heads, pool_pages = 32, 2, 6, 8
    generator = torch.Generator().manual_seed(seed)
    k, v = draw(seed, 32 * pool_pages, hk, d), draw(seed + 1, 32 * pool_pages, hk, d)
    packed = packing.pack(k, bits[0], "channel"), packing.pack(v, bits[1], "token")
    # Rank order: a page's tokens are scattered over its chunk, some slots hold none.
    offsets = torch.stack([torch.randperm(50, generator=generator)[:32] for _ in range(pool_pages)])
    offsets[torch.rand(offsets.shape, generator=generator) < 0.2] = -1
    pages = torch.randperm(pool_pages, generator=generator)[None, :6]
    base = torch.randint(0, 500, (1, 6), generator=generator)
    window = Window(draw(seed + 3, 1, hk, 9, d), draw(seed + 4, 1, hk, 9, d), torch.tensor([near]))
    cos, sin = rope_tables(1e4 ** -(torch.arange(16) / 16.0), torch.arange(600))
    q = draw(seed + 5, 1, heads, d)
    got = decode_quantised(
        q,
        PagePool(*packed, offsets.int()),
        PageTable(pages.int(), base.int(), torch.tensor([count])),
        window,
        d**-0.5,
        cos if turn else None,
        sin if turn else None,
    )
    keys, values = [window.k[0, :, :near].mT.mT], [window.v[0, :, :near]]
    for page, start in zip(pages[0, :count].tolist(), base[0, :count].tolist(), strict=True):
        rows = [32 * page + i for i in range(32) if offsets[page, i] >= 0]
        at = start + offsets[page][offsets[page] >= 0]
        part = packing.unpack(packed[0])[rows]
        keys.append((apply_rope(part, cos[at], sin[at]) if turn else part).transpose(0, 1))
        values.append(packing.unpack(packed[1])[rows].transpose(0, 1))
    all_k, all_v = (torch.cat(x, 1).double().repeat_interleave(3, 0) for x in (keys, values))
    score = torch.einsum("hd,hnd->hn", q[0].double(), all_k) * d**-0.5
    want = torch.einsum("hn,hnd->hd", score.softmax(-1).nan_to_num(0.0), all_v)
    torch.testing.assert_close(got[0].double(), want, atol=1e-5, rtol=1e-5)


def test_decode_refuses_contradictions() -> None:
    packed = packing.pack(draw(0, 32, 1, 32), 4, "channel")
    pool = PagePool(packed, packed, torch.zeros(1, 32, dtype=torch.int32))
    index = torch.zeros(1, 1, dtype=torch.int32)
    table, window = PageTable(index, index, index[0]), Window(*[draw(1, 1, 1, 2, 32)] * 2, index[0])
    with pytest.raises(ValueError, match=r"pool\.v is packed per token"):
        decode_quantised(draw(2, 1, 2, 32), pool, table, window, 1.0)
