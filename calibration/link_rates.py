"""Pinned memory to the GPU in pieces: by the copy engine, by the GPU's processors, by choice."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from ..core.units import KIB, MIB

if TYPE_CHECKING:
    from torch import Tensor

    from ..kernels.stopwatch import Spread

PIECE_BYTES = (8 * KIB, 16 * KIB, 24 * KIB, 64 * KIB, 256 * KIB, 2 * MIB, 16 * MIB)
SMALL_BYTES = 24 * KIB
LARGE_BYTES = 2 * MIB
TOTAL_BYTES = 256 * MIB
LARGE_GOALS = (0.9, 0.96)
"""Must and goal, shares of the copy engine's rate."""
SMALL_GOALS = (0.7, 0.85)
"""Shares of the rate at which the GPU's processors read."""

Path = Literal["kernel", "copy", "auto"]
PATHS: tuple[Path, ...] = ("copy", "kernel", "auto")


@dataclass(frozen=True)
class Pieces:
    """One piece size by one path; `took` is for all pieces together."""

    piece_bytes: int
    n_pieces: int
    path: Path
    took: Spread

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.piece_bytes * self.n_pieces / self.took.median

    @property
    def ceiling(self) -> str:
        """What it is held against."""
        return "h2d_sm" if self.piece_bytes <= SMALL_BYTES else "h2d"

    @property
    def goals(self) -> tuple[float, float] | tuple[None, None]:
        """Must and goal of the path that is chosen; sizes in between have none."""
        if self.path != "auto" or SMALL_BYTES < self.piece_bytes < LARGE_BYTES:
            return None, None
        return SMALL_GOALS if self.piece_bytes <= SMALL_BYTES else LARGE_GOALS


def pieces(pages: Tensor, size: int) -> Tensor:
    """uint8 pages as `[n, size]`; what is left behind the last whole piece is left out."""
    return pages[: pages.numel() // size * size].view(-1, size)


def host_to_device(total_bytes: int = TOTAL_BYTES) -> list[Pieces]:
    """Scattered pieces of pinned memory, every size by every path."""
    import torch

    from ..kernels.gather_host import gather_host
    from ..kernels.stopwatch import seconds_of

    drawn = torch.randint(0, 255, (2 * total_bytes,), dtype=torch.uint8, device="cuda")
    source = torch.empty(2 * total_bytes, dtype=torch.uint8, pin_memory=True).copy_(drawn)
    out = torch.zeros(total_bytes, dtype=torch.uint8, device="cuda")
    found = []
    for size in PIECE_BYTES:
        target = pieces(out, size)
        # Every second piece: neighbours would be one copy for the engine.
        table = pieces(source, size)[: 2 * len(target)]
        rows = 2 * torch.randperm(len(target))
        for path in PATHS:
            took = seconds_of([partial(gather_host, table, rows, target, path)], "cuda")
            found.append(Pieces(size, len(target), path, took))
    return found
