"""Shipped kernels: they load fast, predict with intervals, and compose into model times."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cachetune.core.errors import CacheTuneError, ProfileError
from cachetune.core.model_spec import ModelSpec
from cachetune.simulator.allreduce import allreduce_s, gather_s
from cachetune.simulator.gpu_sheet import FOLDER, gpu_sheet, gpu_sheets
from cachetune.simulator.kernel_cost import KernelCost
from cachetune.simulator.model_cost import ModelCost

LLAMA = ModelSpec(
    name="llama-3.1-8b",
    family="llama",
    n_layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    n_heads=32,
    n_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_position=131072,
)


def test_shipped_documents_are_small() -> None:
    assert all(p.stat().st_size <= 600_000 for p in Path(str(FOLDER)).glob("*.json"))


def test_a_cold_load_takes_under_a_second() -> None:
    code = (
        "import time\n"
        "from cachetune.simulator.kernel_cost import KernelCost\n"
        "t = time.perf_counter()\n"
        "KernelCost.load('H100-SXM').gemm_s(128, 4096, 4096)\n"
        "assert time.perf_counter() - t < 1.0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


@pytest.mark.parametrize("gpu", sorted(gpu_sheets()))
def test_every_gpu_predicts_with_an_interval(gpu: str) -> None:
    cost = KernelCost.load(gpu)
    for found in (
        cost.predict_gemm(512, 4096, 4096),
        cost.predict_prefill_attention(512, 4096, 32, 8, 128),
        cost.predict_decode_attention(8, 8 * 2048, 32, 8, 128),
    ):
        assert 0 < found.low_s < found.seconds < found.high_s


def test_a_borrowed_gpu_says_so_and_is_less_sure() -> None:
    own = KernelCost.load("H100 sxm").predict_gemm(512, 4096, 4096)
    borrowed = KernelCost.load("H200-SXM").predict_gemm(512, 4096, 4096)
    assert own.borrowed_from is None and borrowed.borrowed_from == "H100-SXM"
    assert borrowed.high_s / borrowed.seconds > own.high_s / own.seconds


def test_decode_steps_sum_in_closed_form() -> None:
    cost = ModelCost(LLAMA, KernelCost.load("H100-SXM"))
    whole = cost.decode_steps_s(8, 8 * 1000, 300)
    assert whole == pytest.approx(sum(cost.decode_s(8, 8 * 1000 + 8 * i) for i in range(300)))
    assert cost.decode_s(8, 8 * 8000) > cost.decode_s(8, 8 * 1000)


def test_fp8_kv_pays_where_contexts_are_long() -> None:
    kernels = KernelCost.load("H100-SXM")
    half = ModelCost(LLAMA, kernels, kv_dtype="fp8")
    whole = ModelCost(LLAMA, kernels)
    # Where the launch decides, unpacking costs more than half of the bytes save.
    assert half.decode_s(1, 64) > whole.decode_s(1, 64)
    long = 64 * 16384
    saved = whole.decode_s(64, long) - half.decode_s(64, long)
    assert 0.3 < saved / (whole.decode_s(64, long) - whole.decode_s(64, 64)) < 0.5
    with pytest.raises(ProfileError, match="dtype of K and V"):
        kernels.decode_attention_s(1, 64, 32, 8, 128, "int4")


def test_a_prefix_costs_more_and_tensor_parallelism_less() -> None:
    kernels = KernelCost.load("H100-SXM")
    one = ModelCost(LLAMA, kernels)
    assert one.prefill_s(512, 16384) > one.prefill_s(512, 0)
    assert ModelCost(LLAMA, kernels, tp=4).prefill_s(2048, 0) < one.prefill_s(2048, 0)
    assert allreduce_s(gpu_sheet("L40S"), 4, 1 << 20) > allreduce_s(
        gpu_sheet("H100-SXM"), 4, 1 << 20
    )


def test_an_unknown_gpu_names_the_nearest() -> None:
    with pytest.raises(CacheTuneError, match="H100-SXM"):
        KernelCost.load("H100-SMX")
    with pytest.raises(CacheTuneError, match="above zero"):
        KernelCost.load("H100-SXM").gemm_s(0, 1, 1)


def test_the_logits_of_a_group_are_gathered() -> None:
    sheet = gpu_sheet("L40S")
    assert gather_s(sheet, 1, 1 << 20) == 0.0
    assert gather_s(sheet, 2, 1 << 24) == allreduce_s(sheet, 2, 1 << 24) / 2
    pair = ModelCost(LLAMA, KernelCost.load("L40S"), tp=2)
    half = pair.kernels.gemm_s(64, LLAMA.vocab_size // 2, LLAMA.hidden_size)
    assert pair.logits_s(64) == half + gather_s(sheet, 2, 2 * 64 * LLAMA.vocab_size)
