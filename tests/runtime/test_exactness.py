"""INV-10: what is not reused blindly gives the numbers of an unmodified Hugging Face forward."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cachetune.core.plan import ReusePlan
from cachetune.runtime.llm import LLM, Prompt
from cachetune.runtime.runner import RunResult

from . import model_cases as cases
from .model_cases import Bench, plan_with, prompt_workload, tokens

TOLERANCE = 1e-4
VISIBLE = 1e-2
"""A difference of logits that no rounding explains."""

PARTS = (tokens(40), tokens(33), tokens(50), tokens(12))
"""Three chunks, none a multiple of a row group, and a suffix."""


@pytest.fixture(scope="module", params=cases.FAMILIES)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    torch.set_num_threads(1)
    bench = Bench.make(request.param, tmp_path_factory.mktemp(request.param))
    with bench.runner:
        yield bench


def deviation(result: RunResult, expected: torch.Tensor) -> float:
    return float((result.suffix_logits[0] - expected).abs().max())


def test_attention_of_the_model_is_not_flat(bench: Bench) -> None:
    """Otherwise the tests below would pass with any mask."""
    loaded = bench.runner.loaded
    other = (*PARTS[:2], tokens(50, 1), PARTS[3])
    changed = bench.reference_logits(PARTS) - bench.reference_logits(other)
    assert float(changed.abs().max()) > 10 * VISIBLE
    assert loaded.spec.n_layers == 4


@pytest.mark.parametrize(
    "plan",
    [
        plan_with("full_recompute"),
        plan_with("full_recompute", layer_group=3, prefill_chunk_tokens=16),
        plan_with("cachetune", 1.0),
        plan_with("cachetune", 1.0, layer_group=1, prefill_chunk_tokens=16),
        plan_with("cachetune", 1.0, load_order="chunk", restore_stream="compute"),
        plan_with("cacheblend", 1.0),
        plan_with("epic", epic_tokens=1000),
        plan_with("prefix_cache"),
    ],
    ids=lambda p: f"{p.policy}-{p.layer_group}-{p.prefill_chunk_tokens}-{p.load_order}",
)
def test_everything_recomputed_equals_hugging_face(bench: Bench, plan: ReusePlan) -> None:
    result = bench.run(PARTS, plan, tier="file" if plan.layer_group == 3 else "dram")
    assert deviation(result, bench.reference_logits(PARTS)) <= TOLERANCE


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_prefix_entries_are_exact_at_any_ratio(bench: Bench, ratio: float) -> None:
    """Stored in an order of their own, so that no other test finds them."""
    plan = plan_with("cachetune", ratio, selector="random")
    bench.runner.ingestor.ingest_prefix(PARTS[:-1], selector="random", tier="file")
    result = _alone(bench, plan)
    assert result.n_reused_tokens[0] == sum(len(p) for p in PARTS[:-1])
    assert deviation(result, bench.reference_logits(PARTS)) <= TOLERANCE


def test_prefix_entries_hold_only_behind_their_own_prefix(bench: Bench) -> None:
    """Another first chunk breaks the chain: nothing behind it is found."""
    bench.runner.ingestor.ingest_prefix(PARTS[:-1], selector="random", tier="file")
    plan = plan_with("cachetune", 0.0, selector="random")
    parts = (tokens(40, 7), *PARTS[1:])
    workload = prompt_workload([parts])
    found = bench.runner.index(plan).lookup(workload.requests[0].chunks)
    assert found == [None, None, None]


def _alone(bench: Bench, plan: ReusePlan) -> RunResult:
    """Run `PARTS` on what the store holds, preparing nothing."""
    workload = prompt_workload([PARTS])
    index = bench.runner.index(plan)
    request = workload.requests[0]
    return bench.runner.execute(workload, request, plan, index, keep_suffix_logits=True)


def test_a_second_chunk_encoded_alone_is_not_a_prefix(bench: Bench) -> None:
    """`prefix_cache` leaves it; loading it all the same gives other logits."""
    expected = bench.reference_logits(PARTS)
    exact = bench.run(PARTS, plan_with("prefix_cache"))
    assert exact.n_reused_tokens[0] == len(PARTS[0])
    assert deviation(exact, expected) <= TOLERANCE
    blind = bench.run(PARTS, plan_with("full_reuse"))
    assert blind.n_reused_tokens[0] == sum(len(p) for p in PARTS[:-1])
    assert deviation(blind, expected) > VISIBLE


@pytest.mark.parametrize("policy", ["cachetune", "cacheblend", "epic"])
def test_partial_recompute_differs_and_is_finite(bench: Bench, policy: str) -> None:
    result = bench.run(PARTS, plan_with(policy, 0.3))
    assert torch.isfinite(result.suffix_logits[0]).all()
    assert deviation(result, bench.reference_logits(PARTS)) > VISIBLE


def test_small_pieces_change_nothing_at_a_partial_ratio(bench: Bench) -> None:
    whole = bench.run(PARTS, plan_with("cachetune", 0.5, 0.2))
    small = plan_with("cachetune", 0.5, 0.2, prefill_chunk_tokens=16, layer_group=1)
    cut = bench.run(PARTS, small, tier="file")
    assert deviation(cut, whole.suffix_logits[0]) <= TOLERANCE


def test_generated_tokens_equal_hugging_face(bench: Bench) -> None:
    with LLM(bench.runner.loaded, plan_with("cachetune", 1.0)) as llm:
        llm.ingest(PARTS[:-1])
        prompt = Prompt(PARTS[:-1], PARTS[-1], max_tokens=10)
        (answer,) = llm.generate([prompt], ignore_eos=True)
    assert answer.token_ids == bench.reference_tokens(PARTS, 10)
    assert answer.n_reused_tokens == len(PARTS[0])


def test_batched_requests_make_the_tokens_they_make_alone(bench: Bench) -> None:
    """Continuous batching: prefill pieces of some between decode steps of others."""
    prompts = [
        PARTS,
        (PARTS[1], PARTS[0], tokens(5)),
        (PARTS[2], tokens(20)),
        (tokens(9),),
    ]
    plan = plan_with("cachetune", 1.0, prefill_chunk_tokens=16)
    workload = prompt_workload(prompts, n_output=8)
    bench.runner.prepare(workload, plan, "dram")
    together = bench.runner.serve(workload, plan, bench.runner.index(plan))
    sizes = {s.op.n_tokens for s in together.timeline.spans if s.op.kind == "decode"}
    assert max(sizes) > 1, "no decode step was shared"
    for number, parts in enumerate(prompts):
        assert together.token_ids[number] == bench.reference_tokens(parts, 8)


def test_batched_reuse_makes_the_tokens_it_makes_alone(bench: Bench) -> None:
    prompts = [PARTS, (PARTS[1], PARTS[0], tokens(5)), (PARTS[2], PARTS[1], tokens(20))]
    plan = plan_with("cachetune", 0.3, n_io_workers=2)
    workload = prompt_workload(prompts, n_output=6)
    bench.runner.prepare(workload, plan, "file")
    together = bench.runner.serve(workload, plan, bench.runner.index(plan))
    for number, parts in enumerate(prompts):
        alone = prompt_workload([parts], n_output=6)
        result = bench.runner.serve(alone, plan, bench.runner.index(plan))
        assert together.token_ids[number] == result.token_ids[0]
