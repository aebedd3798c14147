"""Capacity planning: traffic that is paired, candidates, warm tiers, what-ifs, fronts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cachetune.core.arrivals import Arrivals, closed_loop
from cachetune.core.catalogue import Catalogue, load_catalogue
from cachetune.core.errors import CacheTuneError, ProfileError
from cachetune.core.machine_spec import compose
from cachetune.core.memory_sum import NCCL_BYTES
from cachetune.core.model_presets import model_preset
from cachetune.core.model_spec import ModelSpec
from cachetune.core.rng import rng
from cachetune.core.trace_files import write_trace
from cachetune.core.trace_make import rag_table
from cachetune.core.units import GIB
from cachetune.core.workload import Slo
from cachetune.simulator.gpu_sheet import gpu_sheet
from cachetune.tuner.candidate import (
    HOST_BYTES,
    Candidate,
    data_sheet_of,
    kernels_of,
    sheet_of,
)
from cachetune.tuner.capacity import find_capacity
from cachetune.tuner.evaluate import RunLength, evaluate, falls_behind
from cachetune.tuner.fleet_size import fleet_row
from cachetune.tuner.overload import BEHIND_MAX
from cachetune.tuner.question import RAMP, Question, runner
from cachetune.tuner.sensitivity import KNOBS, changes, default_changes, effects, tasks
from cachetune.tuner.traffic import Traffic, apart, traffic_of
from cachetune.tuner.warm_start import latest_first, warm_snapshot
from cachetune.tuner.whatif import best, pareto, plan, task_of

SLO = Slo(ttft_ms=400, tpot_ms=50)
RAG = Traffic(text="rag:passages=300,tokens=512,chunks=8,output=16")
LEASTS = [(1, 1, 4), (7, 40, 90), (40, 7, 90), (9, 9, 9)]
ENDS = ("low_s", "high_s")
SHORT = RunLength(horizon_s=10, min_requests=80, max_requests=80)


@pytest.fixture(scope="module")
def model() -> ModelSpec:
    return model_preset("Llama-3.1-8B")


def served(candidate: Candidate, model: ModelSpec, n_replicas: int = 1):
    return candidate.fleet(model, SLO, n_replicas), candidate.cost(model)


@pytest.fixture(scope="module")
def candidate(catalogue: Catalogue) -> Candidate:
    machine = compose(catalogue, "H100-SXM", network="25g-rdma", dram_limit_bytes=HOST_BYTES + GIB)
    return Candidate(machine=machine)


def test_windows_that_show_nothing_new_do_not_run(bursty: Traffic, model: ModelSpec):
    """A window of 400 of 600 requests judges 53 %: three of them see all, five of 150 do not."""
    length = RunLength(horizon_s=100, min_requests=100, max_requests=400)
    question = Question(model=model, slo=SLO, traffic=bursty, length=length)
    assert apart([0]) == 1.0 and apart([0, 1, 2]) == pytest.approx(0.382, abs=1e-3)
    assert question.seeds_at(4.0) == (0, 1, 2) and question.seeds_at(1.0) == (0, 1, 2, 3, 4)
    assert question.replace(traffic=RAG).seeds_at(4.0) == question.seeds


def test_warm_tiers_hold_what_was_used_last(candidate: Candidate, model: ModelSpec):
    before = RAG.before(200, seed=1)
    assert before is not None
    fleet = candidate.fleet(model, SLO, n_replicas=2)
    found = warm_snapshot(before, fleet)
    kept_bytes = 512 * candidate.kv_bytes_per_token(model)
    dram, disk = found["dram"], found["nvme-gen4"]
    assert len(dram) == len(disk) == 2 and len(found["25g-rdma"]) == 1
    assert all(len(d) == GIB // kept_bytes for d in dram)
    for mine, below in zip(dram, disk, strict=True):
        assert not set(mine.tolist()) & set(below.tolist())
    assert dram[0][-1] in before.chunk_ids[-16:]
    assert len(found["25g-rdma"][0]) == len(np.unique(before.chunk_ids))
    assert latest_first(np.array([3, 1, 3, 2, 1])).tolist() == [1, 2, 3]


def test_warm_tiers_of_tenants_are_their_own(candidate: Candidate, model: ModelSpec):
    before = RAG.before(200, seed=1)
    assert before is not None
    tenants = (np.arange(len(before)) % 2).astype(np.int16)
    both = replace(before, tenants=("a", "b"), tenant=tenants)
    found = warm_snapshot(both, candidate.fleet(model, SLO))
    rows = before.rows_of_chunks()
    names = set((before.chunk_ids * 2 + tenants[rows]).tolist())
    assert set(found["25g-rdma"][0].tolist()) == names
    assert evaluate(*served(candidate, model), RAG, SHORT, 4.0, 0).good_share > 0


def test_a_queue_that_grows_is_told_from_a_burst():
    """One server, ten per second: at 12 it falls behind by a fifth, at 9 it does not."""

    def served(arrival_s: np.ndarray) -> float:
        begin = np.arange(len(arrival_s)) * 0.1
        ttft_s = np.maximum.accumulate(arrival_s - begin) + begin - arrival_s + 0.1
        return falls_behind((arrival_s * 1e9).astype(np.int64), 1e3 * ttft_s)

    gaps = rng(0, "gaps").exponential(size=4000)
    assert served(np.cumsum(gaps / 12)) == pytest.approx(0.2, abs=0.06)
    assert abs(served(np.cumsum(gaps / 9))) < BEHIND_MAX / 2
    burst = gaps / 8
    burst[3600:] /= 4  # the last tenth comes four times as fast
    assert served(np.cumsum(burst)) < BEHIND_MAX
    assert served(np.cumsum(gaps / 11)[:1]) == 0.0


@pytest.fixture(scope="module")
def bursty(tmp_path_factory: pytest.TempPathFactory) -> Traffic:
    """Long prompts that come in bursts of an hour's trace; a third begins like one before."""
    stream, at_ms, lines = rng(0, "bursty"), 0.0, []
    for i in range(600):
        quiet = 4.0 if (i // 60) % 3 else 0.6
        at_ms += stream.exponential() * 1000 * quiet
        tokens = int(min(60_000, 1000 + stream.lognormal(8.8, 1.0)))
        first = int(stream.integers(0, 40)) if stream.random() < 0.33 else 10_000 * (i + 1)
        blocks = [first * 200 + k for k in range(tokens // 512)]
        output = int(stream.integers(2, 600))
        lines.append({"timestamp": int(at_ms), "input_length": tokens, "output_length": output})
        lines[-1]["hash_ids"] = blocks
    path = tmp_path_factory.mktemp("traces") / "bursty.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return traffic_of(str(path))


def test_a_bursty_trace_s_capacity_is_where_its_queue_grows(
    bursty: Traffic, catalogue: Catalogue, model: ModelSpec
):
    """More replicas, a faster GPU, a better policy: never less."""
    slo = Slo(ttft_ms=20_000, tpot_ms=1000)
    question = Question(
        model=model, slo=slo, attainment=0.95, traffic=bursty, seeds=(0,), tolerance=0.05,
        kernel_band=False, length=RunLength(horizon_s=60, min_requests=200, max_requests=800),
    )  # fmt: skip
    assert question.runs.horizon_s == pytest.approx(400) and question.runs.min_requests == 600

    def carried(gpu: str, policy: str, n_replicas: int = 1) -> float:
        candidate = Candidate(machine=compose(catalogue, gpu), policy=policy)
        run = runner(question, candidate, n_replicas=n_replicas)
        found = find_capacity(run, question.attainment, question.seeds, tolerance=0.05).rate
        assert found is not None
        return found.value

    plain, reused = carried("H100-SXM", "full_recompute"), carried("H100-SXM", "prefix_cache")
    assert plain < reused and carried("L40S", "full_recompute") < plain
    assert carried("H100-SXM", "full_recompute", 4) > 4 * plain  # they share the bursts
    candidate = Candidate(machine=compose(catalogue, "H100-SXM"), policy="full_recompute")
    run = runner(question, candidate)
    below, above, far = (run(plain * k, 0) for k in (0.9, 1.1, 4.0))
    assert below.good_share >= 0.95 > above.good_share and below.stable and not far.stable


def test_a_model_too_large_for_a_gpu_fits_in_two_stages(catalogue: Catalogue):
    large = model_preset("Llama-3.1-70B")
    question = Question(
        model=large, slo=Slo(ttft_ms=4000, tpot_ms=200), traffic=RAG, attainment=0.9, seeds=(0,),
        length=SHORT, tolerance=0.2, kernel_band=False,
    )  # fmt: skip
    one = Candidate(machine=compose(catalogue, "H200-SXM"), policy="full_recompute")
    row = plan(task_of(question, one))
    assert "2 stages of 1 x H200-SXM" in row["why_not"] and "2 x H200-SXM" in row["why_not"]
    two = Candidate(machine=compose(catalogue, "H200-SXM", n_gpus=2), stages=2, policy=one.policy)
    row = plan(task_of(question, two))
    assert row["why_not"] == "" and row["name"].startswith("2xH200-SXM pp2")
    assert row["usd_per_h"] == 2 * one.machine.usd_per_h and row["capacity_rps"] > 0
    memory = {item["what"]: item["n_bytes"] for item in row["memory"]}
    assert -memory["weights"] == large.n_params  # bytes: two a weight, half of them in a stage
    assert memory["NCCL buffers"] == -NCCL_BYTES
    four = two.replace(machine=compose(catalogue, "H200-SXM", n_gpus=4))
    assert four.gpus_per_stage == 2 and four.name.startswith("4xH200-SXM pp2")
    both = {item.what: item.n_bytes for item in four.memory(large).items}
    assert both["NCCL buffers"] == -2 * NCCL_BYTES  # one group of a stage, one of the stages
    assert four.memory(large).kv_tokens > two.memory(large).kv_tokens
    alone = two.replace(stages=1)  # tensor parallel: as much memory, another cost
    assert alone.memory(large).kv_tokens == pytest.approx(two.memory(large).kv_tokens, rel=0.05)
    assert alone.cost(large).step_s([], 1, 1000) < two.cost(large).step_s([], 1, 1000)
    with pytest.raises(ValueError, match="stages"):
        two.replace(stages=3)
    small = large.replace(n_layers=1)
    with pytest.raises(CacheTuneError, match="has 1 layers"):
        two.check_fits(small, catalogue, 1)


def test_more_bandwidth_and_more_replicas_never_hurt(catalogue: Catalogue, model: ModelSpec):
    p99 = {}
    for disk in ("sata-ssd", "nvme-gen4", "4x-nvme-gen5"):
        machine = compose(catalogue, "L40S", disk=disk, dram_limit_bytes=HOST_BYTES + GIB)
        candidate = Candidate(machine=machine, policy="full_reuse")
        p99[disk] = evaluate(*served(candidate, model), RAG, SHORT, 1.0, 0).metrics["ttft_ms_p99"]
    assert p99["sata-ssd"] > p99["nvme-gen4"] > p99["4x-nvme-gen5"]
    one, two = (evaluate(*served(candidate, model, n), RAG, SHORT, 6.0, 0) for n in (1, 2))
    assert two.metrics["ttft_ms_p99"] < one.metrics["ttft_ms_p99"]


def test_borrowed_matmuls_end_where_the_gpu_was_seen_to(catalogue: Catalogue):
    for name in ("MI300X", "B200-SXM", "GH200"):
        row = catalogue.gpu(name)
        assert row.matmul_flops is not None
        donor = catalogue.gpu("H100-SXM")
        assert donor.matmul_flops is not None
        reached = donor.matmul_flops.value / gpu_sheet("H100-SXM").bf16_flops
        assert sheet_of(row).bf16_flops * reached == pytest.approx(row.matmul_flops.value)
        assert any("borrowed" in k["kind"] for k in kernels_of(row))
    assert sheet_of(catalogue.gpu("H100-SXM")) == gpu_sheet("H100-SXM")
    with pytest.raises(ProfileError, match="give its peaks"):
        data_sheet_of(catalogue.gpu("L4").replace(name="L5"))


def test_the_ends_of_the_kernels_hold_their_middle(candidate: Candidate, model: ModelSpec):
    low, mid, high = (
        c.step_s([(2048, 4096)], 16, 16 * 2000)
        for c in (
            candidate.cost(model, "low_s"),
            candidate.cost(model),
            candidate.cost(model, "high_s"),
        )
    )
    assert 0.5 * mid < low < mid < high < 2 * mid
    borrowed = candidate.replace(machine=compose(load_catalogue(), "MI300X"))
    ends = (borrowed.cost(model, e).step_s([(2048, 4096)], 16, 32000) for e in ENDS)
    one, other = ends
    assert other / one > 1.5 * high / low  # nobody measured it: the interval says so


def test_every_knob_changes_what_it_says(catalogue: Catalogue, model: ModelSpec):
    question = Question(model=model, slo=SLO, traffic=RAG)
    base = Candidate(machine=compose(catalogue, "H100-SXM"))
    text = (
        "gpu=L40S,n_gpus=2,stages=2,link=pcie4-x16,dram=ddr4-3200,dram_gib=64,disk=none,network=25g-rdma,"
        "policy=epic,stored=int4,weights=fp8,ratio=0.3,shared=0.5,eviction=lfu"
    )
    asked = changes(text)
    assert tuple(c.knob for c in asked) == KNOBS
    for change in asked:
        changed = change.apply(question, base, catalogue)
        assert changed != (question, base)
        assert (changed[0] != question) == (change.knob == "shared")
    assert changes("format=int4")[0].knob == "stored", "as the option is called"
    assert len(default_changes(base)) >= 8
    for bad in ("stored=int5", "ratio=2", "ratio=x", "gpu=H100", "n_gpus=0", "colour=red", "disk="):
        with pytest.raises(CacheTuneError):
            changes(bad)[0].apply(question, base, catalogue)


def test_the_front_is_what_none_beats():
    points = [(3.0, 10.0), (1.0, 50.0), (2.0, 60.0), (2.0, 20.0), (4.0, 10.0)]
    rows = [
        {
            "name": str(i), "fingerprint": str(i), "why_not": "", "usd_per_h": 1.0,
            "points": [{"usd_per_mtok": cost, "ttft_ms_p99": ttft}],
        }
        for i, (cost, ttft) in enumerate(points)
    ]  # fmt: skip
    assert [p["name"] for p in pareto(rows)] == ["1", "3", "0"]


def test_the_best_is_the_cheapest_where_its_interval_is_unfavourable():
    def row(name: str, usd: float | None, rate: tuple[float, float], n: tuple[int, int | None]):
        low, middle = rate
        return {
            "name": name, "why_not": "", "usd_per_h": usd, "low_rps": low, "capacity_rps": middle,
            "replicas": n[0], "replicas_high": n[1],
        }  # fmt: skip

    known, guessed = row("known", 2.7, (20, 22), (1, 2)), row("guessed", 2.0, (9, 26), (1, 3))
    unsure = row("unsure", 0.1, (0, 30), (1, None))
    rows = [known, guessed, unsure]
    for target in (False, True):
        assert best(rows, target) is known
        assert best(rows[1:], target) is guessed and best(rows[:2], target, sure=False) is guessed
        assert best([row("no price", None, (99, 99), (1, 1)), *rows], target) is known
        assert best([{**r, "usd_per_h": None} for r in rows], target) == {
            **known,
            "usd_per_h": None,
        }
    assert best([{**known, "why_not": "no"}], False) is None


def test_a_plan_is_the_same_each_time_and_says_why_not(candidate: Candidate, model: ModelSpec):
    question = Question(
        model=model, slo=SLO, traffic=RAG, seeds=(0,), length=SHORT, tolerance=0.2,
        kernel_band=False,
    )  # fmt: skip
    task = json.loads(json.dumps(task_of(question, candidate)))
    assert plan(task) == plan(task)
    row = plan(task)
    assert 1 < row["low_rps"] <= row["capacity_rps"] <= row["high_rps"]
    assert row["limit"] in ("TTFT", "TPOT", "throughput")
    strict = question.replace(slo=Slo(ttft_ms=1, tpot_ms=1))
    row = plan(task_of(strict, candidate))
    assert "closest" in row["why_not"] and "capacity_rps" not in row
    assert "(0.0 % keep it)" in row["why_not"]


def test_runs_of_conversations_do_not_show_rates_that_they_cannot(
    candidate: Candidate, model: ModelSpec
):
    chat = traffic_of("chat:output=2,message=10,system=50")
    question = Question(
        model=model, slo=SLO, traffic=chat, seeds=(0,), length=SHORT, kernel_band=False
    )
    most = RAMP * SHORT.max_requests / chat.ramp_s
    assert question.most_rps == most and question.replace(traffic=RAG).most_rps > 1e4
    row = plan(task_of(question, candidate))
    assert row["capacity_rps"] == most and row["note"].startswith("at least")
    fp8 = changes("weights=fp8")
    (effect,) = effects(fp8, [row], row, question.attainment)  # either may be as high as it likes
    assert effect["ratio"] is None and "too short" in effect["why_not"]


def test_runs_that_hold_little_of_a_trace_say_so(
    candidate: Candidate, model: ModelSpec, tmp_path: Path
):
    write_trace(rag_table(2000, Arrivals(rate_rps=1.0), passages=99), tmp_path / "long.jsonl")
    long = traffic_of(str(tmp_path / "long.jsonl"))
    asked = Question(
        model=model, slo=SLO, traffic=long, seeds=(0, 1), length=SHORT, kernel_band=False,
        tolerance=0.2,
    )  # fmt: skip
    assert "runs hold 8 % of the trace" in plan(task_of(asked, candidate))["note"]
    more = asked.replace(length=SHORT.replace(max_requests=800))
    assert "of the trace" not in plan(task_of(more, candidate))["note"]


def test_a_closed_loop_shows_the_rate_of_its_users_alone(
    candidate: Candidate, model: ModelSpec, tmp_path: Path
):
    users = closed_loop(rag_table(40, Arrivals(rate_rps=1.0), passages=20), 2, 5.0, seed=0)
    write_trace(users, tmp_path / "loop.jsonl")
    loop = traffic_of(str(tmp_path / "loop.jsonl"))
    question = Question(model=model, slo=SLO, traffic=loop, seeds=(0,), kernel_band=False)
    assert loop.rate_rps is not None and 0.2 < loop.rate_rps < 0.6  # two users, 5 s each
    row = plan(task_of(question, candidate))
    assert row["capacity_rps"] < 1.0 and "the trace is too short" in row["note"]


@pytest.mark.parametrize("n", [1, 2, 30])
def test_a_trace_of_few_requests_shows_no_rate_that_it_ends_before(
    n: int, candidate: Candidate, model: ModelSpec, tmp_path: Path
):
    """However closely they come: without this the capacity was 1e5 requests/s, for nothing."""
    write_trace(rag_table(n, Arrivals(rate_rps=1.0), passages=20), tmp_path / "few.jsonl")
    few = traffic_of(str(tmp_path / "few.jsonl"))
    slo = Slo(ttft_ms=60_000, tpot_ms=1000)
    question = Question(model=model, slo=slo, traffic=few, seeds=(0,), kernel_band=False)
    row = plan(task_of(question, candidate))
    assert row["at_least"] and row["capacity_rps"] == pytest.approx(max(n / 60, few.rate_rps or 0))
    assert 1e-4 < row["usd_per_mtok"] < 1e3
    assert row["note"].startswith(("runs are too short", "at least"))
    assert ("no more" in row["note"]) == row["note"].startswith("runs are too short")


def test_runs_in_which_most_requests_meet_are_called_too_short(
    candidate: Candidate, model: ModelSpec
):
    slow = Question(
        model=model, slo=Slo(ttft_ms=1000, tpot_ms=50), traffic=RAG, seeds=(0,), length=SHORT,
        kernel_band=False, tolerance=0.2,
    )  # fmt: skip
    short = slow.replace(traffic=traffic_of(RAG.text.replace("output=16", "output=400")))
    row = plan(task_of(short, candidate))
    assert row["note"].startswith("runs are too short") and "--max-requests" in row["note"]


def test_very_many_replicas_are_counted_and_not_simulated(candidate: Candidate, model: ModelSpec):
    question = Question(model=model, slo=SLO, traffic=RAG, target_rps=1e5)
    row = {"capacity_rps": 10.0, "low_rps": 8.0, "usd_per_h": 2.0, "usd_per_mtok": 0.1}
    found = fleet_row(question, candidate, row | {"note": "at least"})
    assert found["note"].startswith("at least; ")
    found = fleet_row(question, candidate, row | {"note": ""})
    assert (found["replicas"], found["replicas_high"]) == (10_000, 12_500)
    assert found["fleet_usd_per_h"] == 20_000 and "by division" in found["note"]


def test_another_gpu_brings_its_own_kernels_into_the_interval(
    candidate: Candidate, model: ModelSpec, catalogue: Catalogue
):
    question = Question(model=model, slo=SLO, traffic=RAG, seeds=(0,), length=SHORT, tolerance=0.2)
    base = plan(task_of(question, candidate))
    asked = changes("gpu=GH200,ratio=0.15")
    rows = [plan(task) for task in tasks(asked, question, candidate, catalogue)]
    other, same = effects(asked, rows, base, question.attainment)
    assert (same["low"], same["ratio"], same["high"]) == (1.0, 1.0, 1.0)
    assert other["low"] < 0.8 * other["ratio"] and other["high"] > 1.2 * other["ratio"]
    (open_end,) = effects(asked[:1], rows[:1], {**base, "kernels_low_rps": 0.0}, 0.99)
    assert open_end["high"] is None
