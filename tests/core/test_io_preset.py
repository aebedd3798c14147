"""Disk presets change how a plan reads, and nothing else."""

from __future__ import annotations

import pytest
from cachetune.core.engine import batch_schedule_of
from cachetune.core.errors import PlanError
from cachetune.core.io_preset import IO_PRESETS, io_preset
from cachetune.core.plan import ReusePlan
from support import make_index, make_model, make_workload


@pytest.mark.parametrize("name", IO_PRESETS)
def test_a_preset_changes_reading_only(name: str) -> None:
    workload, model = make_workload([("a", "b", "c", "d")]), make_model()
    plan, index = ReusePlan(), make_index(workload)
    preset = io_preset(name).apply(plan)
    before, after = (batch_schedule_of(workload, model, p, index)[1] for p in (plan, preset))
    loads = [[op for op in ops if op.kind == "load"] for ops in (before, after)]
    assert sum(op.n_bytes for op in loads[0]) == sum(op.n_bytes for op in loads[1])
    computed = [[(op.kind, op.n_tokens) for op in ops if op.kind in ("prefill", "head")]
                for ops in (before, after)]  # fmt: skip
    assert computed[0] == computed[1]
    assert len({op.stream for op in loads[1]}) == (4 if name == "ssd" else 1)


def test_a_hard_disk_reads_one_chunk_after_the_other() -> None:
    workload, model = make_workload([("a", "b", "c")]), make_model()
    plan = io_preset("hdd").apply(ReusePlan())
    ops = batch_schedule_of(workload, model, plan, make_index(workload))[1]
    loads = [op for op in ops if op.kind == "load"]
    assert [op.chunks for op in loads] == [(0,), (1,), (2,)]
    assert all(op.n_layers == model.n_layers for op in loads)


def test_an_unknown_disk_is_refused() -> None:
    with pytest.raises(PlanError, match="ssd, hdd"):
        io_preset("floppy")
