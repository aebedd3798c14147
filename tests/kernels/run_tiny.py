"""Runs the registry's tiny cases in Triton's interpreter; `test_interpreter.py` starts it.

A process of its own, because TRITON_INTERPRET must be set before triton is imported. Prints one
line per case: ``name<TAB>ok`` or ``name<TAB>reason``.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
from cachetune.kernels.registry import KernelCase, all_cases
from torch import Tensor


def verdict(case: KernelCase) -> str:
    want = case.reference(case.make_inputs(1, "cpu"))
    got = case.launch(case.make_inputs(1, "cpu"))
    if len(want) != len(got):
        return f"{len(got)} outputs instead of {len(want)}"
    return "; ".join(filter(None, map(_differs, got, want, [case.tolerance] * len(want)))) or "ok"


def _differs(got: Tensor, want: Tensor, tolerance: tuple[float, float]) -> str:
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"{tuple(got.shape)} {got.dtype} instead of {tuple(want.shape)} {want.dtype}"
    if tolerance == (0.0, 0.0):
        return "" if torch.equal(got, want) else f"{int((got != want).sum())} values differ"
    if torch.allclose(got.float(), want.float(), *reversed(tolerance)):
        return ""
    return f"off by {float((got.float() - want.float()).abs().max()):.3g}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    wanted = tuple(sys.argv[1:]) or ("",)
    for each in all_cases():
        if each.tiny and each.name.startswith(wanted):
            print(f"{each.name}\t{verdict(each)}", flush=True)
