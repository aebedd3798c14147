"""What each policy decides for chunks a, b, c of 100, 50, 30 tokens and a suffix of 7."""

from __future__ import annotations

import pytest
from cachetune.core.chunk_index import ChunkEntry
from cachetune.core.decision import ReuseDecision
from cachetune.core.errors import PlanError
from cachetune.core.plan import RatioRule, ReusePlan
from cachetune.core.policies import decide, n_recomputed, order_of
from support import make_entry

TOKENS = (100, 50, 30)
N_LAYERS = 8
A, B, C = (make_entry(name, n) for name, n in zip("abc", TOKENS, strict=True))
EXACT_B = make_entry("b", 50, chain=["a"])


def by(policy: str, *found: ChunkEntry | None, **knobs: object) -> ReuseDecision:
    return decide(ReusePlan(policy=policy, **knobs), found, TOKENS, 7)  # type: ignore[arg-type]


def loaded(decision: ReuseDecision, layer: int = 0) -> list[int]:
    """Tokens loaded of each chunk in one layer."""
    return [decision.n_loaded(i, layer, N_LAYERS) for i in range(len(decision.chunks))]


def computed(decision: ReuseDecision, layer: int = 0) -> int:
    return decision.n_computed(layer, N_LAYERS)


def rules(*ratios: float, **more: object) -> tuple[RatioRule, ...]:
    return (RatioRule(ratios=ratios, **more),)  # type: ignore[arg-type]


def test_full_recompute_loads_nothing():
    decision = by("full_recompute", A, B, C)
    assert loaded(decision) == [0, 0, 0]
    assert computed(decision) == 187


def test_full_reuse_loads_what_there_is():
    decision = by("full_reuse", A, None, C)
    assert loaded(decision) == [100, 0, 30]
    assert computed(decision) == 50 + 7


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ((A, B, C), [100, 0, 0]),
        ((A, EXACT_B, C), [100, 50, 0]),
        ((None, EXACT_B, C), [0, 0, 0]),
        ((None, B, C), [0, 0, 0]),
    ],
)
def test_prefix_cache_stops_at_the_first_gap(
    found: tuple[ChunkEntry | None, ...], expected: list[int]
):
    decision = by("prefix_cache", *found)
    assert loaded(decision) == expected
    assert computed(decision) == 187 - sum(expected)


def test_cachetune_recomputes_a_share_of_what_is_not_exact():
    decision = by("cachetune", A, B, C, rules=rules(0.3))
    assert [c.exact for c in decision.chunks] == [True, False, False]
    assert loaded(decision) == [100, 35, 21]
    assert computed(decision) == 15 + 9 + 7


def test_cachetune_ratio_falls_band_by_band():
    """Four bands of two layers; the first chunk is exact in all of them."""
    decision = by("cachetune", A, B, C, rules=rules(1.0, 0.5, 0.2, 0.0))
    by_layer = [(loaded(decision, layer), computed(decision, layer)) for layer in range(N_LAYERS)]
    assert by_layer[::2] == by_layer[1::2]
    assert by_layer[::2] == [
        ([100, 0, 0], 87),
        ([100, 25, 15], 47),
        ([100, 40, 24], 23),
        ([100, 50, 30], 7),
    ]


def test_bands_of_several_rules_are_stretched_to_the_longest():
    disk_b = make_entry("b", 50, tier="disk")
    two = (RatioRule(tier="disk", ratios=(0.8, 0.4)), RatioRule(ratios=(0.1,)))
    decision = by("cachetune", None, disk_b, C, rules=two)
    assert [c.n_recompute for c in decision.chunks] == [(100, 100), (40, 20), (3, 3)]


def test_ratio_one_loads_only_what_is_exact():
    decision = by("cachetune", A, B, C, rules=rules(1.0))
    assert loaded(decision) == [100, 0, 0]
    assert [c.tier for c in decision.chunks] == ["dram", "", ""]


@pytest.mark.parametrize(
    "policy", ["prefix_cache", "full_reuse", "cacheblend", "epic", "cachetune"]
)
def test_ratio_one_without_exact_loads_is_full_recompute(policy: str):
    rule = rules(1.0, load_exact=False)
    assert by(policy, A, EXACT_B, C, rules=rule) == by("full_recompute", A, B, C)


def test_prefix_entries_are_loaded_whole():
    decision = by("cachetune", A, EXACT_B, C, rules=rules(0.5))
    assert loaded(decision) == [100, 50, 15]
    assert [c.exact for c in decision.chunks] == [True, True, False]


def test_load_exact_false_computes_what_is_exact():
    decision = by("cachetune", A, EXACT_B, C, rules=rules(0.5, load_exact=False))
    assert loaded(decision) == [0, 0, 15]


def test_epic_recomputes_the_first_tokens_of_each_chunk():
    decision = by("epic", A, B, C, epic_tokens=40)
    assert loaded(decision) == [100, 10, 0]
    assert computed(decision) == 40 + 30 + 7
    assert order_of(ReusePlan(policy="epic")) == "chunk_start"


def test_cacheblend_computes_all_below_the_check_layer():
    decision = by("cacheblend", A, B, None, rules=rules(0.2))
    assert (decision.selection, decision.check_layer) == ("deviation", 1)
    assert decision.n_selected == 10
    assert (loaded(decision, 0), computed(decision, 0)) == ([0, 0, 0], 187)
    assert (loaded(decision, 1), computed(decision, 1)) == ([100, 50, 0], 30 + 10 + 7)


def test_cacheblend_with_nothing_kept_is_full_recompute():
    assert by("cacheblend", None, None, None) == by("full_recompute", A, B, C)


def test_every_policy_accounts_for_every_token():
    found = (A, EXACT_B, C)
    for policy in ("full_recompute", "prefix_cache", "full_reuse", "epic", "cachetune"):
        decision = by(policy, *found, rules=rules(0.9, 0.3))
        for layer in range(N_LAYERS):
            assert sum(loaded(decision, layer)) + computed(decision, layer) == 187


def test_a_rule_for_short_prompts_needs_one_for_the_others():
    plan = ReusePlan(rules=(RatioRule(max_prompt_tokens=10),))
    with pytest.raises(PlanError, match="a rule must match every chunk"):
        decide(plan, (A, B, C), TOKENS, 7)


@pytest.mark.parametrize(("ratio", "n", "expected"), [(0.1, 30, 3), (0.29, 100, 29), (1.0, 7, 7)])
def test_recomputed_tokens_survive_the_last_bit(ratio: float, n: int, expected: int):
    assert n_recomputed(ratio, n) == expected
