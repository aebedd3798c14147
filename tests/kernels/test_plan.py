"""The host-built tile plan: every visible key exactly once, and no block unmasked by mistake."""

import pytest

pytest.importorskip("triton", reason="triton is not installed; the plan belongs to its kernel")

import torch
from cachetune.kernels.tile_plan import TileConfig, plan_tiles
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_plan_covers_each_visible_key_once(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 400))
    n_q = data.draw(st.integers(1, min(n, 60)))
    n_keys = data.draw(st.integers(0, n))
    group = data.draw(st.integers(1, 8))
    window = data.draw(st.none() | st.integers(1, n + 10))
    splits = data.draw(st.none() | st.integers(1, 5))
    block_n = data.draw(st.sampled_from([16, 64]))
    seed = data.draw(st.integers(0, 2**20))
    pos = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:n_q].sort().values
    config = TileConfig(16, block_n, 4, 1)
    plan = plan_tiles(pos, n_keys, 2 * group, 2, 64, window, config, splits)
    key = torch.arange(n_keys)
    visible = key <= pos[:, None]
    if window:
        visible &= key > pos[:, None] - window
    times = torch.zeros(n_q, n_keys, dtype=torch.int64)
    per_tile = 16 // group
    for tile, _, begin, full_begin, full_end, end, key_end, _ in plan.items.tolist():
        assert begin <= full_begin <= full_end <= end
        rows = slice(tile * per_tile, (tile + 1) * per_tile)
        assert visible[rows, full_begin * block_n : full_end * block_n].all(), "mask skipped"
        assert full_end * block_n <= n_keys or full_begin == full_end
        assert not visible[rows, key_end:].any()
        times[rows, begin * block_n : end * block_n] += 1
    assert (times[visible] == 1).all()
    assert (times <= 1).all()


def test_plan_is_longest_first_and_masks_little() -> None:
    pos = torch.arange(0, 32768, 8)
    plan = plan_tiles(pos, 32768, 32, 8, 128)
    blocks = plan.items[:, 5] - plan.items[:, 2]
    assert (blocks[1:] <= blocks[:-1]).all()
    masked = blocks - (plan.items[:, 4] - plan.items[:, 3])
    assert plan.n_splits == 1
    assert masked.sum() < 0.02 * blocks.sum()


def test_few_queries_split_the_keys() -> None:
    plan = plan_tiles(torch.tensor([32767]), 32768, 32, 8, 128)
    assert plan.n_splits > 8
    blocks = plan.items[:, 5] - plan.items[:, 2]
    assert blocks.max() - blocks.min() <= 1


def test_plan_refuses_bad_input() -> None:
    with pytest.raises(ValueError, match="ascend"):
        plan_tiles(torch.tensor([3, 1]), 8, 2, 1, 64)
    with pytest.raises(ValueError, match="multiple"):
        plan_tiles(torch.tensor([1]), 8, 5, 2, 64)
