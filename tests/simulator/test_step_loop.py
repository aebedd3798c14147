"""The plain engine loop and the step profile: conservation, preemption, prefix reuse."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from cachetune.core.errors import CapacityError, ProfileError
from cachetune.simulator.operator_tables import load_step_profile
from cachetune.simulator.step_loop import Arrival, EngineLimits, StepLoop
from cachetune.simulator.step_profile import Curve


class Ticks:
    """Every step takes 1 s, and its tokens are counted."""

    def __init__(self) -> None:
        self.prefill = self.decode = 0

    def step_s(
        self,
        pieces: Sequence[tuple[int, int]],
        n_decode: int,
        kv_decode_tokens: int,
        kv_decode_max: int | None = None,
    ) -> float:
        self.prefill += sum(q for q, _ in pieces)
        self.decode += n_decode
        return 1.0


def limits(n_blocks: int | None = None, **changes: bool) -> EngineLimits:
    return EngineLimits(4, 64, n_blocks, **changes)


def write_profile(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    dense = ["layer,tokens,time_us"]
    for name in ("qkv_proj", "o_proj", "layernorm", "embedding"):
        dense += [f"{name},{t},{t}" for t in (1, 64, 2048)]
    (folder / "dense.csv").write_text("\n".join(dense))
    (folder / "per_sequence.csv").write_text("layer,sequences,time_us\nlm_head,1,7\nlm_head,64,7")
    rows = ["prefill_chunk,kv_prefill,n_decode,kv_decode,time_us"]
    for q in (0, 16, 32, 2048):
        for c in (0, 64, 1024) if q else (0,):
            for n in (0, 1, 64):
                for kv in (16, 64, 4096) if n else (0,):
                    if (q or n) and (q, c, n, kv) != (32, 64, 1, 64):  # one hole
                        rows.append(f"{q},{c},{n},{kv},{q * c / 64 + q * q / 128 + n * kv / 8}")
    (folder / "attention.csv").write_text("\n".join(rows))
    return folder


def test_idle_engine_is_one_prefill_and_then_decodes() -> None:
    cost = Ticks()
    (life,) = StepLoop(limits(), cost, [Arrival(5.0, 100, 3)]).run()
    assert life.queued_s == 5.0
    assert life.first_token_s == 7.0  # 64 tokens, then 36
    assert life.last_token_s == 9.0
    assert (cost.prefill, cost.decode) == (100, 2)


def test_memory_shortage_preempts_the_last_and_all_end() -> None:
    cost = Ticks()
    arrivals = [Arrival(0.0, 30, 40) for _ in range(4)]
    loop = StepLoop(limits(n_blocks=12), cost, arrivals)
    lives = loop.run()
    assert loop.n_preemptions > 0
    assert lives[0].n_preemptions == 0
    assert all(0 < x.first_token_s <= x.last_token_s for x in lives)
    assert len(loop.blocks.free) == 12
    recomputed = cost.prefill - 4 * 30
    assert recomputed > 0
    free = StepLoop(limits(), Ticks(), arrivals).run()
    assert max(x.last_token_s for x in free) <= max(x.last_token_s for x in lives)


def test_shared_blocks_are_not_computed_twice() -> None:
    same = (1, 2, 3)
    arrivals = [Arrival(0.0, 50, 2, same), Arrival(10.0, 50, 2, same)]
    cost = Ticks()
    lives = StepLoop(limits(n_blocks=20), cost, arrivals).run()
    assert [x.n_cached_tokens for x in lives] == [0, 48]
    off = Ticks()
    StepLoop(limits(n_blocks=20, prefix_caching=False), off, arrivals).run()
    assert (cost.prefill, off.prefill) == (52, 100)


def test_a_request_that_cannot_fit_is_refused() -> None:
    with pytest.raises(CapacityError, match="2 blocks of 16 tokens for 60 tokens"):
        StepLoop(limits(n_blocks=2), Ticks(), [Arrival(0.0, 50, 10)])


def test_profile_is_exact_on_its_grid_and_linear_between(tmp_path: Path) -> None:
    p = load_step_profile(write_profile(tmp_path / "tp1"), n_layers=2)
    assert p.attention_us([(16, 64)], 0, 0, None) == pytest.approx(16 + 2)
    assert p.attention_us([], 32, 32 * 2000, None) == pytest.approx(32 * 2000 / 8)
    dense = 64 * 2 + 64 * 2  # the norm counts twice
    assert p.step_s([(64, 0)], 0, 0) > (2 * dense + 64 + 7) * 1e-6
    assert not p.beyond_grid
    far = p.attention_us([(4096, 0)], 0, 0, None)
    assert far == pytest.approx(4096**2 / 128, rel=0.05)
    assert p.beyond_grid


def test_decode_run_is_the_sum_of_its_steps(tmp_path: Path) -> None:
    p = load_step_profile(write_profile(tmp_path / "tp1"), n_layers=2)
    one_by_one = sum(p.step_s((), 8, 8 * (40 + i)) for i in range(300))
    assert p.decode_run_s(8, 8 * 40, 300) == pytest.approx(one_by_one, rel=1e-9)


def test_bad_table_names_line_and_field(tmp_path: Path) -> None:
    folder = write_profile(tmp_path / "tp1")
    (folder / "dense.csv").write_text("layer,tokens,time_us\nqkv_proj,1,abc")
    with pytest.raises(ProfileError, match="line 2: time_us"):
        load_step_profile(folder, 2)


def test_matrix_products_work_on_whole_tiles_of_rows() -> None:
    stairs = Curve((1, 8, 128, 144, 160), (5.0, 5.0, 10.0, 20.0, 21.0))
    assert [stairs.at_tile(n) for n in (8, 128, 129, 143, 144, 160)] == [5, 10, 20, 20, 20, 21]
    assert stairs.at(129) < stairs.at_tile(129), "a line cuts off the foot of the stair"
    assert stairs.at_tile(170) == stairs.at(176)
