"""`cachetune replay`: a trace in, a fleet's answer out; one life as a Chrome trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .file_cases import Run


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Twenty requests over shared blocks, in Mooncake's format."""
    rows = [
        {
            "timestamp": 200 * i,
            "input_length": 2064 + 16 * i,
            "output_length": 8,
            "hash_ids": [0, 1, 2, 3, 100 + i],
        }
        for i in range(20)
    ]
    path = tmp_path / "small.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in rows))
    return path


def test_a_replay_says_what_happened_and_shows_one_life(
    run: Run, trace: Path, tmp_path: Path
) -> None:
    rows, life = tmp_path / "rows.csv", tmp_path / "life.json"
    status, out, _ = run("replay", trace, "--life", 3, "--trace", life, "--out", rows)
    assert status == 0
    said = json.loads(out.strip().splitlines()[-1])
    assert said["n_requests"] == said["n_ended"] == 20
    assert said["littles_law_n_mean"] == pytest.approx(said["littles_law_rate_x_time"])
    assert len(rows.read_text().splitlines()) == 21
    names = {e["name"].split()[0] for e in json.loads(life.read_text())["traceEvents"]}
    assert {"prefill", "decode"} <= names
    again = json.loads(run("replay", trace)[1].strip().splitlines()[-1])
    assert again["ttft_ms_p99"] == said["ttft_ms_p99"], "being watched changes nothing"


def test_tensor_and_pipeline_parallel_groups(run: Run, trace: Path) -> None:
    found = {}
    for n_gpus, stages in ((1, 1), (2, 1), (1, 2)):
        status, out, err = run("replay", trace, "--n-gpus", n_gpus, "--stages", stages)
        assert status == 0, err
        found[n_gpus, stages] = json.loads(out.splitlines()[-1])
    assert found[2, 1]["ttft_ms_p50"] < found[1, 1]["ttft_ms_p50"]
    assert found[2, 1]["tpot_ms_p50"] < found[1, 2]["tpot_ms_p50"], "a lone token passes all stages"
    assert found[1, 2]["fleet"].count("pp2") == 1 and "stages" not in found[1, 2]["fleet"]


def test_a_snapshot_of_one_replay_warms_the_next(run: Run, trace: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    said = [json.loads(run("replay", trace, "--snapshot-out", kept)[1].splitlines()[-1])]
    assert set(json.loads(kept.read_text())["tiers"]) == {"dram", "nvme-gen4"}
    said.append(json.loads(run("replay", trace, "--snapshot", kept)[1].splitlines()[-1]))
    assert said[1]["computed_tokens"] < said[0]["computed_tokens"]
    assert said[1]["ttft_ms_mean"] < said[0]["ttft_ms_mean"]
    shorter = tmp_path / "shorter.jsonl"
    shorter.write_text("\n".join(trace.read_text().splitlines()[:5]))  # lacks most of the chunks
    again = tmp_path / "again.json"
    status, _, err = run("replay", shorter, "--snapshot", kept, "--snapshot-out", again)
    assert status == 0, err
    sizes = [json.loads(p.read_text())["tiers"]["dram"]["n_bytes"] for p in (kept, again)]
    assert sum(sizes[1]) == sum(sizes[0]), "what nobody asks for stays while there is room"
    for args, words in (
        (("--snapshot", kept, "--format", "int8"), "as many bytes"),
        (("--snapshot", kept, "--disk", "none"), "names tiers of the machine"),
        (("--snapshot", kept, "--policy", "full_recompute"), "0 tiers"),
        (("--snapshot-out", again, "--replicas", 2), "of one replica"),
    ):
        status, out, err = run("replay", trace, *args)
        assert (status, out) == (2, "") and words in err, err


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--life", 20, "rows 0 to 19"),
        ("--stages", 64, "every pipeline stage must have a layer"),
        ("--model", "Llama-3.1-70B", "2 stages of 1 x H100-SXM"),
        ("--gpu", "H1000", "H100"),
        ("--gpu", "H100-SXM,L4", "one fleet"),
        ("--eviction", "oldest", "lru"),
        ("--model", "Llama-9", "Llama"),
        ("--slo", "ttft=1", "ttft_ms"),
        ("--slo", "ttft_ms=1,tpot_ms=1,share=0.9", "ttft_ms and tpot_ms alone, got 'share=0.9'"),
        ("--class-slo", "ttft_ms=1,tpot_ms=1", "NAME:ttft_ms=,tpot_ms="),
        ("--class-slo", ":ttft_ms=1,tpot_ms=1,share=0.5", "got 'share=0.5'"),
    ],
)
def test_what_cannot_be_is_one_line(
    run: Run, trace: Path, option: str, value: object, says: str
) -> None:
    status, out, err = run("replay", trace, option, value)
    assert (status, out) == (2, "")
    assert says in err
    assert len(err.strip().splitlines()) == 1


def test_a_trace_is_not_overwritten(run: Run, trace: Path) -> None:
    before = trace.read_bytes()
    status, _, err = run("replay", trace, "--out", trace)
    assert status == 2 and "not written over an input" in err
    assert trace.read_bytes() == before


def test_a_replay_takes_the_machine_and_the_engine_of_a_question(
    run: Run, trace: Path, tmp_path: Path
) -> None:
    ours = tmp_path / "ours.json"
    ours.write_text(json.dumps({"gpus": {"H100-SXM": {"memory_bytes": 2.5e10}}}))
    base = json.loads(run("replay", trace)[1].splitlines()[-1])
    for more, differs in (
        (("--weights", "fp8"), "ttft_ms_p50"),
        (("--max-num-batched-tokens", 512), "ttft_ms_p99"),
        (("--max-num-seqs", 1, "--scale-rate", 100), "queue_ms_p99"),
    ):
        status, out, err = run("replay", trace, *more)
        assert status == 0 and json.loads(out.splitlines()[-1])[differs] != base[differs], err
    status, _, err = run("replay", trace, "--gpu-memory-utilization", 0.2)
    assert status == 2 and "short per GPU" in err
    status, _, err = run("replay", trace, "--dram-gib", 8)
    assert status == 2 and "DRAM must be above the 32 GiB" in err
    assert run("replay", trace, "--catalogue", ours)[0] == 0
    status, _, err = run("replay", trace, "--catalogue", ours, "--gpu-memory-utilization", 0.7)
    assert status == 2 and "short per GPU" in err


def test_classes_have_levels_and_priorities_of_their_own(run: Run, tmp_path: Path) -> None:
    rows = [
        {"arrival_s": 0.0, "prompt_tokens": 4000, "output_tokens": 4,
         "slo_class": "chat" if i % 2 else "batch"} for i in range(60)
    ]  # fmt: skip
    trace = tmp_path / "classes.jsonl"
    trace.write_text("\n".join(json.dumps(r) for r in rows))
    levels = ("--slo", "ttft_ms=1e6,tpot_ms=1e6", "--class-slo", "chat:ttft_ms=3000,tpot_ms=1e6")
    fair, first = (
        json.loads(run("replay", trace, *levels, *more)[1].splitlines()[-1])["good_share"]
        for more in ((), ("--priority", "chat"))
    )
    assert fair["batch"] == first["batch"] == 1.0
    assert fair["chat"] < 0.8 and first["chat"] > fair["chat"] + 0.15
    for wrong in (("--class-slo", "video:ttft_ms=1,tpot_ms=1"), ("--priority", "video")):
        status, _, err = run("replay", trace, *wrong)
        assert status == 2 and "classes are 'batch', 'chat'" in err
    twice = ("--class-slo", "chat:ttft_ms=1,tpot_ms=1") * 2
    status, _, err = run("replay", trace, *twice)
    assert status == 2 and "once for each class" in err
    status, _, err = run("replay", trace, "--class-slo", "chat:ttft_ms=1")
    assert status == 2 and "ttft_ms and tpot_ms" in err


def test_belady_warns_where_replicas_make_it_no_bound(run: Run, trace: Path) -> None:
    status, _, err = run("replay", trace, "--eviction", "belady", "--replicas", 2)
    assert status == 0 and "no bound" in err
    for argv in (("--router", "chunk_affinity"), ("--replicas", 1), ("--policy", "full_recompute")):
        _, _, err = run("replay", trace, "--eviction", "belady", "--replicas", 2, *argv)
        assert "no bound" not in err, argv
