"""Every kernel case once: tests, the benchmark and the compile check read this list.

A case is a kernel at one shape. *Tiny* cases are small enough for Triton's interpreter and use fp32
or fp16 (its bf16 dot product is wrong); the others have the shapes of real models and are what is
timed and compiled. The first full-size case of each kernel is its representative.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from . import cases
from .codes import FP8

Inputs = dict[str, Any]


@dataclass(frozen=True)
class KernelCase:
    """One kernel at one shape.

    Attributes:
        name: unique, ``kernel/shape``.
        kernel: file and launcher name.
        shapes: the sizes that define the case.
        dtype: of the unpacked tensors, as torch spells it without ``torch.``.
        tolerance: absolute and relative, launch against reference; (0, 0) asks for equal bytes.
        bytes: moved at least once to or from memory by one launch.
        flops: multiply and add counted as two.
        make_inputs: ``(seed, device)`` to inputs; device ``meta`` gives shapes without data.
        reference, launch: inputs to output tensors, the same number and order.
        tiny: for the interpreter only.
        expects: what the compiled code must contain: ``mma`` (tensor cores), ``wide_mma`` (the
            architecture's newest form), ``vector`` (128-bit loads), ``pipelined`` (asynchronous
            copies).
    """

    name: str
    kernel: str
    shapes: dict[str, Any]
    dtype: str
    tolerance: tuple[float, float]
    bytes: int
    flops: int
    make_inputs: Callable[[int, str], Inputs] = field(repr=False)
    reference: Callable[[Inputs], tuple[Tensor, ...]] = field(repr=False)
    launch: Callable[[Inputs], tuple[Tensor, ...]] = field(repr=False)
    tiny: bool = False
    expects: frozenset[str] = frozenset()


TOLERANCE = {"float32": (2e-5, 2e-5), "float16": (4e-3, 4e-3), "bfloat16": (3e-2, 3e-2)}


def _case(
    kernel: str,
    label: str,
    dtype: str,
    shapes: dict[str, Any],
    expects: str = "",
    tiny: bool = False,
) -> KernelCase:
    family = cases.FAMILIES[kernel]
    moved, flops = family.work(dtype=dtype, **shapes)
    return KernelCase(
        name=f"{kernel}/{label}" + ("_tiny" if tiny else ""),
        kernel=kernel,
        shapes=shapes,
        dtype=dtype,
        tolerance=TOLERANCE[dtype] if family.rounds else (0.0, 0.0),
        bytes=moved,
        flops=flops,
        make_inputs=partial(family.make, dtype=dtype, **shapes),
        reference=family.reference,
        launch=family.launch,
        tiny=tiny,
        expects=frozenset(expects.split()),
    )


def _sparse() -> list[KernelCase]:
    base = {"n_q": 4096, "n_keys": 32768, "heads": 32, "kv_heads": 8, "head_dim": 128}
    small = {"n_q": 19, "n_keys": 150, "heads": 6, "kv_heads": 2, "head_dim": 64}
    holed = {"n_keys": 1000, "holes": True}
    long = {"n_q": 2, "n_keys": 134000, "heads": 2, "kv_heads": 1, "head_dim": 64}
    full = partial(_case, "sparse_attention", dtype="bfloat16", expects="wide_mma vector pipelined")
    narrow = partial(_case, "sparse_attention", dtype="bfloat16", expects="mma vector pipelined")
    tiny = partial(_case, "sparse_attention", tiny=True)
    return [
        full(label="d128_g4", shapes=base),
        full(label="d128_g4_clustered", shapes=base | {"clustered": True}),
        full(label="d128_g4_window", shapes=base | {"window": 4096}),
        full(label="d128_g4_holes", shapes=base | {"holes": True}),
        full(label="d128_g4_holes_window", shapes=base | {"holes": True, "window": 4096}),
        full(label="d128_g7", shapes=base | {"heads": 28, "kv_heads": 4}),
        full(label="d64_g8", shapes=base | {"head_dim": 64, "kv_heads": 4}),
        full(label="d80_g1", shapes=base | {"head_dim": 80, "kv_heads": 32}),
        full(label="d96_g1", shapes=base | {"head_dim": 96, "kv_heads": 32}),
        full(label="d256_g2", shapes=base | {"head_dim": 256, "heads": 8, "kv_heads": 4}),
        full(label="d128_g4_128k", shapes=base | {"n_q": 2048, "n_keys": 160000}),
        _case("sparse_attention", "d128_g4_fp32", "float32", base, "mma"),
        narrow(label="d128_g4_split", shapes=base | {"n_q": 4}),
        narrow(label="d128_g4_one", shapes=base | {"n_q": 1}),
        narrow(label="d128_g4_holes_one", shapes=base | {"n_q": 1, "holes": True}),
        narrow(label="d256_g2_one", shapes=base | {"n_q": 1, "head_dim": 256, "heads": 16}),
        tiny(label="d64_g3", dtype="float32", shapes=small),
        tiny(label="d64_g3_half", dtype="float16", shapes=small),
        tiny(label="d80_window", dtype="float32", shapes=small | {"head_dim": 80, "window": 40}),
        tiny(label="d96_holes", dtype="float32", shapes=small | holed | {"head_dim": 96}),
        tiny(label="d64_holes_window", dtype="float16", shapes=small | holed | {"window": 300}),
        tiny(label="d64_holes_split", dtype="float32", shapes=small | holed | {"n_q": 2}),
        tiny(label="d128_split", dtype="float32", shapes=small | {"n_q": 2, "n_keys": 700}),
        tiny(label="d256", dtype="float16", shapes=small | {"n_q": 5, "head_dim": 256}),
        tiny(label="d64_one", dtype="float32", shapes=small | {"n_q": 1}),
        tiny(label="d64_128k_keys", dtype="float16", shapes=long),
    ]


def _restore() -> list[KernelCase]:
    base = {"n": 32768, "kv_heads": 8, "head_dim": 128, "k_bits": 4, "v_bits": 4}
    small = {"n": 45, "kv_heads": 2, "head_dim": 64, "k_bits": 4, "v_bits": 2}
    full = partial(_case, "restore", dtype="bfloat16", expects="vector")
    plain = partial(_case, "restore", dtype="bfloat16")
    tiny = partial(_case, "restore", tiny=True)
    return [
        full(label="k4_v4", shapes=base),
        full(label="raw", shapes=base | {"k_bits": 16, "v_bits": 16}),
        full(label="fp8", shapes=base | {"k_bits": FP8, "v_bits": FP8}),
        full(label="k8_v8", shapes=base | {"k_bits": 8, "v_bits": 8}),
        full(label="k4_v4_chunks", shapes=base | {"chunk": 500}),
        full(label="k2_v2", shapes=base | {"k_bits": 2, "v_bits": 2}),
        plain(label="k3_v3", shapes=base | {"k_bits": 3, "v_bits": 3}),
        plain(label="k4_v2_partial", shapes=base | {"v_bits": 2, "rotary_dim": 64}),
        plain(label="k8_v4_interleaved", shapes=base | {"k_bits": 8, "interleaved": True}),
        plain(label="k3_v3_d256", shapes=base | _bits(3, 3, head_dim=256)),
        plain(label="k4_v4_d80", shapes=base | {"head_dim": 80}),
        tiny(label="k4_v2", dtype="float32", shapes=small),
        tiny(label="raw_d80", dtype="float16", shapes=small | _bits(16, 16, head_dim=80)),
        tiny(label="fp8", dtype="float32", shapes=small | _bits(FP8, FP8, rotary_dim=32)),
        tiny(label="k8_v3_d96", dtype="float32", shapes=small | _bits(8, 3, head_dim=96)),
        tiny(label="k3_v8_partial", dtype="float32", shapes=small | _bits(3, 8, rotary_dim=32)),
        tiny(label="k4_v2_chunks", dtype="float32", shapes=small | {"n": 128, "chunk": 45}),
        tiny(label="k2_v4_pairs", dtype="float32", shapes=small | _bits(2, 4, interleaved=True)),
    ]


def _bits(k_bits: int, v_bits: int, **other: Any) -> dict[str, Any]:
    return {"k_bits": k_bits, "v_bits": v_bits, **other}


def _pack() -> list[KernelCase]:
    base = {"n": 32768, "kv_heads": 8, "head_dim": 128}
    small = {"n": 37, "kv_heads": 2, "head_dim": 80}
    wide = {(4, "channel"), (4, "token"), (8, "channel"), (8, "token")}
    out = []
    for bits, per in [(b, p) for b in (4, 8, 3, 2) for p in ("channel", "token")]:
        expects = "vector" if (bits, per) in wide else ""
        shapes = {"bits": bits, "per": per}
        out.append(_case("pack", f"{per}{bits}", "bfloat16", base | shapes, expects))
        dtype = "float16" if bits == 3 else "float32"
        out.append(_case("pack", f"{per}{bits}", dtype, small | shapes, tiny=True))
        # A head shorter than a group of its channels; with 3 bits a run is one channel.
        short = small | shapes | {"head_dim": 16}
        out.append(_case("pack", f"d16_{per}{bits}", dtype, short, tiny=True))
    return out


def _deviation() -> list[KernelCase]:
    base = {"n": 32768, "kv_heads": 8, "head_dim": 128}
    return [
        _case("deviation", "d128", "bfloat16", base, "vector"),
        _case("deviation", "d80", "float32", {"n": 13, "kv_heads": 3, "head_dim": 80}, tiny=True),
    ]


def _decode() -> list[KernelCase]:
    base = {"batch": 8, "pages": 1024, "heads": 32, "kv_heads": 8, "head_dim": 128, "window": 256}
    small = {"batch": 3, "pages": 7, "heads": 6, "kv_heads": 2, "head_dim": 64, "window": 40}
    full = partial(_case, "decode_quantised", dtype="bfloat16", expects="mma")
    tiny = partial(_case, "decode_quantised", tiny=True)
    return [
        full(label="k4_v4", shapes=base | _bits(4, 4)),
        full(label="k8_v8", shapes=base | _bits(8, 8)),
        full(label="k2_v2", shapes=base | _bits(2, 2)),
        full(label="k3_v3_g7", shapes=base | _bits(3, 3, heads=28, kv_heads=4)),
        full(label="k4_v4_turned", shapes=base | _bits(4, 4, turn=False)),
        full(label="k4_v2_partial", shapes=base | _bits(4, 2, rotary_dim=64)),
        full(label="k4_v4_d80", shapes=base | _bits(4, 4, head_dim=80)),
        full(label="k4_v4_d256", shapes=base | _bits(4, 4, head_dim=256)),
        tiny(label="k4_v2", dtype="float32", shapes=small | _bits(4, 2)),
        tiny(label="k8_v4_turned", dtype="float16", shapes=small | _bits(8, 4, turn=False)),
        tiny(label="k3_v3_partial", dtype="float32", shapes=small | _bits(3, 3, rotary_dim=32)),
        tiny(
            label="k2_v8_pairs_d80",
            dtype="float32",
            shapes=small | _bits(2, 8, head_dim=80, interleaved=True),
        ),
        tiny(label="k4_v4_one_page", dtype="float32", shapes=small | _bits(4, 4, pages=1, batch=1)),
    ]


def _pooled() -> list[KernelCase]:
    base = {"batch": 8, "n_keys": 16384, "heads": 32, "kv_heads": 8, "head_dim": 128}
    small = {"batch": 3, "n_keys": 150, "heads": 6, "kv_heads": 2, "head_dim": 64}
    full = partial(_case, "decode_pooled", dtype="bfloat16", expects="mma vector pipelined")
    tiny = partial(_case, "decode_pooled", tiny=True)
    return [
        full(label="d128_g4", shapes=base),
        full(label="d128_g4_one", shapes=base | {"batch": 1}),
        full(label="d128_g4_64", shapes=base | {"batch": 64, "n_keys": 4096}),
        full(label="d128_g5", shapes=base | {"heads": 40}),
        full(label="d128_g4_window", shapes=base | {"window": 4096}),
        full(label="d64_g8", shapes=base | {"head_dim": 64, "kv_heads": 4}),
        full(label="d256_g2", shapes=base | {"head_dim": 256, "heads": 16}),
        tiny(label="d64_g3", dtype="float32", shapes=small),
        tiny(label="d64_g3_half", dtype="float16", shapes=small),
        tiny(label="d80_window", dtype="float32", shapes=small | {"head_dim": 80, "window": 40}),
        tiny(label="d128_one", dtype="float32", shapes=small | {"batch": 1, "head_dim": 128}),
    ]


def _gather() -> list[KernelCase]:
    case = partial(_case, "gather_host", dtype="uint8")
    return [
        case(label="8k_rows", shapes={"n": 4096, "row_bytes": 8192}, expects="vector"),
        case(label="640_byte_rows", shapes={"n": 8192, "row_bytes": 640}, expects="vector"),
        case(label="24_byte_rows", shapes={"n": 45, "row_bytes": 24}, tiny=True),
        case(label="20k_rows", shapes={"n": 3, "row_bytes": 20480}, tiny=True),
    ]


def all_cases() -> list[KernelCase]:
    """Every case, grouped by kernel, representatives first."""
    groups = _sparse(), _restore(), _pack(), _deviation(), _decode(), _pooled(), _gather()
    return [case for group in groups for case in group]


def representatives() -> list[KernelCase]:
    """The first full-size case of each kernel."""
    first: dict[str, KernelCase] = {}
    for case in all_cases():
        if not case.tiny:
            first.setdefault(case.kernel, case)
    return list(first.values())
