"""One tenant can neither read nor time another's chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cachetune.core.ops import Op
from cachetune.core.workload import Workload
from cachetune.runtime.llm import LLM, Prompt
from cachetune.runtime.runner import Runner, tenants_of

from . import model_cases as cases
from .model_cases import TIERS, plan_with, prompt_workload, tokens

PARTS = (tokens(40), tokens(33), tokens(50), tokens(12))
NEVER_SEEN = (tokens(40, 7), tokens(33, 7), tokens(50, 7), tokens(12, 7))
PLAN = plan_with("cachetune", 0.3, layer_group=1)


@pytest.fixture(scope="module")
def loaded() -> Any:
    torch.set_num_threads(1)
    return cases.make_twins("llama")[0]


@pytest.fixture
def runner(loaded: Any, tmp_path: Path) -> Iterator[Runner]:
    with Runner(loaded, tmp_path / "store", TIERS) as runner:
        yield runner


def of_tenant(parts: Any, tenant: str) -> Workload:
    workload = prompt_workload([parts], n_output=4)
    return workload.replace(requests=tuple(r.replace(tenant=tenant) for r in workload.requests))


def ops_of(runner: Runner, workload: Workload) -> tuple[Op, ...]:
    index = runner.index(PLAN, tenants=["red", "blue"])
    return runner.batch_schedule(workload, PLAN, index)[1].ops


def test_a_tenant_reuses_its_own(runner: Runner) -> None:
    red = of_tenant(PARTS, "red")
    runner.prepare(red, PLAN, "file")
    result = runner.serve(red, PLAN, runner.index(PLAN, tenants=tenants_of(red)))
    assert result.n_reused_tokens[0] == 40 + 24 + 35
    assert any(op.kind == "load" for op in ops_of(runner, red))


def test_another_s_chunks_look_like_chunks_never_seen(runner: Runner) -> None:
    """The same ops, field by field, before and after: nothing to be timed."""
    runner.prepare(of_tenant(PARTS, "red"), PLAN, "file")
    theirs = ops_of(runner, of_tenant(PARTS, "blue"))
    assert theirs == ops_of(runner, of_tenant(NEVER_SEEN, "blue"))
    assert theirs == ops_of(runner, of_tenant(PARTS, ""))
    assert not any(op.kind in ("load", "restore") for op in theirs)


def test_serving_another_s_chunks_touches_nothing(runner: Runner) -> None:
    runner.prepare(of_tenant(PARTS, "red"), PLAN, "file")
    shapes = []
    for parts in (PARTS, NEVER_SEEN):
        work = of_tenant(parts, "blue")
        before = replace(runner.store.counters)
        result = runner.serve(work, PLAN, runner.index(PLAN, tenants=["red", "blue"]))
        assert runner.store.counters == before and result.n_reused_tokens[0] == 0
        shapes.append([(s.op.kind, s.op.stream, s.op.n_tokens) for s in result.timeline.spans])
    assert shapes[0] == shapes[1]


def test_ingesting_another_s_content_writes_it_anew(runner: Runner) -> None:
    """A write that were skipped would tell that it is there."""
    runner.prepare(of_tenant(PARTS, "red"), PLAN, "file")
    puts = runner.store.counters.puts
    runner.prepare(of_tenant(PARTS, "blue"), PLAN, "file")
    assert runner.store.counters.puts == 2 * puts == 6


def test_prompts_of_two_tenants_in_one_batch(loaded: Any, tmp_path: Path) -> None:
    with LLM(loaded, PLAN, store_dir=tmp_path, tier="file") as llm:
        llm.ingest(PARTS[:-1], tenant="red")
        prompts = [Prompt(PARTS[:-1], PARTS[-1], 4, tenant=t) for t in ("red", "blue", "")]
        first = llm.generate(prompts, ignore_eos=True)
        assert [c.n_reused_tokens for c in first] == [40 + 24 + 35, 0, 0]
        again = llm.generate(prompts, ignore_eos=True)  # each has its own by now
        assert [c.n_reused_tokens for c in again] == [40 + 24 + 35] * 3
        assert len({tuple(c.token_ids) for c in again}) == 1
