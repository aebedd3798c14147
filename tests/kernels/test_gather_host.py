"""Gathering rows by copies, and what the gather refuses; the kernel itself: test_interpreter.py."""

import pytest

pytest.importorskip("triton", reason="triton is not installed; the gather belongs to its kernel")

import torch
from cachetune.kernels.gather_host import crossover, gather_host


@pytest.mark.parametrize("rows", [[3], [0, 1, 2, 3], [5, 4, 4, 7, 8, 0], []])
def test_copies_of_runs(rows: list[int]) -> None:
    source = torch.arange(10 * 16, dtype=torch.uint8).view(10, 16)
    out = torch.zeros(len(rows), 16, dtype=torch.uint8)
    assert gather_host(source, torch.tensor(rows, dtype=torch.int64), out) == "copy"
    assert torch.equal(out, source[rows])


def test_refusals() -> None:
    source, out = torch.zeros(4, 16, dtype=torch.uint8), torch.zeros(1, 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"0\.\.3"):
        gather_host(source, torch.tensor([4]), out)
    with pytest.raises(ValueError, match="multiple of 8"):
        gather_host(source[:, :12].contiguous(), torch.tensor([1]), out[:, :12].contiguous())


def test_the_crossover_is_where_copying_stays_no_slower() -> None:
    took = {8: (1.0, 3.0), 16: (1.0, 0.9), 32: (1.0, 1.5), 64: (1.0, 0.8), 128: (1.0, 1.0)}
    assert crossover(took) == 64
    assert crossover({8: (1.0, 2.0), 16: (1.0, 1.1)}) == 32
    assert crossover({8: (1.0, 0.5), 16: (1.0, 0.5)}) == 8
