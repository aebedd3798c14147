"""A span is there before those of the ops that follow it, however slow the thread that makes it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from cachetune.core.invariants import check
from cachetune.core.ops import Span
from cachetune.runtime.executor import WorkerExecutor
from cachetune.runtime.runner import Runner
from fake_cuda import FakeCuda

from ..runtime.model_cases import TIERS, make_twins, plan_with, prompt_workload, tokens


@pytest.mark.parametrize("kind", ["load", "restore"])
@pytest.mark.parametrize("device", ["cpu", "fake"])
def test_what_follows_an_op_is_not_told_before_it(
    tmp_path: Path, device: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a prompt's head ends while its own restore is still said to be under way."""
    tell = WorkerExecutor._done

    def slowly(self: WorkerExecutor, span: Span) -> None:
        if span.op.kind == kind and span.op.layer_stop == 4:
            time.sleep(0.3)
        tell(self, span)

    workload, plan = (
        prompt_workload([[tokens(40), tokens(33), tokens(9)]], 3),
        plan_with("cachetune", 0.3, layer_group=1),
    )
    with Runner(
        make_twins("llama")[0], tmp_path, TIERS, device=FakeCuda() if device == "fake" else device,
        kv_capacity_tokens=1024,
    ) as runner:  # fmt: skip
        runner.prepare(workload, plan, "file")
        monkeypatch.setattr(WorkerExecutor, "_done", slowly)
        result = runner.serve(workload, plan, runner.index(plan))
        check(result.timeline, workload)
        assert any(s.op.kind == kind and s.op.layer_stop == 4 for s in result.timeline.spans)
        assert len(result.token_ids[0]) == 3
