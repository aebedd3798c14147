"""Rows of pinned host memory to the GPU: small ones by a kernel that reads across the link itself,
large ones by the copy engine.

Layout: source ``[rows, row_bytes]`` in pinned memory, output ``[n, row_bytes]`` on the device. The
kernel moves 64-bit words, whole 128-byte lines per warp, several rows per step so that many reads
are on the link at once. A dozen programs fill the link; more would only take processors away from
the computation beside it. The copy engine takes none, but costs a submission per run of rows.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import partial
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from .stopwatch import seconds_of

PROGRAMS = 12
TILE_WORDS = 2048
# Where the copy engine overtakes the kernel; a starting point, to be replaced by a measurement.
COPY_FROM_BYTES = 28 * 1024
COPY_BELOW_ROWS = 16
CROSSOVER_BYTES = tuple(1 << n for n in range(13, 19))
"""Row sizes at which the two are compared."""
Path = Literal["auto", "kernel", "copy"]
_launching = threading.Lock()


@triton.jit(do_not_specialize=("n_rows",))
def gather_host_kernel(
    source, rows, out, n_rows, WORDS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr
):  # fmt: skip
    """Persistent programs; each takes every ``num_programs``-th block of BLOCK_R rows."""
    step = tl.num_programs(0) * BLOCK_R
    for first in range(tl.program_id(0) * BLOCK_R, n_rows, step):
        index = (first + tl.arange(0, BLOCK_R)).to(tl.int64)
        live = index < n_rows
        row = tl.load(rows + index, mask=live, other=0).to(tl.int64)
        for start in range(0, WORDS, BLOCK_W):
            word = start + tl.arange(0, BLOCK_W)[None, :]
            mask = live[:, None] & (word < WORDS)
            data = tl.load(source + row[:, None] * WORDS + word, mask=mask)
            tl.store(out + index[:, None] * WORDS + word, data, mask=mask)


def gather_host(
    source: Tensor,
    rows: Tensor,
    out: Tensor,
    path: Path = "auto",
    programs: int = PROGRAMS,
) -> Path:
    """``out[i] = source[rows[i]]``, without waiting for the GPU.

    Args:
        source: uint8 ``[n_source, row_bytes]``, contiguous, pinned if ``out`` is on a GPU.
        rows: int64 ``[n]`` on the host.
        out: uint8 ``[n, row_bytes]``, contiguous.
        path: ``kernel``, ``copy`` (the copy engine, one copy per run of neighbouring rows), or
            ``auto``: by row size and count.
        programs: of the kernel.

    Returns:
        The path taken.

    Raises:
        ValueError: shapes, alignment or memory kind do not fit, or a row does not exist.
    """
    width = source.shape[1]
    fits = out.shape == (rows.numel(), width) and source.dtype == out.dtype == torch.uint8
    if not fits or width % 8 or not source.is_contiguous() or not out.is_contiguous():
        raise ValueError(
            "source [n_source, row_bytes] and out [n, row_bytes] must be contiguous uint8 with "
            f"row_bytes a multiple of 8; got {tuple(source.shape)} {source.dtype}, "
            f"{tuple(out.shape)} {out.dtype} for {rows.numel()} rows: view them as torch.uint8"
        )
    if out.is_cuda and not source.is_pinned():
        raise ValueError(
            "source must be pinned for a GPU to read it: allocate with pin_memory=True"
        )
    if not rows.numel():
        return "copy"
    if rows.device.type == "cpu" and not 0 <= int(rows.min()) <= int(rows.max()) < source.shape[0]:
        raise ValueError(
            f"rows must be in 0..{source.shape[0] - 1}, got {int(rows.min())}..{int(rows.max())}: "
            "index rows of this source"
        )
    if path == "auto":
        small = width < COPY_FROM_BYTES and rows.numel() >= COPY_BELOW_ROWS
        path = "kernel" if small else "copy"
    if path == "copy":
        _copy_runs(source, rows.tolist(), out)
        return path
    words = width // 8
    block_w = min(TILE_WORDS, triton.next_power_of_2(words))
    if out.is_cuda and rows.device.type == "cpu":
        # From memory that is not pinned a copy of more than 64 KiB waits for the stream.
        rows = rows.pin_memory()
    here = rows.to(out.device, non_blocking=True)
    # Triton fills in a kernel's handles at its first launch, and another thread that launches it
    # meanwhile finds half of them; several I/O streams begin with this one at the same moment.
    with _launching:
        gather_host_kernel[(programs,)](
            source.view(torch.int64), here, out.view(torch.int64), rows.numel(),
            WORDS=words, BLOCK_R=TILE_WORDS // block_w, BLOCK_W=block_w, num_warps=8,
        )  # fmt: skip
    return path


def crossover(took: Mapping[int, tuple[float, float]]) -> int:
    """The least row size from which on the copy engine is no slower, from seconds by row bytes of
    (kernel, copy engine); twice the largest where the kernel always won."""
    best = 2 * max(took)
    for width in sorted(took, reverse=True):
        kernel, copy = took[width]
        if copy > kernel:
            break
        best = width
    return best


def measured_crossover(total_bytes: int = 16 << 20, repeats: int = 5) -> int:
    """`crossover` on the current GPU: every other row of pinned memory, each way in turn."""
    source = torch.zeros(2 * total_bytes, dtype=torch.uint8, pin_memory=True)
    out = torch.empty(total_bytes, dtype=torch.uint8, device="cuda")
    took = {}
    for width in CROSSOVER_BYTES:
        rows = 2 * torch.arange(total_bytes // width)
        table, target = source.view(-1, width), out.view(-1, width)
        ways: tuple[Path, Path] = ("kernel", "copy")
        kernel, copy = (
            seconds_of([partial(gather_host, table, rows, target, way)], "cuda", repeats).median
            for way in ways
        )
        took[width] = (kernel, copy)
    return crossover(took)


def _copy_runs(source: Tensor, rows: list[int], out: Tensor) -> None:
    start = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[i - 1] + 1:
            run = source[rows[start] : rows[start] + i - start]
            out[start:i].copy_(run, non_blocking=True)
            start = i
