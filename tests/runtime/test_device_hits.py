"""Requests whose chunks lie on the device: the logits of DRAM, and nothing is moved for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cachetune.core.model_spec import Stored
from cachetune.core.plan import ReusePlan
from cachetune.runtime.chunk_store import TierConfig
from cachetune.runtime.loaded_model import LoadedModel
from cachetune.runtime.runner import Runner, RunResult
from fake_cuda import FakeCuda, FakeStream, OnDevice

from .model_cases import TIERS as OTHERS
from .model_cases import make_twins, plan_with, prompt_workload
from .test_device_paths import N_OUTPUT, PROMPTS, executed, served, unannounced

TIERS = (TierConfig("hbm", "device"), *OTHERS)
PLAN = plan_with("cachetune", 0.3)


def on_device(runner: Runner) -> set[str]:
    return set(runner.store._catalog.on_device)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return make_twins("llama")[0]


@pytest.fixture
def gpu(loaded: LoadedModel, tmp_path: Path) -> Iterator[Runner]:
    with Runner(loaded, tmp_path, TIERS, device=FakeCuda(), kv_capacity_tokens=2048) as runner:
        yield runner


PLANS = [
    plan_with("full_reuse"),
    plan_with("cachetune", 0.5, 0.2, layer_group=1, n_io_workers=2),
    plan_with("cachetune", 0.3, load_order="chunk", restore_stream="compute"),
    plan_with("cacheblend", 0.3, layer_group=1),
    plan_with("epic", epic_tokens=8),
]


def logits(runner: Runner, plan: ReusePlan, tier: str) -> RunResult:
    result = executed(runner, prompt_workload(PROMPTS, 3), plan, tier)
    assert {s.op.tier for s in result.timeline.spans if s.op.kind == "load"} == {tier}
    return result


@pytest.mark.parametrize("kind", ["cpu", "fake"])
@pytest.mark.parametrize("stored", ["native", "int4"])
def test_logits_are_exactly_those_from_dram(
    loaded: LoadedModel, tmp_path: Path, kind: str, stored: Stored
) -> None:
    model = loaded if stored == "native" else loaded.stored_as(stored)
    device: Any = FakeCuda() if kind == "fake" else "cpu"
    with Runner(model, tmp_path, TIERS, device=device, kv_capacity_tokens=2048) as runner:
        for plan in PLANS:
            dram, hbm = (logits(runner, plan, tier) for tier in ("dram", "hbm"))
            assert hbm.token_ids == dram.token_ids
            for request_id, want in dram.suffix_logits.items():
                assert torch.equal(hbm.suffix_logits[request_id], want)
        counters = runner.store.counters
        assert counters.device_loads and not counters.bad_groups


def test_a_hit_moves_no_byte_and_waits_for_nothing(gpu: Runner) -> None:
    """Against the same hit from DRAM, which is copied whole."""
    workload, device, moved = prompt_workload(PROMPTS, N_OUTPUT), gpu.device, {}
    for tier in ("dram", "hbm"):
        want = served(gpu, workload, PLAN, tier).token_ids
        before = device.uploaded_bytes  # type: ignore[attr-defined]
        result = served(gpu, workload, PLAN, tier)
        moved[tier] = device.uploaded_bytes - before  # type: ignore[attr-defined]
        assert result.token_ids == want and not unannounced(result)
        loads = [s.op.n_bytes for s in result.timeline.spans if s.op.kind == "load"]
        assert sum(loads) == moved["dram"]
    assert moved["dram"] > 0 and moved["hbm"] == 0
    held = [c.parts[0].blobs for c in gpu.store._catalog.on_device.values()]
    assert held and all(isinstance(x, OnDevice) for x in held)


def test_a_hit_does_not_queue_behind_copies_of_others(
    gpu: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one prompt, one chunk is there, two are copied slowly: only these wait for the copies."""
    workload = prompt_workload([PROMPTS[0]], 1)
    plan = plan_with("cachetune", 0.3, layer_group=1, look_ahead=gpu.spec.n_layers)
    want = served(gpu, workload, plan, "dram").token_ids
    entries = gpu.index(plan).lookup(workload.requests[0].chunks)
    assert entries[1] is not None
    gpu.store.place(entries[1].key, "hbm")
    monkeypatch.setitem(FakeStream.SLOW_S, "copy-in", 0.05)
    result = gpu.serve(workload, plan, gpu.index(plan))
    assert result.token_ids == want
    loads = [s for s in result.timeline.spans if s.op.kind == "load"]
    took_ms = {
        tier: [s.duration_ns / 1e6 for s in loads if s.op.tier == tier] for tier in ("dram", "hbm")
    }
    assert len(took_ms["hbm"]) == len(took_ms["dram"]) == gpu.spec.n_layers
    assert max(took_ms["hbm"]) < 50 <= min(took_ms["dram"])


def test_an_eviction_during_a_restore_is_safe(gpu: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every chunk goes while restores are queued: what was handed out stays until it is read."""
    workload = prompt_workload([PROMPTS[0]], N_OUTPUT)
    want = served(gpu, workload, PLAN, "hbm").token_ids
    index, usual = gpu.index(PLAN, "hbm"), gpu.store.read
    used = []

    def read(key: str, start: int, stop: int, *args: Any) -> Any:
        rows = usual(key, start, stop, *args)
        if stop == gpu.spec.n_layers:
            gpu.store.discard(key)
        return rows

    def used_here(x: torch.Tensor) -> None:
        used.append(x)

    monkeypatch.setattr(gpu.store, "read", read)
    monkeypatch.setattr(gpu.device, "used_here", used_here)
    monkeypatch.setitem(FakeStream.SLOW_S, "restore", 0.01)
    result = gpu.serve(workload, PLAN, index)
    assert result.token_ids == want and not result.n_read_failures
    assert not on_device(gpu)
    assert len(used) >= 3 * gpu.spec.n_layers  # each restore of a chunk's layer says so


def test_stages_hold_and_restore_their_own_layers(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "cachetune.runtime.runner.stage_devices",
        lambda first, n: [first, *(FakeCuda(i) for i in range(1, n))],
    )
    with Runner(loaded, tmp_path, TIERS, device=FakeCuda(), kv_capacity_tokens=2048) as runner:
        want = logits(runner, PLAN, "hbm")
        for n in (2, 3):
            plan = PLAN.replace(pipeline_stages=n)
            logits(runner, plan, "hbm")  # takes the chunks up again, cut as the layers are
            before = [d.uploaded_bytes for d in runner.stages.devices]  # type: ignore[attr-defined]
            got = logits(runner, plan, "hbm")
            assert [d.uploaded_bytes for d in runner.stages.devices] == before  # type: ignore[attr-defined]
            for request_id, found in want.suffix_logits.items():
                torch.testing.assert_close(got.suffix_logits[request_id], found, atol=1e-5, rtol=0)
            for chunk in runner.store._catalog.on_device.values():
                assert [p.device for p in chunk.parts] == runner.stages.devices
                ranges = [(p.layer_start, p.layer_stop) for p in chunk.parts]
                assert ranges == runner.stages.ranges


def test_chunks_are_prefetched_to_the_device(gpu: Runner) -> None:
    workload = prompt_workload(PROMPTS, N_OUTPUT)
    want = served(gpu, workload, PLAN, "file").token_ids
    plan = PLAN.replace(max_num_seqs=1)
    result = gpu.serve(workload, plan, gpu.index(plan), prefetch="hbm")
    assert result.token_ids == want and result.prefetched.moved > 0
    assert len(on_device(gpu)) == result.prefetched.moved
