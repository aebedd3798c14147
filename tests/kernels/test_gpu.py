"""The full-size cases on a real GPU against the reference; `make gpu` runs them."""

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import torch
from cachetune.kernels.registry import KernelCase, all_cases

FULL = [case for case in all_cases() if not case.tiny]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("case", FULL, ids=lambda case: case.name)
def test_kernel_agrees_with_reference_on_the_gpu(case: KernelCase) -> None:
    want = case.reference(case.make_inputs(0, "cuda"))
    got = case.launch(case.make_inputs(0, "cuda"))
    torch.cuda.synchronize()
    for ours, theirs in zip(got, want, strict=True):
        assert not ours.float().isnan().any()
        absolute, relative = case.tolerance
        if not absolute:
            assert torch.equal(ours, theirs)
        else:
            torch.testing.assert_close(ours.float(), theirs.float(), atol=absolute, rtol=relative)
