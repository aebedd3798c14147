"""End-to-end validation: readers, the leave-one-out fit, the silicon model."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cachetune.calibration import end_to_end
from cachetune.calibration.bundle_profile import profile_of
from cachetune.calibration.bundles import Bundle, capture_sizes, model_of, read_bundle
from cachetune.calibration.closed_batch import ClosedBatch
from cachetune.calibration.end_to_end import (
    compare,
    fit_overhead_s,
    measured,
    predicted,
    validate,
)
from cachetune.calibration.host_overhead import HostOverhead, evidence_for, kept, overhead_s
from cachetune.calibration.silicon import Point, fit_length, predict, read_points
from cachetune.calibration.silicon import fit_overhead_s as fit_step_s
from cachetune.core.errors import ModelError, ProfileError, WorkloadError
from cachetune.simulator.expert_profile import ExpertProfile
from cachetune.simulator.step_profile import Collective, Curve, StepProfile
from serving_support import write_profile


def small_profile(overhead_s: float = 0.0) -> StepProfile:
    grid = ((0, 16, 2048), (0, 4096), (0, 1, 64), (0, 16, 4096))
    shape = [len(axis) for axis in grid]
    us = np.zeros(shape)
    for i in np.ndindex(*shape):
        q, c, n, kv = (axis[j] for axis, j in zip(grid, i, strict=True))
        us[i] = 5 + 0.02 * q + 1e-5 * q * c + 0.001 * n * kv if q or n else 0.0
    flat = Curve((1, 2048), (1.0, 1.0))
    return StepProfile(
        n_layers=4,
        dense_us=Curve((1, 2048), (100.0, 2000.0)),
        once_us=flat,
        head_us=flat,
        grid=grid,
        us=us,
        overhead_s=overhead_s,
    )


def write_bundle(folder: Path, overhead_s: float) -> Path:
    """A bundle whose engine is the step loop itself, with a known overhead."""
    folder.mkdir(parents=True)
    kwargs = {"max_num_seqs": 8, "max_num_batched_tokens": 256}
    meta = {"model": "m", "vllm_version": "0.19.0", "engine_kwargs": kwargs}
    (folder / "meta.json").write_text(json.dumps(meta))
    rows = [
        {
            "input_toks": 40 + 17 * i,
            "output_toks": 20 + 3 * i,
            "arrival_time": 0.004 * i,
            "queued_ts": 0.004 * i,
            "first_token_ts": 1.0 + i,
            "last_token_ts": 2.0 + i,
        }
        for i in range(20)
    ]
    path = folder / "requests.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in rows))
    run = predicted(read_bundle(folder), small_profile(), overhead_s)
    for i, row in enumerate(rows):
        row["first_token_ts"] = row["queued_ts"] + float(run.ttft[i])
        row["last_token_ts"] = row["queued_ts"] + float(run.e2e[i])
    path.write_text("\n".join(json.dumps(r) for r in rows))
    return folder


def test_overhead_is_found_again(tmp_path: Path) -> None:
    bundle = read_bundle(write_bundle(tmp_path / "gpu" / "m", overhead_s=0.003))
    found = fit_overhead_s(bundle, small_profile())
    assert found == pytest.approx(0.003, rel=0.02)
    rows = compare(measured(bundle), predicted(bundle, small_profile(), found))
    assert all(abs(r["error"]) < 0.02 for r in rows)
    wrong = compare(measured(bundle), predicted(bundle, small_profile(), 0.0))
    assert any(r["met"] is False for r in wrong)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"output_toks": 0}, "output_toks"),
        ({"first_token_ts": -1.0}, "backwards"),
        ({"queued_ts": None}, "queued_ts"),
        ({"arrival_time": float("nan")}, "arrival_time"),
        ({"last_token_ts": float("inf")}, "last_token_ts"),
    ],
)
def test_bad_request_names_its_line(tmp_path: Path, change: dict[str, object], said: str) -> None:
    folder = write_bundle(tmp_path / "b", overhead_s=0.0)
    lines = (folder / "requests.jsonl").read_text().splitlines()
    lines[4] = json.dumps({**json.loads(lines[4]), **change})
    (folder / "requests.jsonl").write_text("\n".join(lines))
    with pytest.raises(WorkloadError, match=f"line 5.*{said}"):
        read_bundle(folder)


def test_requests_of_one_token_have_no_tpot(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "gpu" / "m", overhead_s=0.003)
    path = folder / "requests.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[3] |= {"output_toks": 1, "last_token_ts": rows[3]["first_token_ts"]}
    path.write_text("\n".join(map(json.dumps, rows)))
    bundle = read_bundle(folder)
    assert len(measured(bundle).tpot) == len(bundle.n_output) - 1 == 19
    found = compare(measured(bundle), predicted(bundle, small_profile(), 0.003))
    assert all(math.isfinite(row["error"]) for row in found)
    for row in rows:
        row |= {"output_toks": 1, "last_token_ts": row["first_token_ts"]}
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(WorkloadError, match="must have a TPOT"):
        validate([folder], tmp_path)


def test_missing_bundle_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=r"meta\.json"):
        read_bundle(tmp_path)


def test_capture_sizes_follow_the_engine() -> None:
    assert capture_sizes(128)[-1] == 256
    assert capture_sizes(256)[-1] == 512
    assert 12 not in capture_sizes(256)


def test_bytes_that_are_no_text_are_one_line(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b", overhead_s=0.0)
    (folder / "requests.jsonl").write_bytes(b'{"input_toks": "\xff\xfe"}')
    with pytest.raises(WorkloadError, match=r"requests\.jsonl must be text in UTF-8, got byte 16"):
        read_bundle(folder)


@pytest.mark.parametrize(
    ("engine", "facts", "said"),
    [
        ({}, {"kv_cache": [1]}, "kv_cache must be an object"),
        ({}, {"resolved_config": "x"}, "resolved_config must be an object"),
        ({}, {"kv_cache": {"num_gpu_blocks": "many"}}, "num_gpu_blocks must be a number"),
        ({"tensor_parallel_size": "two"}, {}, "tensor_parallel_size must be a number"),
        ({"cudagraph_capture_sizes": ["a"]}, {}, "cudagraph_capture_sizes must be a list"),
    ],
)
def test_a_fact_of_the_wrong_kind_is_one_line(
    tmp_path: Path, engine: dict[str, object], facts: dict[str, object], said: str
) -> None:
    folder = write_bundle(tmp_path / "b", overhead_s=0.0)
    with pytest.raises(WorkloadError, match=said):
        read_bundle(set_meta(folder, engine, **facts))


SAMPLE = {
    "backend": "vllm", "backend_version": "1", "model_path": "Llama-3.1-8B", "system": "h100_sxm",
    "precision": "bf16", "mode": "agg", "isl": "100", "osl": "10", "gemm_quant_mode": "bf16",
    "tp_size": "1", "silicon_data_source": "silicon_concurrency=4", "silicon_ttft_ms": "20",
    "silicon_tpot_ms": "5",
}  # fmt: skip


def write_sample(path: Path, last: str) -> Path:
    path.write_text("\n".join([",".join(SAMPLE), ",".join(SAMPLE.values()), last]) + "\n")
    return path


@pytest.mark.parametrize(
    ("last", "said"),
    [
        ("vllm,1", "line 3 must have the field model_path"),
        (",".join([*SAMPLE.values()][:-1]), "line 3 must have the field silicon_tpot_ms"),
        (",".join({**SAMPLE, "isl": "x"}.values()), "line 3 must hold numbers"),
        (",".join({**SAMPLE, "tp_size": "0"}.values()), "line 3 must hold numbers.*below 1"),
        (",".join({**SAMPLE, "silicon_data_source": ""}.values()), "line 3 .*batch_size"),
    ],
)
def test_a_malformed_line_of_the_sample_is_one_error(tmp_path: Path, last: str, said: str) -> None:
    with pytest.raises(WorkloadError, match=said):
        read_points(write_sample(tmp_path / "sample.csv", last))


def test_the_sample_must_be_text(tmp_path: Path) -> None:
    path = write_sample(tmp_path / "sample.csv", "")
    assert [p.concurrency for p in read_points(path)] == [4]
    path.write_bytes(path.read_bytes() + b"\xff\xfe")
    with pytest.raises(WorkloadError, match="must be a readable CSV file"):
        read_points(path)


def set_meta(folder: Path, engine: dict[str, object] | None = None, **facts: object) -> Path:
    meta = json.loads((folder / "meta.json").read_text())
    meta |= {**facts, "engine_kwargs": meta["engine_kwargs"] | (engine or {})}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def test_what_the_engine_says_of_itself_is_taken(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "RTX4090" / "m", overhead_s=0.0)
    assert read_bundle(folder).capture_sizes == capture_sizes(8)
    assert "KV memory never runs out" in read_bundle(folder).assumed
    resolved = {"compilation_config": {"cudagraph_capture_sizes": [8, 1, 4]}}
    assert read_bundle(set_meta(folder, resolved_config=resolved)).capture_sizes == (1, 4, 8)
    assert read_bundle(set_meta(folder, {"enforce_eager": True})).capture_sizes == ()
    # Nobody says how many blocks there are: the sum over memory does, here as measured.
    as_measured = {"max_num_seqs": 256, "max_num_batched_tokens": 2048, "enforce_eager": False}
    found = read_bundle(set_meta(folder, as_measured, model="meta-llama/Llama-3.1-8B"))
    assert found.limits.n_blocks == 2588 - 1
    assert "KV memory of 2588 blocks: an itemised sum" in found.assumed


def test_models_are_known_by_the_beginning_of_their_name() -> None:
    assert model_of("meta-llama/Meta-Llama-3.1-8B-Instruct").n_layers == 32
    assert model_of("Qwen/Qwen3-32B").n_layers == 64
    for other in ("Qwen/Qwen3-30B-A3B", "x/Llama-3.1-8Bis"):
        with pytest.raises(ModelError):
            model_of(other)


def test_bundles_that_cannot_be_predicted_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def profile(bundle: Bundle, _: str | Path) -> StepProfile:
        if bundle.model == "unknown":
            raise ProfileError("no profile")
        return small_profile()

    monkeypatch.setattr(end_to_end, "profile_of", profile)
    fast = write_bundle(tmp_path / "g" / "fast", overhead_s=-0.0003)
    slow = write_bundle(tmp_path / "g" / "slow", overhead_s=0.003)
    bare = write_bundle(tmp_path / "g" / "bare", overhead_s=0.0)
    lone = set_meta(write_bundle(tmp_path / "g" / "lone", 0.0), vllm_version="0.1")
    many = set_meta(write_bundle(tmp_path / "g" / "many", 0.0), {"data_parallel_size": 2})
    other = set_meta(write_bundle(tmp_path / "g" / "other", 0.0), model="unknown")
    rows, left_out = validate([fast, slow, bare, lone, many, other], tmp_path)
    assert {r["bundle"] for r in rows} == {"g/fast", "g/slow", "g/bare"}
    assert [x["bundle"].rsplit("/")[-1] for x in left_out] == ["many", "other", "lone"]
    assert "no other bundle of vllm 0.1" in left_out[-1]["why"]
    overhead_ms = {r["bundle"]: r["overhead_ms"] for r in rows}
    # The mean over the others, a run faster than its tables included; never below zero.
    assert overhead_ms["g/bare"] == pytest.approx(1.35, abs=0.05)
    assert overhead_ms["g/slow"] == 0.0
    with pytest.raises(WorkloadError, match="no profile"):
        validate([other], tmp_path)


def test_a_run_is_predicted_by_others_of_its_host_and_never_by_itself(tmp_path: Path) -> None:
    run = read_bundle(set_meta(write_bundle(tmp_path / "g" / "m", 0.0), started_at="then"))
    own = HostOverhead.of(run, 0.001)
    near, far = own._replace(started_at="later"), own._replace(started_at="later", gpu="h")
    moved = own._replace(bundle="elsewhere/m")
    assert evidence_for(run, [own, moved]) == []
    assert evidence_for(run, [own, far, near]) == [near]
    assert evidence_for(run, [own, far]) == [far]
    assert evidence_for(run, [near._replace(engine="vllm 0")]) == []
    group = near._replace(n_engines=2)
    assert evidence_for(run, [near, group]) == [near]
    assert evidence_for(run, [far, group]) == [group]
    assert overhead_s([near, far._replace(overhead_ms=0.2)]) == pytest.approx(0.0006)
    assert overhead_s([near._replace(overhead_ms=-1.0)]) == 0.0
    assert {k.gpu for k in kept()} == {"RTX4090", "RTXPRO6000"}


def test_a_group_of_gpus_reduces_every_layer_and_gathers_the_logits() -> None:
    alone = small_profile()
    group = replace(alone, all_reduce=Collective(5.0, 0.5), gather=Collective(7.0, 2.0))
    step = ([(40, 0), (20, 16)], 10, 500)
    more_us = (2 * alone.n_layers + 1) * (5.0 + 0.5 * 70) + 7.0 + 2.0 * 12
    assert group.step_s(*step) - alone.step_s(*step) == pytest.approx(more_us * 1e-6)


def test_a_group_of_engines_takes_its_steps_together(tmp_path: Path) -> None:
    tables = write_profile(tmp_path / "RTX" / "Qwen" / "Qwen3-30B-A3B" / "bf16" / "tp1")
    table = ["tokens,activated_experts,time_us", "1,8,10", "64,64,100", "64,128,200"]
    (tables / "moe.csv").write_text("\n".join(table))
    group = {"data_parallel_size": 2, "enable_expert_parallel": True}
    folder = write_bundle(tmp_path / "RTX" / "m", 0.0)
    bundle = read_bundle(set_meta(folder, group, model="Qwen/Qwen3-30B-A3B"))
    assert bundle.n_engines == 2
    assert "all-gather and reduce-scatter" in " ".join(bundle.assumed)
    profile = profile_of(bundle, tmp_path)
    assert isinstance(profile, ExpertProfile)
    run = predicted(bundle, profile, 0.0)
    assert (run.ttft > 0).all() and (run.e2e >= run.ttft).all()
    # A row's 2,048 values and 128 logits travel there, its values back; half stays at home.
    per_row_us = 2 * 0.5 / bundle.link_bytes_per_s * 1e6
    assert profile.dispatch.us_per_row == pytest.approx(2176 * per_row_us)
    assert profile.combine.us_per_row == pytest.approx(2048 * per_row_us)
    with pytest.raises(ModelError, match="share experts"):
        read_bundle(set_meta(folder, {"data_parallel_size": 2, "enable_expert_parallel": False}))
    (tables / "moe.csv").unlink()
    with pytest.raises(ProfileError, match="missing"):
        profile_of(bundle, tmp_path)


def test_closed_loop_grows_with_load() -> None:
    def point(c: int) -> Point:
        return Point("e", "Llama-3.1-8B", "bfloat16", 1, 1024, 256, c, 1.0, 1.0)

    light, heavy, over = (predict(point(c), 0.0) for c in (1, 32, 2000))
    assert light[1] < heavy[1]
    assert light[0] < heavy[0]
    assert over[0] > 10 * heavy[0], "requests beyond the KV memory wait for a place"
    assert predict(point(8), 0.005)[1] > predict(point(8), 0.0)[1] + 0.004
    opening = predict(point(32), 0.0, 1)[0]
    assert opening > heavy[0], "users who all come at once wait for each other"


def test_who_follows_misses_the_step_that_begins() -> None:
    class Cost:
        """A decode step takes 1 s, a prompt 10 s."""

        def decode_s(self, n: int, context: float) -> float:
            return 1.0

        def step_s(self, pieces: list[tuple[int, int]], n: int, context: int) -> float:
            return 0.1 * sum(q for q, _ in pieces)

    batch = ClosedBatch(Cost(), 100, 5, 2, 9, 101, mixed=True)  # type: ignore[arg-type]
    # Both come at once: first tokens after 10.1 and 20 s. The first ends at 23 s, who follows
    # misses a decode step; the other ends with it, and his follower misses that prompt.
    assert batch.run(2, 0.0)[0] == pytest.approx((10.1 + 20) / 2)
    assert batch.run(4, 0.0)[0] == pytest.approx((10.1 + 20 + 11 + 20) / 4)


def test_the_silicon_fit_finds_the_overhead_and_the_length_of_its_own_runs() -> None:
    def point(c: int, engine: str = "vllm") -> Point:
        return Point(engine, "Llama-3.1-8B", "bfloat16", 1, 2048, 64, c, 1.0, 1.0)

    def measured(c: int, overhead_s: float, length: int) -> Point:
        ttft_s, tpot_s = predict(point(c), overhead_s, length)
        return replace(point(c), ttft_s=ttft_s, tpot_s=tpot_s)

    assert fit_step_s([measured(c, 3e-3, 10) for c in (8, 16)]) == pytest.approx(3e-3, abs=1e-4)
    assert fit_length([measured(c, 3e-3, 5) for c in (8, 16)], 3e-3) == 5
    # Prompts apart from decodes: everybody waits for every prompt, each time anew.
    assert predict(point(16, "sglang"), 0.0, 20)[0] > 2 * predict(point(16), 0.0, 20)[0]


def test_prompts_tell_which_prefixes_are_shared(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b", overhead_s=0.0)
    base = list(range(400))
    prompts = [base[:40], [*base[:32], 900, *base[33:57]]]
    prompts += [[1000 * i, *base] for i in range(2, 20)]
    workload = tmp_path / "w" / "w.jsonl"
    workload.parent.mkdir()
    workload.write_text("\n".join(json.dumps({"input_tok_ids": p}) for p in prompts))
    meta = json.loads((folder / "meta.json").read_text())
    meta["dataset_hash"] = hashlib.sha256(workload.read_bytes()).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta))
    first, second, third = [a.content for a in read_bundle(folder, workload.parent).arrivals][:3]
    assert first[:2] == second[:2]
    assert second[2] not in first
    assert not set(third) & set(first)
    assert read_bundle(folder).assumed[0] == "no two prompts share a prefix"
