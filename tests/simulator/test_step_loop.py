"""The plain engine loop and the step profile: conservation, preemption, prefix reuse."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from cachetune.core.errors import CapacityError, ProfileError
from cachetune.simulator.expert_profile import ExpertProfile, ExpertTable, Routing
from cachetune.simulator.operator_tables import load_step_profile
from cachetune.simulator.step_loop import StepLoop
from cachetune.simulator.step_profile import Collective, Curve, Step
from cachetune.simulator.step_scheduler import Arrival, EngineLimits
from serving_support import alone, write_profile


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


def test_idle_engine_is_one_prefill_and_then_decodes() -> None:
    cost = Ticks()
    (life,) = StepLoop(limits(), alone(cost), [Arrival(5.0, 100, 3)]).run()
    assert life.queued_s == 5.0
    assert life.first_token_s == 7.0  # 64 tokens, then 36
    assert life.last_token_s == 9.0
    assert (cost.prefill, cost.decode) == (100, 2)


def test_memory_shortage_preempts_the_last_and_all_end() -> None:
    cost = Ticks()
    arrivals = [Arrival(0.0, 30, 40) for _ in range(4)]
    loop = StepLoop(limits(n_blocks=12), alone(cost), arrivals)
    lives = loop.run()
    assert loop.n_preemptions > 0
    assert lives[0].n_preemptions == 0
    assert all(0 < x.first_token_s <= x.last_token_s for x in lives)
    assert len(loop.engines[0].blocks.free) == 12
    recomputed = cost.prefill - 4 * 30
    assert recomputed > 0
    free = StepLoop(limits(), alone(Ticks()), arrivals).run()
    assert max(x.last_token_s for x in free) <= max(x.last_token_s for x in lives)


def test_shared_blocks_are_not_computed_twice() -> None:
    same = (1, 2, 3)
    arrivals = [Arrival(0.0, 50, 2, same), Arrival(10.0, 50, 2, same)]
    cost = Ticks()
    lives = StepLoop(limits(n_blocks=20), alone(cost), arrivals).run()
    assert [x.n_cached_tokens for x in lives] == [0, 48]
    off = Ticks()
    StepLoop(limits(n_blocks=20, prefix_caching=False), alone(off), arrivals).run()
    assert (cost.prefill, off.prefill) == (52, 100)


def test_a_request_that_cannot_fit_is_refused() -> None:
    with pytest.raises(CapacityError, match="2 blocks of 16 tokens for 60 tokens"):
        StepLoop(limits(n_blocks=2), alone(Ticks()), [Arrival(0.0, 50, 10)])


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


def test_engines_in_lockstep_share_steps_and_requests() -> None:
    steps: list[tuple[int, ...]] = []

    def seconds(parts: Sequence[Step]) -> float:
        steps.append(tuple(p.n_tokens for p in parts))
        return 1.0

    arrivals = [Arrival(0.0, 40, 3), Arrival(0.0, 40, 3), Arrival(0.0, 30, 3)]
    loop = StepLoop(limits(), seconds, arrivals, n_engines=2)
    lives = loop.run()
    # 64 tokens to a step: the first engine takes 40 and 24 of the third prompt, then its rest.
    assert steps[:2] == [(64, 40), (7, 1)]
    assert [x.first_token_s for x in lives] == [1.0, 1.0, 2.0]
    assert sum(map(sum, steps)) == 110 + 2 * 3
    assert loop.n_steps == len(steps)
    alike = StepLoop(limits(), lambda parts: 1.0, arrivals[:1], n_engines=2).run()
    assert alike[0].last_token_s == 3.0


def test_an_expert_step_waits_for_the_slowest_engine_and_moves_every_row(tmp_path: Path) -> None:
    folder = write_profile(tmp_path)
    table = ["tokens,activated_experts,time_us", "1,8,10", "64,64,100", "64,128,200"]
    (folder / "moe.csv").write_text("\n".join(table))
    with pytest.raises(ProfileError, match="both have experts"):
        load_step_profile(folder, 2)
    routing = Routing(n_experts=128, n_used=8)
    profile = load_step_profile(folder, 2, routing)
    assert isinstance(profile, ExpertProfile)
    profile.dispatch, profile.combine = Collective(3.0, 0.5), Collective(2.0, 0.25)
    busy, idle = Step([(64, 0)], 0, 0), Step([], 0, 0)
    activated = 64 * (1 - (15 / 16) ** 65)
    assert routing.activated(65, 2) == pytest.approx(activated)
    layer_us = (
        profile.layer_us(busy, 64)
        + 5.0 + 0.75 * 65
        + profile.experts.at(65 / 2, activated)
    )  # fmt: skip
    us = 2 * layer_us + profile.once_a_step_us(busy, 64)
    assert profile.steps_s([busy, idle]) == pytest.approx(us * 1e-6)
    assert profile.steps_s([idle, idle]) == 0.0
    # One engine has all experts, and moves nothing.
    alone_us = profile.experts.at(64, 128 * (1 - (15 / 16) ** 64))
    profile.dispatch = profile.combine = Collective()
    us = 2 * (profile.layer_us(busy, 64) + alone_us) + profile.once_a_step_us(busy, 64)
    assert profile.step_s([(64, 0)], 0, 0) == pytest.approx(us * 1e-6)
    profile.capture_sizes = (8, 16)
    small = Step([], 1, 40, 40)
    # Graphs are of one size on all engines: the rows of the larger step on both.
    assert profile.steps_s([Step([], 12, 480, 40), small]) == pytest.approx(
        profile.steps_s([small, Step([], 12, 480, 40)])
    )


def test_experts_lie_between_what_was_measured() -> None:
    table = ExpertTable((8, 16), (Curve((8, 64), (10.0, 80.0)), Curve((8, 64), (20.0, 100.0))))
    assert table.at(8, 64) == 80.0
    assert table.at(12, 8) == 15.0
    assert table.at(24, 64) == 120.0  # the slope of the last stretch
    assert table.at(1, 2) == 10.0  # not below what was measured
