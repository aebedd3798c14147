"""Runs the registry's tiny cases in Triton's interpreter; `test_interpreter.py` starts it.

A process of its own, because TRITON_INTERPRET must be set before triton is imported. Prints one
line per case: ``name<TAB>ok`` or ``name<TAB>reason``; and for mistakes that a case must tell
``name<TAB>caught`` or ``name<TAB>not caught``; and ``unread bits``, of blocks that are not mixed.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Callable
from typing import Any

import torch
from cachetune.kernels.key_bitmap import KeyBitmap
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


def mutant(case: KernelCase, change: Callable[[dict[str, Any]], dict[str, Any]]) -> str:
    """What is said of the kernel when it is asked for something else than the reference is."""
    inputs = case.make_inputs(1, "cpu")
    got, want = case.launch(inputs | change(inputs)), case.reference(inputs)
    return "caught" if any(map(_differs, got, want, [case.tolerance])) else "not caught"


def _at(positions: Tensor) -> dict[str, Any]:
    return {"positions": positions, "plan": None}


MUTANTS: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "bottom-right mask": (
        "d64_g3_tiny",
        lambda x: _at(torch.arange(x["n_keys"] - len(x["positions"]), x["n_keys"])),
    ),
    "a key of the future": ("d64_g3_tiny", lambda x: _at(x["positions"] + 1)),
    "no window": ("d80_window_tiny", lambda x: {"window": None, "plan": None}),
    "holes seen": ("d96_holes_tiny", lambda x: {"holes": None}),
}
"""Mistakes of real kernels, and the case that must tell."""


def unread_bits(case: KernelCase) -> str:
    """Bits turned over wherever a whole word is set or clear change nothing before the diagonal:
    whole blocks are not masked, empty ones not visited. Block lists are as they were."""
    inputs = case.make_inputs(1, "cpu")
    holes, n_keys = inputs["holes"], inputs["n_keys"]
    inputs |= _at(torch.arange(n_keys - len(inputs["positions"]), n_keys))
    word = torch.arange(len(holes.words))
    plain = ((holes.words == 0) | (holes.words == -1)) & (word < n_keys // 64 - 1)
    lists = {size: holes.blocks(size) for size in (16, 32, 64)}
    turned = KeyBitmap(torch.where(plain, ~holes.words, holes.words), holes.n_slots, lists)
    got, want = case.launch(inputs | {"holes": turned}), case.reference(inputs)
    if not int(plain.sum()) > 4:
        return "the case has no such words"
    return _differs(got[0], want[0], case.tolerance) or "ok"


if __name__ == "__main__":
    torch.set_num_threads(1)
    wanted = tuple(sys.argv[1:]) or ("",)
    by_name = {case.name: case for case in all_cases()}
    for name, (label, change) in MUTANTS.items():
        print(f"{name}\t{mutant(by_name[f'sparse_attention/{label}'], change)}", flush=True)
    print(f"unread bits\t{unread_bits(by_name['sparse_attention/d96_holes_tiny'])}", flush=True)
    for each in all_cases():
        if each.tiny and each.name.startswith(wanted):
            print(f"{each.name}\t{verdict(each)}", flush=True)
