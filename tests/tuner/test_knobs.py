"""The runtime obeys each knob: real runs of a tiny model, read from their timelines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

import pytest
from cachetune.calibration.probes import Library, Shape
from cachetune.core.chunk_index import ChunkIndex
from cachetune.core.layout import n_reads, read_bytes
from cachetune.core.ops import Span
from cachetune.core.plan import RatioRule, ReusePlan, SelectorName
from cachetune.core.policies import n_recomputed
from cachetune.core.workload import Workload
from cachetune.tuner.measure import Bench

torch = pytest.importorskip("torch")

from cachetune.runtime.chunk_reader import Counters  # noqa: E402
from cachetune.runtime.loaded_model import LoadedModel, load_model  # noqa: E402
from cachetune.runtime.runner import Runner  # noqa: E402
from cachetune.runtime.tiers import TierConfig  # noqa: E402

N_CHUNKS, N, SUFFIX, N_LAYERS = 4, 64, 16, 4
PROMPT = N_CHUNKS * N + SUFFIX
TIERS = (TierConfig("dram", "dram"), TierConfig("disk", "file"))


@dataclass(frozen=True)
class Run:
    """What one request left behind."""

    spans: list[Span]
    rows: list[int]
    """Rows that passed through each layer."""
    n_requests: int
    bytes_read: int

    def of(self, kind: str) -> list[Span]:
        return sorted((s for s in self.spans if s.op.kind == kind), key=lambda s: s.seq)

    def layers(self, kind: str) -> list[tuple[int, int]]:
        return [(s.op.layer_start, s.op.layer_stop) for s in self.of(kind)]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model("llama-tiny")


@pytest.fixture(scope="module")
def work(loaded: LoadedModel) -> Workload:
    return Library(loaded.spec, 0).workload(Shape(N_CHUNKS, N, SUFFIX))


@pytest.fixture(scope="module")
def runner(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    with Runner(loaded, tmp_path_factory.mktemp("store"), TIERS) as opened:
        yield opened


def plan_of(ratio: float = 0.25, *more: float, load_exact: bool = True, **knobs: Any) -> ReusePlan:
    rules = (RatioRule(ratios=(ratio, *more), load_exact=load_exact),)
    return ReusePlan.model_validate({"policy": "cachetune", "rules": rules, **knobs})


def run(
    runner: Runner,
    work: Workload,
    plan: ReusePlan,
    tier: str = "dram",
    index: ChunkIndex | None = None,
) -> Run:
    if index is None:
        runner.prepare(work, plan, tier)
        index = runner.index(plan, tier)
    counters: Counters = runner.store.counters
    before = counters.requests, counters.bytes_read
    runner.transformer.reset_counts()
    timeline = runner.execute(work, work.requests[0], plan, index).timeline
    assert not any(s.outcome.failed_chunks for s in timeline.spans)
    return Run(
        list(timeline.spans),
        list(runner.transformer.rows_by_layer),
        counters.requests - before[0],
        counters.bytes_read - before[1],
    )


def rows_with(ratio: float) -> int:
    """The first chunk is exact and loaded whole; of the others the ratio is computed."""
    return SUFFIX + (N_CHUNKS - 1) * n_recomputed(ratio, N)


def bytes_with(runner: Runner, ratio: float) -> int:
    """Bytes read in one layer."""
    spec = runner.spec
    return read_bytes(spec, N) + (N_CHUNKS - 1) * read_bytes(spec, N - n_recomputed(ratio, N))


@pytest.mark.parametrize("ratio", [0.0, 0.15, 0.5, 0.9])
def test_ratio(runner: Runner, work: Workload, ratio: float) -> None:
    found = run(runner, work, plan_of(ratio))
    assert found.rows == [rows_with(ratio)] * N_LAYERS
    assert found.bytes_read == N_LAYERS * bytes_with(runner, ratio)
    assert found.bytes_read == sum(s.op.n_bytes for s in found.of("load"))


def test_ratio_of_one_loads_the_exact_chunk_alone(runner: Runner, work: Workload) -> None:
    found = run(runner, work, plan_of(1.0))
    assert found.rows == [PROMPT - N] * N_LAYERS
    assert {s.op.chunks for s in found.of("load")} == {(0,)}


def test_ratio_per_tier(runner: Runner, work: Workload) -> None:
    """Two chunks in each tier, each at its own ratio."""
    rules = (RatioRule(tier="disk", ratios=(0.75,)), RatioRule(ratios=(0.25,)))
    plan = ReusePlan(rules=rules)
    runner.prepare(work, plan, "dram")
    held = runner.index(plan, "dram")
    names = work.requests[0].chunks
    index = ChunkIndex()
    for i, entry in enumerate(held.lookup(names)):
        assert entry is not None
        index.add(runner.store.place(entry.key, "disk" if i % 2 else "dram"))
    found = run(runner, work, plan, index=index)
    assert found.rows == [SUFFIX + n_recomputed(0.25, N) + 2 * n_recomputed(0.75, N)] * N_LAYERS
    by_tier = {s.op.tier: 0 for s in found.of("load")}
    for span in found.of("load"):
        by_tier[span.op.tier] += span.op.n_bytes
    spec = runner.spec
    assert by_tier == {
        "disk": N_LAYERS * 2 * read_bytes(spec, N - n_recomputed(0.75, N)),
        "dram": N_LAYERS * (read_bytes(spec, N) + read_bytes(spec, N - n_recomputed(0.25, N))),
    }


def test_ratio_per_band(runner: Runner, work: Workload) -> None:
    found = run(runner, work, plan_of(0.75, 0.25))
    assert found.rows == [rows_with(0.75)] * 2 + [rows_with(0.25)] * 2
    assert found.bytes_read == 2 * bytes_with(runner, 0.75) + 2 * bytes_with(runner, 0.25)


def test_load_exact(runner: Runner, work: Workload) -> None:
    found = run(runner, work, plan_of(0.25, load_exact=False))
    assert found.rows == [rows_with(0.25) + N] * N_LAYERS
    assert all(0 not in s.op.chunks for s in found.of("load"))


@pytest.mark.parametrize(
    ("group", "layers"),
    [(1, [(0, 1), (1, 2), (2, 3), (3, 4)]), (2, [(0, 2), (2, 4)]), (3, [(0, 3), (3, 4)])],
)
def test_layer_group(
    runner: Runner, work: Workload, group: int, layers: list[tuple[int, int]]
) -> None:
    found = run(runner, work, plan_of(layer_group=group))
    for kind in ("load", "restore", "prefill"):
        assert found.layers(kind) == layers


@pytest.mark.parametrize("look_ahead", [1, 2])
def test_look_ahead(runner: Runner, work: Workload, look_ahead: int) -> None:
    found = run(runner, work, plan_of(layer_group=1, look_ahead=look_ahead))
    loads, prefills = found.of("load"), found.of("prefill")
    assert len(loads) == len(prefills) == N_LAYERS
    for g, load in enumerate(loads):
        gate = g - 1 - look_ahead
        assert len(load.op.deps) == (gate >= 0)
        if gate >= 0:
            assert load.start_ns >= prefills[gate].end_ns


def test_look_ahead_lets_loads_run_before_compute(runner: Runner, work: Workload) -> None:
    found = run(runner, work, plan_of(layer_group=1, look_ahead=N_LAYERS))
    assert not any(s.op.deps for s in found.of("load"))


def test_load_order(runner: Runner, work: Workload) -> None:
    by_layer = run(runner, work, plan_of(load_order="layer", layer_group=2))
    assert [s.op.chunks for s in by_layer.of("load")] == [(0, 1, 2, 3)] * 2
    by_chunk = run(runner, work, plan_of(load_order="chunk", layer_group=2))
    assert [s.op.chunks for s in by_chunk.of("load")] == [(0,), (1,), (2,), (3,)]
    assert by_chunk.layers("load") == [(0, N_LAYERS)] * N_CHUNKS
    assert by_chunk.bytes_read == by_layer.bytes_read
    last_load = max(s.end_ns for s in by_chunk.of("load"))
    assert by_chunk.of("restore")[0].start_ns >= last_load


@pytest.mark.parametrize("stream", ["restore", "compute"])
def test_restore_stream(runner: Runner, work: Workload, stream: str) -> None:
    found = run(runner, work, plan_of(restore_stream=stream))
    assert {s.op.stream for s in found.of("restore")} == {stream}


@pytest.mark.parametrize("n", [1, 2, 3])
def test_n_io_workers(runner: Runner, work: Workload, n: int) -> None:
    found = run(runner, work, plan_of(n_io_workers=n))
    assert {s.op.stream for s in found.of("load")} == {f"io.dram.{i}" for i in range(n)}
    for span in found.of("load"):
        assert {c % n for c in span.op.chunks} == {int(span.op.stream[-1])}


@pytest.mark.parametrize("tier", ["dram", "disk"])
@pytest.mark.parametrize("size", [4096, 16384, 1 << 20])
def test_request_bytes(runner: Runner, work: Workload, tier: str, size: int) -> None:
    found = run(runner, work, plan_of(0.0, request_bytes=size), tier)
    blob = read_bytes(runner.spec, N)
    assert found.n_requests == N_LAYERS * N_CHUNKS * n_reads(blob, size)
    assert found.n_requests == sum(s.op.n_reads for s in found.of("load"))


def test_prefill_chunk_tokens(runner: Runner, work: Workload) -> None:
    plan = ReusePlan(policy="full_recompute", prefill_chunk_tokens=100, layer_group=N_LAYERS)
    found = run(runner, work, plan)
    assert [s.op.n_tokens for s in found.of("prefill")] == [100, 100, PROMPT - 200]
    assert found.rows == [PROMPT] * N_LAYERS


@pytest.mark.parametrize("tokens", [0, 5, 32])
def test_epic_tokens(runner: Runner, work: Workload, tokens: int) -> None:
    found = run(runner, work, ReusePlan(policy="epic", epic_tokens=tokens))
    assert found.rows == [SUFFIX + (N_CHUNKS - 1) * tokens] * N_LAYERS


def test_ratio_per_prompt_length(runner: Runner, work: Workload) -> None:
    """The first rule that the whole prompt fits is the one that holds."""
    for limit, ratio in ((PROMPT, 0.75), (PROMPT - 1, 0.25)):
        rules = (
            RatioRule(max_prompt_tokens=limit, ratios=(0.75,)),
            RatioRule(ratios=(0.25,)),
        )
        found = run(runner, work, ReusePlan(rules=rules))
        assert found.rows == [rows_with(ratio)] * N_LAYERS


@pytest.mark.parametrize("selector", get_args(SelectorName))
def test_selector_is_the_stored_order(runner: Runner, work: Workload, selector: str) -> None:
    plan = plan_of(selector=selector)
    runner.prepare(work, plan, "dram")
    entries = runner.index(plan, "dram").lookup(work.requests[0].chunks)
    orders = [runner.store.order(e.key) for e in entries if e is not None]
    assert len(orders) == N_CHUNKS
    assert all(sorted(order.tolist()) == list(range(N)) for order in orders)
    others = [s for s in get_args(SelectorName) if s != selector]
    for other in others:
        runner.prepare(work, plan_of(selector=other), "dram")
        entries = runner.index(plan_of(selector=other), "dram").lookup(work.requests[0].chunks)
        assert any(
            runner.store.order(e.key).tolist() != order.tolist()
            for e, order in zip(entries, orders, strict=True)
            if e is not None
        )
    if selector == "chunk_start":  # least critical first: the last token leads
        assert orders[0].tolist() == list(range(N - 1, -1, -1))
    assert run(runner, work, plan).rows == [rows_with(0.25)] * N_LAYERS


def test_policy_cacheblend(runner: Runner, work: Workload) -> None:
    found = run(runner, work, ReusePlan(policy="cacheblend", rules=(RatioRule(ratios=(0.25,)),)))
    assert found.rows == [PROMPT] + [rows_with(0.25)] * (N_LAYERS - 1)
    assert len(found.of("select")) == 1


@pytest.mark.parametrize("n", [1, 2, 4])
def test_max_num_seqs(runner: Runner, work: Workload, n: int) -> None:
    """Four requests at once: no more than `n` are between their first op and their last token."""
    first = work.requests[0].replace(max_output_tokens=3, output_tokens=3)
    many = work.replace(requests=tuple(first.replace(request_id=i) for i in range(4)))
    plan = plan_of(max_num_seqs=n)
    runner.prepare(many, plan, "dram")
    timeline = runner.serve(many, plan, runner.index(plan, "dram")).timeline
    lives: dict[int, list[int]] = {}
    for span in timeline.spans:
        for request_id in span.op.request_ids:
            life = lives.setdefault(request_id, [span.submit_ns, span.end_ns])
            life[:] = [min(life[0], span.submit_ns), max(life[1], span.end_ns)]
    ordered = sorted([(s, 1) for s, _ in lives.values()] + [(e, -1) for _, e in lives.values()])
    inside = most = 0
    for _, change in ordered:
        inside += change
        most = max(most, inside)
    assert len(lives) == 4
    assert (most > 1) == (n > 1)
    assert most <= n


def test_plans_are_measured_interleaved(runner: Runner, work: Workload) -> None:
    """What confirmation, grid and golden section stand on."""
    bench = Bench(runner, work, "dram")
    found = bench.interleaved([plan_of(0.2), plan_of(0.9), plan_of(0.2, selector="random")], 2)
    assert [len(m.ttft_ms) for m in found] == [2, 2, 2]
    assert bench.n_runs == 3 * (2 + 1)
    assert all(m.median > 0 for m in found)


def test_plans_are_measured_under_load(runner: Runner, work: Workload) -> None:
    """Mode `serve`: one measurement serves every request."""
    bench = Bench(runner, work, "dram", mode="serve")
    found = bench.interleaved([plan_of(0.2), plan_of(0.9)], 2)
    assert bench.n_runs == 2 * (2 + 1)
    assert all(m.median > 0 for m in found)
