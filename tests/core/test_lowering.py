"""A decision becomes ops: groups, loads, pieces, pairs, dependencies."""

from __future__ import annotations

import itertools
import random

import pytest
from cachetune.core import lowering
from cachetune.core.decision import ReuseDecision
from cachetune.core.layout import n_reads, read_bytes
from cachetune.core.lowering import lower
from cachetune.core.model_spec import ModelSpec
from cachetune.core.ops import Op, Schedule
from cachetune.core.plan import RatioRule, ReusePlan
from cachetune.core.policies import decide
from support import make_entry, make_model

TOKENS = (64, 64, 32)


def decision_of(
    plan: ReusePlan, tokens: tuple[int, ...] = TOKENS, suffix: int = 8
) -> ReuseDecision:
    found = [make_entry(f"c{i}", n) for i, n in enumerate(tokens)]
    return decide(plan, found, tokens, suffix)


def lowered(
    plan: ReusePlan, tokens: tuple[int, ...] = TOKENS, model: ModelSpec | None = None
) -> list[list[Op]]:
    decision = decision_of(plan, tokens)
    return lower(0, decision, plan, model or make_model(), itertools.count().__next__)


def flat(pieces: list[list[Op]]) -> list[Op]:
    return list(Schedule.of(op for piece in pieces for op in piece).ops)


def plan_of(*ratios: float, **knobs: object) -> ReusePlan:
    rules = (RatioRule(ratios=ratios or (0.25,)),)
    return ReusePlan(**{"rules": rules, "layer_group": 2, **knobs})  # type: ignore[arg-type]


def test_one_prompt_as_a_table():
    """Chunk 0 is exact, 1 and 2 recompute a quarter; two groups of two layers."""
    ops = flat(lowered(plan_of()))
    table = [(op.kind, op.stream, op.layer_start, op.layer_stop, op.n_tokens) for op in ops]
    assert table == [
        ("load", "io.dram.0", 0, 2, 64 + 48 + 24),
        ("restore", "restore", 0, 2, 136),
        ("prefill", "compute", 0, 2, 16 + 8 + 8),
        ("load", "io.dram.0", 2, 4, 136),
        ("restore", "restore", 2, 4, 136),
        ("prefill", "compute", 2, 4, 32),
        ("head", "compute", 4, 4, 1),
    ]
    assert [op.deps for op in ops] == [(), (0,), (1,), (), (3,), (4, 2), (5,)]


@pytest.mark.parametrize("load_order", ["layer", "chunk"])
@pytest.mark.parametrize("policy", ["cachetune", "cacheblend"])
def test_more_layers_look_no_oftener_at_each_chunk(
    load_order: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers of one regime are alike, and a prompt of many chunks waits for this."""
    plan, looks = plan_of(0.5, 0.25, load_order=load_order, policy=policy), []
    monkeypatch.setattr(lowering, "n_reads", lambda *sizes: looks.append(sizes) or n_reads(*sizes))
    for n_layers in (4, 32):
        lowered(plan, (64,) * 16, make_model(n_layers=n_layers))
    half = len(looks) // 2
    assert half and looks[:half] == looks[half:]


def test_load_bytes_are_whole_sectors_of_a_prefix():
    model = make_model()
    load, restore = flat(lowered(plan_of(request_bytes=4096)))[:2]
    sizes = [read_bytes(model, rows) for rows in (64, 48, 24)]
    assert sizes == [8192, 8192, 4096]
    assert load.n_bytes == 2 * sum(sizes)
    assert load.n_reads == 2 * sum(n_reads(size, 4096) for size in sizes) == 10
    assert restore.n_bytes == 136 * 2 * model.kv_bytes_per_token_layer
    assert restore.n_reads == 3 * 2


def test_chunks_take_turns_on_io_workers():
    loads = [op for op in flat(lowered(plan_of(n_io_workers=2))) if op.kind == "load"]
    assert [(op.stream, op.chunks) for op in loads] == [
        ("io.dram.0", (0, 2)),
        ("io.dram.1", (1,)),
    ] * 2


def test_chunk_order_loads_all_layers_of_a_chunk_at_once():
    ops = flat(lowered(plan_of(load_order="chunk", n_io_workers=2)))
    loads = [op for op in ops if op.kind == "load"]
    assert [(op.stream, op.chunks, op.layer_start, op.layer_stop) for op in loads] == [
        ("io.dram.0", (0,), 0, 4),
        ("io.dram.1", (1,), 0, 4),
        ("io.dram.0", (2,), 0, 4),
    ]
    for restore in (op for op in ops if op.kind == "restore"):
        assert restore.deps == (0, 1, 2)


def test_chunk_order_loads_a_row_that_only_the_last_layers_want():
    """One row in two of four layers is less than a row per layer; it is restored all the same."""
    plan = plan_of(1.0, 0.5, load_order="chunk", layer_group=1)
    ops = flat(lowered(plan, (64, 2)))
    rows = {op.chunks: op.n_tokens for op in ops if op.kind == "load"}
    assert rows[1,] == 0 and set(rows) == {(0,), (1,)}
    restored = [op.layer_start for op in ops if op.kind == "restore" and 1 in op.chunks]
    assert restored == [2, 3]


@pytest.mark.parametrize("look_ahead", [1, 2, 3])
def test_loads_run_at_most_look_ahead_groups_before_compute(look_ahead: int):
    ops = flat(lowered(plan_of(layer_group=1, look_ahead=look_ahead)))
    prefills = [op.op_id for op in ops if op.kind == "prefill"]
    for g, load in enumerate(op for op in ops if op.kind == "load"):
        gate = g - 1 - look_ahead
        assert load.deps == ((prefills[gate],) if gate >= 0 else ())


@pytest.mark.parametrize("layer_group", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(
    "ratios", [(0.5,), (0.5, 0.25), (0.9, 0.5, 0.1), (0.8, 0.6, 0.4, 0.2, 0.0)]
)
def test_groups_cover_every_layer_and_never_cross_bands(
    layer_group: int, ratios: tuple[float, ...]
):
    model = make_model(n_layers=8)
    plan = plan_of(*ratios, layer_group=layer_group)
    decision = decision_of(plan)
    for kind in ("load", "restore", "prefill"):
        ops = [op for op in flat(lowered(plan, model=model)) if op.kind == kind]
        assert [layer for op in ops for layer in range(op.layer_start, op.layer_stop)] == list(
            range(8)
        )
        for op in ops:
            assert op.n_layers <= layer_group
            assert len({decision.band_of(n, 8) for n in range(op.layer_start, op.layer_stop)}) == 1


def test_rows_are_what_the_decision_says_layer_by_layer():
    model = make_model(n_layers=6)
    for policy in (
        "full_recompute",
        "prefix_cache",
        "full_reuse",
        "epic",
        "cachetune",
        "cacheblend",
    ):
        plan = plan_of(0.9, 0.5, 0.1, policy=policy, prefill_chunk_tokens=40)
        decision = decision_of(plan)
        rows, restored = [0] * 6, [0] * 6
        for op in flat(lowered(plan, model=model)):
            for layer in range(op.layer_start, op.layer_stop):
                rows[layer] += op.n_tokens * (op.kind == "prefill")
                restored[layer] += op.n_tokens * (op.kind == "restore")
        assert rows == [decision.n_computed(layer, 6) for layer in range(6)]
        for layer in range(6):
            assert restored[layer] == sum(decision.n_loaded(i, layer, 6) for i in range(3))


@pytest.mark.parametrize("budget", [16, 17, 50, 64, 1000])
def test_pieces_never_exceed_the_budget(budget: int):
    pieces = lowered(plan_of(policy="full_recompute", prefill_chunk_tokens=budget))
    sizes = [{op.n_tokens for op in piece if op.kind == "prefill"} for piece in pieces]
    assert all(len(s) == 1 for s in sizes)
    rows = [n for s in sizes for n in s]
    assert rows == [budget] * (168 // budget) + [168 % budget] * bool(168 % budget)
    assert [op.kind for op in flat(pieces)].count("head") == 1 and pieces[-1][-1].kind == "head"


def test_loads_belong_to_the_first_piece():
    pieces = lowered(plan_of(prefill_chunk_tokens=16))
    assert len(pieces) == 2
    assert {op.kind for op in pieces[1]} == {"prefill", "head"}
    assert {op.piece for op in pieces[1] if op.kind == "prefill"} == {1}


@pytest.mark.parametrize("seed", range(5))
def test_pairs_of_a_full_recompute_equal_brute_force(seed: int):
    draw = random.Random(seed)
    tokens = tuple(draw.randint(1, 90) for _ in range(draw.randint(0, 4)))
    window = draw.choice([None, None, 8])
    plan = plan_of(policy="full_recompute", prefill_chunk_tokens=draw.randint(16, 300))
    ops = flat(lowered(plan, tokens, make_model(sliding_window=window)))
    n_prompt = sum(tokens) + 8
    exact = sum(p + 1 for p in range(n_prompt))
    pairs = sum(op.n_pairs for op in ops if op.kind == "prefill" and op.layer_start == 0)
    if window is None:
        assert pairs == exact
    else:
        assert pairs <= min(exact, window * n_prompt)


def test_pairs_of_recomputed_tokens_are_those_of_evenly_spread_ones():
    """16 of chunk 1's 64 tokens behind 64 others, then the suffix behind everything."""
    plan = plan_of()
    prefill = next(op for op in flat(lowered(plan, (64, 64))) if op.kind == "prefill")
    spread = sum(64 + 4 * i + 2.5 for i in range(16))
    suffix = sum(128 + i + 1 for i in range(8))
    assert prefill.n_pairs == pytest.approx(spread + suffix, rel=0.01)


def test_cacheblend_selects_once_before_the_check_layer():
    ops = flat(lowered(plan_of(policy="cacheblend")))
    table = [(op.kind, op.layer_start, op.layer_stop, op.n_tokens) for op in ops]
    assert table == [
        ("prefill", 0, 1, 168),
        ("load", 1, 3, 160),
        ("select", 1, 2, 168),
        ("restore", 1, 3, 160),
        ("prefill", 1, 3, 16 + 8 + 8),
        ("load", 3, 4, 160),
        ("restore", 3, 4, 160),
        ("prefill", 3, 4, 32),
        ("head", 4, 4, 1),
    ]
    assert ops[2].deps == (1, 0)
    assert ops[4].deps == (3, 2, 0)


def test_a_model_of_one_layer_is_all_below_the_check_layer():
    """CacheBlend then loads nothing, in either order."""
    for order in ("layer", "chunk"):
        plan = plan_of(policy="cacheblend", load_order=order)
        ops = flat(lowered(plan, model=make_model(n_layers=1)))
        assert [(op.kind, op.n_tokens) for op in ops] == [("prefill", 168), ("head", 1)]


def test_a_prompt_without_chunks_is_its_suffix():
    ops = flat(lowered(plan_of(), ()))
    assert [(op.kind, op.n_tokens) for op in ops] == [("prefill", 8), ("prefill", 8), ("head", 1)]
