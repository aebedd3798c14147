"""Bits of keys against a byte per key, and the lists of blocks that a kernel walks."""

from __future__ import annotations

import pytest
import torch
from cachetune.kernels.key_bitmap import KeyBitmap
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 400), st.sampled_from([16, 32, 64]), st.integers(0, 2**20))
def test_blocks_are_those_of_the_keys(n: int, size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    run = int(torch.randint(1, 150, (1,), generator=generator))
    share = torch.randint(0, 3, (n // run + 1,), generator=generator).repeat_interleave(run)[:n] / 2
    kept = torch.rand(n, generator=generator) < share  # runs without, with half and with all keys
    bitmap = KeyBitmap.of(kept)
    assert torch.equal(bitmap.kept(), kept)
    assert bitmap.words.numel() == -(-n // 64)
    blocks = bitmap.blocks(size)
    assert bitmap.blocks(size) is blocks and blocks.n_blocks * size == 64 * bitmap.words.numel()
    padded = torch.nn.functional.pad(kept, (0, blocks.n_blocks * size - n)).view(-1, size)
    whole, found = padded.all(1), padded.any(1)
    for kind, of, before in zip(
        (whole, found & ~whole, found), blocks.lists, blocks.before, strict=True
    ):
        want = kind.nonzero().flatten().tolist()
        assert of[: int(before[-1])].tolist() == want
        assert [int(x) for x in before] == [sum(b < i for b in want) for i in range(len(before))]


def test_blocks_that_cross_words_are_refused() -> None:
    with pytest.raises(ValueError, match="16, 32 or 64"):
        KeyBitmap.of(torch.ones(300, dtype=torch.bool)).blocks(128)
