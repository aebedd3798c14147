"""What can be checked of the benchmark without a GPU: the arithmetic, and that it says so."""

import sys
from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="triton is not installed; there is nothing to time")

import torch
from cachetune.kernels import benchmark
from cachetune.kernels.registry import all_cases, representatives


def test_limit_is_the_longer_of_bytes_and_flops() -> None:
    case = replace(representatives()[0], bytes=4_000_000, flops=8_000_000)
    ceilings = benchmark.Ceilings(memory=1e12, matmul=1e12, host_link=1e9)
    assert ceilings.seconds(case) == pytest.approx(8e-6)
    timing = benchmark.timing(case, [16e-6, 15e-6, 17e-6], ceilings)
    assert timing.fraction_of_limit == pytest.approx(0.5)
    assert timing.bytes_per_second == pytest.approx(0.25e12)
    assert ceilings.seconds(replace(case, kernel="gather_host")) == pytest.approx(2e-3)


def test_a_wrong_kernel_is_noticed() -> None:
    case = next(c for c in all_cases() if c.tiny and c.kernel == "deviation")
    right = replace(case, launch=case.reference)
    assert benchmark.agrees(right, "cpu")
    wrong = replace(case, launch=lambda x: tuple(1.01 * y for y in case.reference(x)))
    assert not benchmark.agrees(wrong, "cpu")


def test_attention_flops_count_visible_keys() -> None:
    case = next(c for c in all_cases() if c.name == "sparse_attention/d64_one_tiny")
    position = int(case.make_inputs(0, "cpu")["positions"][0])
    assert case.flops == 4 * 64 * 6 * (position + 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark"])
    assert benchmark.main() == 2
    assert "no CUDA device" in capsys.readouterr().err
