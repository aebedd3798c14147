"""Pieces over the host link: which limit and which bounds hold for a size."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="the gather belongs to its kernel")

import torch
from cachetune.calibration.link_rates import (
    LARGE_GOALS,
    PIECE_BYTES,
    SMALL_GOALS,
    TOTAL_BYTES,
    Pieces,
    pieces,
)
from cachetune.core.units import KIB, MIB
from cachetune.kernels.stopwatch import Spread


def test_bounds_are_of_small_and_of_large_pieces_by_the_chosen_path() -> None:
    took = Spread(0.5, 0.4, 0.6, 20)
    by_size = {n: Pieces(n, 4, "auto", took) for n in PIECE_BYTES}
    assert by_size[MIB * 2].rate == 16 * MIB
    assert {n: one.goals for n, one in by_size.items()} == {
        **dict.fromkeys((8 * KIB, 16 * KIB, 24 * KIB), SMALL_GOALS),
        **dict.fromkeys((64 * KIB, 256 * KIB), (None, None)),
        **dict.fromkeys((2 * MIB, 16 * MIB), LARGE_GOALS),
    }
    assert {one.ceiling for n, one in by_size.items() if n <= 24 * KIB} == {"h2d_sm"}
    assert {one.ceiling for n, one in by_size.items() if n > 24 * KIB} == {"h2d"}
    assert Pieces(8 * KIB, 4, "copy", took).goals == (None, None)


@pytest.mark.parametrize("size", PIECE_BYTES)
def test_memory_is_cut_into_whole_pieces(size: int) -> None:
    """24 KiB is no divisor of what is moved."""
    pages = torch.empty(TOTAL_BYTES, dtype=torch.uint8, device="meta")
    cut = pieces(pages, size)
    assert cut.shape == (TOTAL_BYTES // size, size) and cut.is_contiguous()
    assert 0 <= TOTAL_BYTES - cut.numel() < size
