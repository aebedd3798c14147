"""Tiers from which loading takes longer than computing: what pays is loaded, by a plan's rules."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from cachetune.core.chunk_index import ChunkEntry
from cachetune.core.plan import ReusePlan
from cachetune.core.policies import IDLE, Backlog, decide, room
from cachetune.simulator.serving import serve_trace
from cachetune.simulator.serving_fleet import ReusePolicy, ServingLimits
from serving_support import LinearCost, make_fleet, make_table, make_tier, random_table

COST = LinearCost(step=1e-3, token=2e-5, pair=1e-9, decode=1e-5, context=2e-8)
NEVER = {"reuse": {"rho": {"disk": 1e9}, "epic_tokens": 4}}
CHUNKS = [0, 1, 2, 3]
REUSING = ("prefix_cache", "full_reuse", "cacheblend", "epic", "cachetune")


@pytest.mark.parametrize("policy", REUSING)
@pytest.mark.parametrize("shared", [False, True])
def test_a_tier_that_no_prompt_loads_from_changes_nothing(policy: str, shared: bool) -> None:
    """What leaves the first tier comes back to it as if the slow one had not kept it."""
    unloaded = 0
    for seed in range(6):
        draw = random.Random(seed)
        table = random_table(draw, chained=draw.random() < 0.5)
        first = make_tier("dram", 1e7, capacity_bytes=60_000)
        tiers = [first, make_tier("disk", 1e5, shared=shared)]
        alone = serve_trace(table, make_fleet(policy=policy, tiers=[first], **NEVER), COST)
        both = serve_trace(table, make_fleet(policy=policy, tiers=tiers, **NEVER), COST)
        assert (alone.end_ns == both.end_ns).all()
        assert (alone.loaded_tokens[:, 0] == both.loaded_tokens[:, 0]).all()
        assert not both.loaded_tokens[:, 1].any() and not alone.unloaded_tokens.any()
        assert (both.unloaded_tokens <= both.computed_tokens).all()
        unloaded += both.summary()["unloaded_tokens"]
    assert unloaded > 0


def test_so_much_is_loaded_as_is_there_in_time() -> None:
    """At three times the time, of 100 tokens: 32 alone, or 48 as another waits, (100 / (3 - 1));
    behind 52 rows and 48 tokens on their way 0; all that there is behind 284 rows."""
    rows = [CHUNKS, CHUNKS, CHUNKS, [*range(5, 41)], CHUNKS]
    table = make_table([100, 100, 100, 36 * 16 + 8, 100], [1] * 5, [0.0, 1e3, 1e3, 2e3, 2e3], rows)
    fleet = make_fleet(
        policy="full_reuse",
        tiers=[make_tier(rate=1e6 / 3)],
        limits=ServingLimits(prefix_caching=False, max_num_seqs=8, max_num_batched_tokens=300),
        reuse={"rho": {"dram": 3.0}},
    )
    result = serve_trace(table, fleet, LinearCost(token=1e-3, decode=1e-3))
    assert result.loaded_tokens[:, 0].tolist() == [0, 48, 0, 0, 64]
    assert result.unloaded_tokens.tolist() == [0, 16, 64, 0, 0]
    assert result.written_bytes.tolist() == [40 * 16_000], "what is there is not written again"
    assert result.columns()["unloaded_tokens"].tolist() == result.unloaded_tokens.tolist()


@pytest.mark.parametrize(
    ("rho", "backlog", "loading", "expected"),
    [
        (0.9, IDLE, 10**9, math.inf),
        (4.0, IDLE, 0, 250),
        (4.0, IDLE, 50, 200),
        (4.0, Backlog(n_ahead=800), 0, 450),
        (1.25, IDLE, 0, 800),
        (1.25, Backlog(n_ahead=9000), 0, 8000),
        (4.0, Backlog(n_behind=2, n_behind_rows=9000), 0, 500),
        (4.0, Backlog(n_behind=9, n_behind_rows=9000), 0, 2500),
    ],
)
def test_room(rho: float, backlog: Backlog, loading: int, expected: float) -> None:
    """Of a prompt of 1,000 tokens in pieces of 2,000."""
    assert room(rho, 1000, 2000, loading, backlog) == pytest.approx(expected)


def test_what_is_computed_again_moves_up() -> None:
    rows = [CHUNKS, [4, 5, 6, 7], CHUNKS]
    table = make_table([70] * 3, [1] * 3, [0.0, 100.0, 200.0], rows, chained=True)
    tiers = [make_tier("dram", 1e8, capacity_bytes=64_000), make_tier("disk", 1e6)]
    result = serve_trace(table, make_fleet(policy="cachetune", tiers=tiers, **NEVER), COST)
    assert result.unloaded_tokens.tolist() == [0, 0, 64]
    assert sorted(result.snapshot["dram"][0].tolist()) == CHUNKS
    assert sorted(result.snapshot["disk"][0].tolist()) == [4, 5, 6, 7]


def random_rhos(draw: random.Random, *, exact: bool) -> dict[str, float]:
    """Of two tiers; CacheBlend loads a little less here than what its chunks hold."""
    if not exact:
        return {"disk": draw.choice([0.5, 1e9])}
    return {"disk": draw.choice([0.5, 1.4, 3.0, 1e9]), "store": draw.choice([1.8, 4.0])}


@pytest.mark.parametrize("policy", REUSING)
@pytest.mark.parametrize("chained", [False, True])
def test_a_plan_with_the_same_rules_decides_the_same(policy: str, chained: bool) -> None:
    """`core/policies.py` on `ReusePolicy.rules`, tier by tier, for prompts of any length."""
    draw = random.Random(7)
    names = ("dram", "disk", "store")
    fates = set()
    for _ in range(60):
        reuse = ReusePolicy(
            name=policy,  # type: ignore[arg-type]
            kv_bytes_per_token=1000,
            n_layers=10,
            recompute_ratio={"*": draw.choice([0.0, 0.25]), "disk": draw.choice([0.5, 1.0])},
            load_exact=draw.random() < 0.7,
            rho=random_rhos(draw, exact=policy != "cacheblend"),
        )
        n, places = draw.randint(1, 5), list(range(5))
        table = make_table([16 * n + 5], [1], [0.0], [places[:n]], chained=chained)
        lies = [draw.choice(["", *names]) for _ in range(n)]
        kept = {t: [[c for c in range(n) if lies[c] == t]] for t in names}
        tiers = [make_tier(t, shared=t == "store") for t in names]
        piece = draw.choice([32, 8192])
        limits = ServingLimits(prefix_caching=False, max_num_seqs=8, max_num_batched_tokens=piece)
        fleet = make_fleet(policy=policy, tiers=tiers, limits=limits, reuse=reuse.model_dump())
        result = serve_trace(table, fleet, COST, snapshot=kept)
        kind = "prefix" if chained or policy == "prefix_cache" else "isolated"
        found = [
            ChunkEntry(str(c), str(c), 16, 16_000, t, kind) if t else None
            for c, t in enumerate(lies)
        ]
        plan = ReusePlan(
            policy=policy,  # type: ignore[arg-type]
            rules=reuse.rules(),
            epic_tokens=reuse.epic_tokens,
            prefill_chunk_tokens=piece,
        )
        decision = decide(plan, found, [16] * n, 5)
        loaded = {
            t: sum(decision.n_loaded(i, 5, 10) for i in range(n) if decision.chunks[i].tier == t)
            for t in names
        }
        mine = dict(zip(names, result.loaded_tokens[0].tolist(), strict=True))
        if policy == "cacheblend":  # layers below the check layer are averaged in
            loaded, mine = ({t: v > 0 for t, v in both.items()} for both in (loaded, mine))
        assert mine == loaded, (lies, reuse)
        fates |= set(np.sign(result.unloaded_tokens).tolist())
    assert fates == {0, 1}
