"""Loads, tiers and eviction of the serving simulator, by hand and against plain peers."""

from __future__ import annotations

import gc
import random
from collections import OrderedDict

import numpy as np
import pytest
from cachetune.simulator.serving import serve_trace
from cachetune.simulator.serving_eviction import NEVER, order_of
from cachetune.simulator.serving_fleet import ServingLimits, TierSpec
from cachetune.simulator.serving_jobs import Job, JobFeed
from cachetune.simulator.serving_lru import Lru
from cachetune.simulator.serving_replica import Replica
from serving_support import LinearCost, make_fleet, make_table, make_tier, random_table

TOKEN_S = 1e-3
COST = LinearCost(token=TOKEN_S, decode=TOKEN_S)
CHUNKS = [0, 1, 2, 3]


def second_ttft_s(rate: float, ratio: float, latency_s: float = 0.0) -> float:
    """TTFT of a prompt of 4 chunks of 16 tokens, found in one tier, and 6 more tokens."""
    table = make_table([70, 70], [1, 1], [0.0, 1000.0], [CHUNKS, [4, *CHUNKS[1:]]])
    reuse = {"recompute_ratio": {"*": ratio}}
    tier = make_tier(rate=rate, latency_s=latency_s)
    result = serve_trace(table, make_fleet(policy="cachetune", tiers=[tier], reuse=reuse), COST)
    return float(result.ttft_ms[1]) / 1e3


@pytest.mark.parametrize("rate", [1e3, 1e6, 1e8])
def test_load_and_compute_are_pipelined_over_layers(rate: float) -> None:
    """48 tokens are found, a quarter of them is computed again; 10 layers; 1000 bytes a token."""
    load_s = 36 * 1000 / rate
    compute_s = (16 + 12 + 6) * TOKEN_S
    expected = max(load_s / 10 + compute_s, load_s + compute_s / 10)
    assert second_ttft_s(rate, 0.25) == pytest.approx(expected, rel=1e-6)


def test_latency_comes_before_the_bytes() -> None:
    alone, late = second_ttft_s(1e3, 0.25), second_ttft_s(1e3, 0.25, latency_s=0.5)
    assert late == pytest.approx(alone + 0.5, rel=1e-6)


def test_two_loads_share_a_link() -> None:
    """Both of 64 kB over 1 kB/s from the same moment: each has half of it."""
    rows = [CHUNKS, CHUNKS, CHUNKS]
    table = make_table([65] * 3, [1] * 3, [0.0, 1000.0, 1000.0], rows, chained=True)
    fleet = make_fleet(policy="full_reuse", tiers=[make_tier(rate=1e3)])
    result = serve_trace(table, fleet, COST)
    assert result.ttft_ms[1:] == pytest.approx([128e3 + 0.1 * 1, 128e3 + 0.1], rel=1e-4)


def test_host_link_is_shared_by_all_tiers() -> None:
    rows = [CHUNKS, CHUNKS]
    table = make_table([65] * 2, [1] * 2, [0.0, 1000.0], rows, chained=True)
    fast = make_fleet(policy="full_reuse", tiers=[make_tier(rate=1e9)])
    narrow = make_fleet(policy="full_reuse", tiers=[make_tier(rate=1e9)], host_link=1e3)
    assert serve_trace(table, fast, COST).ttft_ms[1] < 2
    assert serve_trace(table, narrow, COST).ttft_ms[1] == pytest.approx(64e3, rel=1e-4)


@pytest.mark.parametrize(("write_rate", "load_s"), [(1e3, 64 + 63 / 2), (100.0, 128), (1e6, 64)])
def test_loads_are_slower_while_chunks_are_written(write_rate: float, load_s: float) -> None:
    """64 kB over 1 kB/s, of which half is left while 64 kB of another prompt go the other way."""
    rows = [CHUNKS, [4, 5, 6, 7], CHUNKS]
    table = make_table([65] * 3, [1] * 3, [0.0, 1000.0, 1001.0], rows, chained=True)
    tier = TierSpec(name="dram", read_bytes_per_s=1e9, write_bytes_per_s=write_rate)
    fleet = make_fleet(policy="full_reuse", tiers=[tier], host_link=1e3, duplex=0.5)
    found = serve_trace(table, fleet, COST).ttft_ms[2] / 1e3
    assert found == pytest.approx(load_s, abs=0.1)


def test_decodes_go_on_while_others_load() -> None:
    """A load of 64 s does not hold up a request that decodes beside it."""
    rows = [CHUNKS, [], CHUNKS]
    table = make_table([65, 5, 65], [1, 100, 1], [0.0, 1000.0, 1000.01], rows, chained=True)
    fleet = make_fleet(policy="full_reuse", tiers=[make_tier(rate=1e3)])
    result = serve_trace(table, fleet, COST)
    assert result.tpot_ms[1] == pytest.approx(1.0, rel=1e-6)
    assert result.ttft_ms[2] > 60e3


@pytest.mark.parametrize(
    "limits", [None, ServingLimits(prefix_caching=False, async_scheduling=True)]
)
def test_decoding_goes_without_the_memory_bandwidth_that_loads_take(
    limits: ServingLimits | None,
) -> None:
    """A quarter of it for 64 s, in which 48,000 of 100,000 decode steps of 1 ms are made."""
    rows = [CHUNKS, [], CHUNKS]
    table = make_table([65, 5, 65], [1, 100_001, 1], [0.0, 1000.0, 1000.01], rows, chained=True)
    tiers = [make_tier(rate=1e9)]
    found = {}
    for memory in (None, 4e3):
        fleet = make_fleet(
            policy="full_reuse", tiers=tiers, host_link=1e3, gpu_memory=memory, limits=limits
        )
        found[memory] = serve_trace(table, fleet, COST)
    assert found[None].tpot_ms[1] == pytest.approx(1.0, rel=1e-3)
    assert found[4e3].e2e_ms[1] - found[None].e2e_ms[1] == pytest.approx(16e3, rel=1e-3)
    assert found[4e3].ttft_ms[2] == pytest.approx(found[None].ttft_ms[2], rel=1e-3)


def test_bandwidth_of_gpu_memory_needs_the_link() -> None:
    with pytest.raises(ValueError, match="host_link_bytes_per_s"):
        make_fleet(policy="full_reuse", tiers=[make_tier()], gpu_memory=1e12)


def test_what_is_evicted_lies_one_tier_down() -> None:
    rows = [CHUNKS, [4, 5, 6, 7], CHUNKS]
    table = make_table([70] * 3, [1] * 3, [0.0, 100.0, 200.0], rows, chained=True)
    tiers = [make_tier("dram", 1e8, capacity_bytes=64_000), make_tier("disk", 1e6)]
    result = serve_trace(table, make_fleet(policy="cachetune", tiers=tiers), COST)
    assert result.loaded_tokens.tolist() == [[0, 0], [0, 0], [0, 64]]
    assert result.written_bytes.tolist() == [2 * 64_000, 2 * 64_000]
    assert sorted(result.snapshot["dram"][0].tolist()) == CHUNKS  # they rose again
    alone = serve_trace(table, make_fleet(policy="cachetune", tiers=tiers[:1]), COST)
    assert alone.loaded_tokens.sum() == 0


def test_shared_tier_serves_the_other_replicas() -> None:
    rows = [CHUNKS] * 2
    table = make_table([70] * 2, [1] * 2, [0.0, 100.0], rows, chained=True)
    for shared, hits in ((True, 64), (False, 0)):
        tiers = [make_tier("store", 1e6, shared=shared)]
        fleet = make_fleet(policy="cachetune", tiers=tiers, n_replicas=2, router="round_robin")
        assert serve_trace(table, fleet, COST).loaded_tokens.sum() == hits


def test_nothing_is_read_before_it_is_written() -> None:
    """64 kB at 1 kB/s are there 64 s after the first prompt was computed."""
    for at, hits in ((60.0, 0), (70.0, 64)):
        table = make_table([70] * 2, [1] * 2, [0.0, at], [CHUNKS] * 2, chained=True)
        fleet = make_fleet(policy="cachetune", tiers=[make_tier(rate=1e3)])
        assert serve_trace(table, fleet, COST).loaded_tokens.sum() == hits


def test_writes_beyond_the_buffer_are_dropped_and_counted() -> None:
    table = make_table([70] * 2, [1] * 2, [0.0, 0.0], [CHUNKS, [4, 5, 6, 7]])
    tier = make_tier(rate=1e3, write_buffer_bytes=100_000)
    result = serve_trace(table, make_fleet(policy="cachetune", tiers=[tier]), COST)
    assert (result.written_bytes.tolist(), result.dropped_bytes.tolist()) == ([64_000], [64_000])


def test_warm_start_from_a_snapshot() -> None:
    table = random_table(random.Random(0), chained=True)
    tiers = [make_tier("dram", 1e8, capacity_bytes=50_000), make_tier("disk", 1e7)]
    fleet = make_fleet(policy="cachetune", tiers=tiers)
    cold = serve_trace(table, fleet, COST)
    warm = serve_trace(table, fleet, COST, snapshot=cold.snapshot)
    assert warm.computed_tokens.sum() < cold.computed_tokens.sum()
    whole = sum(len(parts[0]) for parts in cold.snapshot.values())
    assert whole == len(np.unique(table.chunk_ids))


@pytest.mark.parametrize("seed", range(3))
def test_lru_is_an_ordered_dict(seed: int) -> None:
    draw = random.Random(seed)
    peer: OrderedDict[int, None] = OrderedDict()
    order = Lru()
    sizes = [draw.choice([1, 2, 7]) for _ in range(50)]
    for _ in range(2000):
        key = draw.randrange(50)
        if key in peer:
            peer.move_to_end(key)
            order.touch([key])
        else:
            peer[key] = None
            order.add([key])
        while len(peer) > 20 + draw.randrange(10):
            excess = draw.choice([1, 5, 40, sum(sizes[k] for k in peer)])
            victims, freed = order.pop(excess, sizes)
            expected = []
            while sum(sizes[k] for k in expected) < excess:
                expected.append(peer.popitem(last=False)[0])
            assert (victims, freed) == (expected, sum(sizes[k] for k in expected))
            if draw.random() < 0.5:
                order.put_first(victims[-1])
                peer[victims[-1]] = None
                peer.move_to_end(victims[-1], last=False)
        if peer and draw.random() < 0.05:
            gone = draw.choice(list(peer))
            del peer[gone]
            order.remove(gone)
        assert len(order) == len(peer)
    assert order.coldest_first() == list(peer)
    assert set(order.held) == set(peer)


@pytest.mark.parametrize("name", ["lfu", "cost"])
def test_ranked_orders_evict_as_the_store_does(name: str) -> None:
    """Against `core/eviction.py`, which looks at every chunk."""
    from cachetune.core.eviction import Evictor

    draw = random.Random(1)
    value = {key: draw.choice([1.0, 2.0, 4.0]) for key in range(50)}
    peer = Evictor(name)  # type: ignore[arg-type]
    order = order_of(name, lambda keys: [value[k] for k in keys], lambda key: 0)
    kept: set[int] = set()
    for _ in range(3000):
        key = draw.randrange(50)
        if key in kept:
            peer.use(str(key))
            order.touch([key])
        else:
            kept.add(key)
            peer.add(str(key), 1, value[key])
            order.add([key])
        if len(kept) > 20:
            victim = peer.victim([str(k) for k in kept])
            assert victim is not None
            peer.remove(victim, evicted=True)
            kept.remove(int(victim))
            assert order.pop(1, [1] * 50) == ([int(victim)], 1)


@pytest.mark.parametrize("name", ["lru", "lfu", "cost", "belady"])
def test_orders_take_many_chunks_as_if_one_by_one(name: str) -> None:
    """Against a list that is sorted for every victim."""
    for seed in range(60):
        draw = random.Random(seed)
        n = draw.choice([5, 40, 200])
        value = [draw.choice([1.0, 2.0, draw.random()]) for _ in range(n)]
        future = [draw.choice([draw.randrange(50), NEVER]) for _ in range(n)]
        sizes = [draw.choice([1, 1, 3, 7]) for _ in range(n)]
        order = order_of(name, lambda keys, v=value: [v[k] for k in keys], future.__getitem__)
        peer: dict[int, tuple[float, int, int]] = {}  # rank, time, uses
        tick, floor = 0, 0.0
        for _ in range(draw.choice([30, 300])):
            held = list(peer)
            if draw.random() < 0.7 or not held:
                fresh = draw.random() < 0.5 or not held
                free = [k for k in range(n) if k not in peer]
                keys = draw.sample(free, min(len(free), 9)) if fresh else draw.choices(held, k=6)
                (order.add if fresh else order.touch)(keys)
                for key in keys:
                    uses = peer[key][2] + 1 if key in peer else 1
                    rank = {"lru": 0.0, "lfu": float(uses), "belady": -float(future[key])}
                    peer[key] = rank.get(name, floor + uses * value[key]), tick, uses
                    tick += 1
            elif draw.random() < 0.2:
                gone = draw.choice(held)
                order.remove(gone)
                del peer[gone]
            else:
                excess = draw.randint(1, sum(sizes[k] for k in held))
                expected: list[int] = []
                while sum(sizes[k] for k in expected) < excess:
                    victim = min(peer, key=peer.__getitem__)
                    floor = max(floor, peer.pop(victim)[0])
                    expected.append(victim)
                assert order.pop(excess, sizes) == (expected, sum(sizes[k] for k in expected))
            if draw.random() < 0.2:
                assert order.coldest_first() == sorted(peer, key=peer.__getitem__), f"seed {seed}"


def test_a_run_leaves_nothing_for_the_collector() -> None:
    """What a run built is gone with its last reference, as runs follow each other in a study."""
    table = random_table(random.Random(0), chained=True)
    fleet = make_fleet(policy="cachetune", tiers=[make_tier("dram", 1e8, capacity_bytes=50_000)])
    gc.collect()
    gc.disable()
    try:
        serve_trace(table, fleet, COST)
        assert not [o for o in gc.get_objects() if isinstance(o, (Job, Replica, JobFeed))]
    finally:
        gc.enable()


def test_a_passage_that_occurs_twice_in_a_prompt_is_written_once() -> None:
    table = make_table([70, 70], [1, 1], [0.0, 1000.0], [[0, 1, 0, 0], [0, 1, 0, 0]])
    for tier in (make_tier(), make_tier(shared=True)):
        fleet = make_fleet(policy="full_reuse", tiers=[tier])
        result = serve_trace(table, fleet, COST)
        assert result.written_bytes.tolist() == [2 * 16 * 1000]
        assert result.loaded_tokens[1].tolist() == [64], "each place has its KV"


def test_belady_bounds_the_others() -> None:
    """Whole chunks of one size, asked for anywhere: nobody hits more often."""
    draw = random.Random(5)
    rows = [draw.sample(range(30), 4) for _ in range(300)]
    arrivals = [10.0 * i for i in range(300)]
    table = make_table([70] * 300, [1] * 300, arrivals, rows)
    hits = {}
    for name in ("lru", "lfu", "cost", "belady"):
        tier = make_tier("dram", 1e8, capacity_bytes=10 * 16_000, eviction=name)
        result = serve_trace(table, make_fleet(policy="full_reuse", tiers=[tier]), COST)
        hits[name] = int(result.loaded_tokens.sum())
    assert hits["belady"] > max(hits[name] for name in ("lru", "lfu", "cost"))


def test_a_chunk_is_worth_what_it_cost_where_it_first_stood() -> None:
    """At the head of a prompt first, behind others later: its worth does not change."""
    table = make_table([70, 70], [1, 1], [0.0, 1.0], [[3, 1], [1, 3]])
    feed = JobFeed(
        table, [0], by_chain=False, needs_chains=False, needs_starts=True, kv_bytes_per_token=1
    )
    feed.job(0, 0)
    feed.job(1, 0)
    assert feed.first_start == {3: 0, 1: 16}
