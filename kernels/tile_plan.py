"""`TilePlan`: tiles of queries and the key blocks each of them visits.

Built from the positions, once per request and for all layers. An item is
``(tile, split, begin, full_begin, full_end, end, key_end)``: key blocks ``full_begin .. full_end``
are visible to every query of the tile and skip the mask; those before (window) and after (diagonal)
compare positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .arch import current_arch, processors

ITEM = 8
MAX_SPLITS = 64


@dataclass(frozen=True)
class TileConfig:
    """Launch shape: rows and keys of a tile (powers of two), warps, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class TilePlan:
    """Everything about the positions that the kernel needs; reusable for all layers.

    Attributes:
        items: int32 ``[n_items, 8]``, the longest first.
        positions: int32 ``[n_q]``, next to ``items`` on the device.
        n_splits: parts per tile; above 1 the parts are merged afterwards.
        n_keys, window, group, head_dim: what the plan was made for.
        config: the tile.
    """

    items: Tensor
    positions: Tensor
    n_splits: int
    n_keys: int
    window: int | None
    group: int
    head_dim: int
    config: TileConfig


def tile_config(n_q: int, group: int, head_dim: int, dtype: torch.dtype) -> TileConfig:
    """The widest tile of the current architecture that neither spills nor runs mostly empty."""
    hopper = 90 <= current_arch() < 120  # 12x has neither their matrix unit nor their memory
    block_m = max(16, min(128, triton.next_power_of_2(max(n_q * group, group))))
    if dtype == torch.float32:
        smallest = max(16, triton.next_power_of_2(group))
        return TileConfig(smallest, 32, 4, 2) if head_dim <= 128 else TileConfig(smallest, 16, 8, 2)
    if head_dim > 128:
        return TileConfig(min(block_m, 64), 32, 4 if block_m < 64 else 8, 2)
    if block_m < 64:
        return TileConfig(block_m, 64, 4, 3)
    # Without wgmma both operands sit in registers: 64 keys per step spill there at D = 128.
    block_n = 64 if hopper or head_dim <= 64 else 32
    if block_m == 64:
        return TileConfig(64, block_n, 4, 2 if hopper else 3)
    return TileConfig(128, block_n, 8, 3)


def plan_tiles(
    positions: Tensor,
    n_keys: int,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    window: int | None = None,
    config: TileConfig | None = None,
    n_splits: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    on_device: bool = False,
) -> TilePlan:
    """Cut sorted ``positions`` ``[n_q]`` into tiles and their key ranges (reads them on the host).

    Args:
        config, n_splits: instead of the ones chosen for the shape. Splits are added until the GPU
            has about two programs per processor, none shorter than four key blocks.
        dtype: of q, k and v; fp32 needs smaller tiles.
        on_device: work where the positions are and read nothing back: they must ascend, unchecked.

    Raises:
        ValueError: positions do not ascend, heads do not divide, or ``G`` exceeds the tile.
    """
    group = n_heads // n_kv_heads
    config = config or tile_config(positions.numel(), group, head_dim, dtype)
    if group * n_kv_heads != n_heads or not 0 < group <= config.block_m:
        raise ValueError(
            f"H must be a multiple of HK and G = H / HK at most block_m; got H={n_heads}, "
            f"HK={n_kv_heads}, block_m={config.block_m}"
        )
    pos = positions.to(positions.device if on_device else "cpu", torch.int64)
    if not on_device and bool((pos[1:] < pos[:-1]).any()):
        raise ValueError(
            "positions must ascend: sort them with torch.sort, apply its indices to q, and undo "
            "them on the output"
        )
    per_tile, bn = config.block_m // group, config.block_n
    start = torch.arange(0, pos.numel(), per_tile, device=pos.device)
    low = pos[start]
    high = pos[(start + per_tile).clamp(max=pos.numel()) - 1]
    key_end = (high + 1).clamp(0, n_keys)
    end = (key_end + bn - 1) // bn
    begin, full_begin = torch.zeros_like(end), torch.zeros_like(end)
    if window is not None:
        begin = torch.minimum((low - window + 1).clamp(min=0) // bn, end)
        full_begin = torch.minimum((high - window + 1).clamp(min=0).add(bn - 1) // bn, end)
    full_end = torch.maximum((low + 1).clamp(0, n_keys) // bn, full_begin)
    full_end = torch.minimum(full_end, end)
    tiles = start.numel()
    if n_splits is None:
        longest = -(-n_keys // bn) if on_device or not tiles else int((end - begin).max())
        wanted = -(-2 * processors() // max(1, tiles * n_kv_heads))
        n_splits = max(1, min(wanted, longest // 4, MAX_SPLITS))
    split = torch.arange(n_splits, device=pos.device)[None, :]
    span = (end - begin)[:, None]
    first = begin[:, None] + span * split // n_splits
    last = begin[:, None] + span * (split + 1) // n_splits

    def clip(bound: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(bound[:, None], first), last)

    tile = torch.arange(tiles, device=pos.device)[:, None].expand_as(first)
    columns = [tile, split.expand_as(first), first, clip(full_begin), clip(full_end), last]
    columns += [key_end[:, None].expand_as(first), torch.zeros_like(first)]
    items = torch.stack(columns, -1).reshape(-1, ITEM)
    order = torch.argsort(items[:, 5] - items[:, 2], descending=True, stable=True)
    return TilePlan(
        items[order].to(positions.device, torch.int32), pos.to(positions.device, torch.int32),
        n_splits, n_keys, window, group, head_dim, config,
    )  # fmt: skip
