"""Capacity planning: traffic that is paired, candidates, warm tiers, what-ifs, fronts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cachetune.core.catalogue import Catalogue, load_catalogue
from cachetune.core.errors import CacheTuneError, ProfileError, WorkloadError
from cachetune.core.machine_spec import compose
from cachetune.core.model_presets import model_preset
from cachetune.core.model_spec import ModelSpec
from cachetune.core.units import GIB
from cachetune.core.workload import Slo
from cachetune.simulator.gpu_sheet import gpu_sheet
from cachetune.tuner.candidate import HOST_BYTES, Candidate, data_sheet_of, kernels_of, sheet_of
from cachetune.tuner.evaluate import RunLength, evaluate
from cachetune.tuner.fleet_size import fewest, fleet_row
from cachetune.tuner.kernel_bounds import bounded_cost
from cachetune.tuner.question import Question
from cachetune.tuner.sensitivity import KNOBS, changes, default_changes
from cachetune.tuner.trace_study import Space, StudyQuestion, front, trace_study
from cachetune.tuner.traffic import Traffic, rate_of, traffic_of
from cachetune.tuner.warm_start import latest_first, warm_snapshot
from cachetune.tuner.whatif import best, pareto, plan, task_of

SLO = Slo(ttft_ms=400, tpot_ms=50)
RAG = Traffic(text="rag:passages=300,tokens=512,chunks=8,output=16")
LEASTS = [(1, 1, 4), (7, 40, 90), (40, 7, 90), (9, 9, 9)]
ENDS = ("low_s", "high_s")
SHORT = RunLength(horizon_s=10, min_requests=80, max_requests=80)


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return load_catalogue()


@pytest.fixture(scope="module")
def model() -> ModelSpec:
    return model_preset("Llama-3.1-8B")


@pytest.fixture(scope="module")
def candidate(catalogue: Catalogue) -> Candidate:
    machine = compose(catalogue, "H100-SXM", network="25g-rdma", dram_limit_bytes=HOST_BYTES + GIB)
    return Candidate(machine=machine)


@pytest.mark.parametrize("text", [RAG.text, "chat:"])
def test_runs_at_all_rates_see_the_same_requests(text: str):
    traffic = traffic_of(text)
    slow, fast = traffic.table(200, 1.0, seed=5), traffic.table(350, 40.0, seed=5)
    # Conversations come at the rate; their pauses stay, so that few requests last as long.
    begin_slow, begin_fast = (t.arrival_ns[t.after < 0] for t in (slow, fast))
    n = len(begin_slow)
    assert begin_fast[:n] == pytest.approx(begin_slow / 40.0, abs=1)
    if text == RAG.text:
        assert rate_of(slow) == pytest.approx(1.0, rel=0.2)
        assert rate_of(fast) == pytest.approx(40.0, rel=0.2)
    assert (slow.prompt_tokens == fast.prompt_tokens[:200]).all()
    assert (slow.chunk_ids == fast.chunk_ids[: len(slow.chunk_ids)]).all()
    other = traffic.table(200, 1.0, seed=6)
    assert (slow.prompt_tokens != other.prompt_tokens).any() or (
        slow.chunk_ids != other.chunk_ids
    ).any()
    for table in (slow, fast, traffic.replace(shared=0.5).table(200, 1.0, 5)):
        table.check()


def test_sharing_less_makes_more_different_chunks():
    for text in (RAG.text, "chat:systems=3"):
        different = [
            len(np.unique(traffic_of(text, shared=share).table(150, 1.0, 0).chunk_ids))
            for share in (1.0, 0.5, 0.0)
        ]
        assert different[0] < different[1] < different[2]


def test_a_trace_is_cut_into_windows_and_known_by_its_bytes(tmp_path: Path):
    path = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 100 * i, "input_length": 600 + i, "output_length": 5, "hash_ids": [i, i + 1]}
        for i in range(9000)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    traffic = traffic_of(str(path))
    assert traffic.rate_rps == pytest.approx(10.0, rel=1e-3) and len(traffic.digest) == 64
    starts = {int(traffic.table(50, 2.0, seed).prompt_tokens[0]) for seed in range(4)}
    assert len(starts) == 4 and traffic.before(50, 0) is None
    assert rate_of(traffic.table(50, 2.0, 0)) == pytest.approx(2.0, rel=0.05)
    path.write_text(path.read_text().replace('"output_length": 5', '"output_length": 0', 1))
    with pytest.raises(WorkloadError, match="line 1"):
        traffic_of(str(path))


def test_warm_tiers_hold_what_was_used_last(candidate: Candidate, model: ModelSpec):
    before = RAG.before(200, seed=1)
    assert before is not None
    fleet = candidate.fleet(model, SLO, n_replicas=2)
    found = warm_snapshot(before, fleet)
    chunk_bytes = 512 * model.kv_bytes_per_token
    dram, disk = found["dram"], found["nvme-gen4"]
    assert len(dram) == len(disk) == 2 and len(found["25g-rdma"]) == 1
    assert all(len(d) == GIB // chunk_bytes for d in dram)
    for mine, below in zip(dram, disk, strict=True):
        assert not set(mine.tolist()) & set(below.tolist())
    assert dram[0][-1] in before.chunk_ids[-16:]
    assert len(found["25g-rdma"][0]) == len(np.unique(before.chunk_ids))
    assert latest_first(np.array([3, 1, 3, 2, 1])).tolist() == [1, 2, 3]


def test_a_tier_beyond_break_even_is_computed(catalogue: Catalogue, model: ModelSpec):
    slow = Candidate(machine=compose(catalogue, "H100-SXM", disk="hdd-7200"))
    ratios = slow.fleet(model, SLO).policy.recompute_ratio
    assert ratios == {"*": 0.15, "hdd-7200": 1.0}
    kept = slow.replace(break_even=False).fleet(model, SLO).policy.recompute_ratio
    assert kept == {"*": 0.15}
    warm = [
        evaluate(c, model, SLO, RAG, SHORT, 4.0, 0) for c in (slow, slow.replace(policy="epic"))
    ]
    assert warm[0].good_share == 1.0
    assert warm[0].metrics["loaded_share"]["hdd-7200"] == 0.0


def test_more_bandwidth_and_more_replicas_never_hurt(catalogue: Catalogue, model: ModelSpec):
    p99 = {}
    for disk in ("sata-ssd", "nvme-gen4", "4x-nvme-gen5"):
        machine = compose(catalogue, "L40S", disk=disk, dram_limit_bytes=HOST_BYTES + GIB)
        candidate = Candidate(machine=machine, policy="full_reuse")
        p99[disk] = evaluate(candidate, model, SLO, RAG, SHORT, 1.0, 0).metrics["ttft_ms_p99"]
    assert p99["sata-ssd"] > p99["nvme-gen4"] > p99["4x-nvme-gen5"]
    one, two = (evaluate(candidate, model, SLO, RAG, SHORT, 6.0, 0, n_replicas=n) for n in (1, 2))
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
            bounded_cost(candidate, model, "low_s"),
            candidate.cost(model),
            bounded_cost(candidate, model, "high_s"),
        )
    )
    assert 0.5 * mid < low < mid < high < 2 * mid
    borrowed = candidate.replace(machine=compose(load_catalogue(), "MI300X"))
    ends = (bounded_cost(borrowed, model, e).step_s([(2048, 4096)], 16, 32000) for e in ENDS)
    one, other = ends
    assert other / one > 1.5 * high / low  # nobody measured it: the interval says so


def test_every_knob_changes_what_it_says(catalogue: Catalogue, model: ModelSpec):
    question = Question(model=model, slo=SLO, traffic=RAG)
    base = Candidate(machine=compose(catalogue, "H100-SXM"))
    text = (
        "gpu=L40S,n_gpus=2,link=pcie4-x16,dram=ddr4-3200,dram_gib=64,disk=none,network=25g-rdma,"
        "policy=epic,stored=int4,weights=fp8,ratio=0.3,shared=0.5,eviction=lfu"
    )
    asked = changes(text)
    assert tuple(c.knob for c in asked) == KNOBS
    for change in asked:
        changed = change.apply(question, base, catalogue)
        assert changed != (question, base)
        assert (changed[0] != question) == (change.knob == "shared")
    assert len(default_changes(base)) >= 8
    for bad in ("stored=int3", "ratio=2", "ratio=x", "gpu=H100", "n_gpus=0", "colour=red", "disk="):
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
    assert question.most_rps == 8.0 and question.replace(traffic=RAG).most_rps > 1e4
    row = plan(task_of(question, candidate))
    assert row["capacity_rps"] == 8.0 and row["note"].startswith("at least")


@pytest.mark.parametrize(
    ("least", "guess", "most"), [(1, 1, 4), (7, 40, 90), (40, 7, 90), (9, 9, 9)]
)
def test_the_fewest_are_found_with_few_tries(least: int, guess: int, most: int):
    tried: list[int] = []

    def carries(count: int) -> bool:
        tried.append(count)
        return count >= least

    assert fewest(carries, guess, most) == least
    assert len(set(tried)) == len(tried) <= 12 and max(tried) <= most
    assert fewest(lambda count: False, guess, most) is None


def test_very_many_replicas_are_counted_and_not_simulated(candidate: Candidate, model: ModelSpec):
    question = Question(model=model, slo=SLO, traffic=RAG, target_rps=1e5)
    row = {"capacity_rps": 10.0, "low_rps": 8.0, "usd_per_h": 2.0, "usd_per_mtok": 0.1}
    found = fleet_row(question, candidate, row)
    assert (found["replicas"], found["replicas_high"]) == (10_000, 12_500)
    assert found["fleet_usd_per_h"] == 20_000 and "by division" in found["note"]


def test_a_study_is_the_same_whatever_the_number_of_workers(model: ModelSpec):
    space = Space(gpus=("H100-SXM", "RTX-4090"), n_replicas=(1, 2), dram_gib=(64,))
    question = StudyQuestion(
        model=model, traffic=RAG, slo=SLO, n_requests=60, rate_rps=4.0, space=space, n_trials=24
    )
    study, rows = trace_study(question)
    assert len(study.trials) == len(rows) == 24
    assert trace_study(question, workers=2)[1] == rows
    costs = [r["usd_per_h"] for r in front(rows)]
    assert costs == sorted(costs) and 1 <= len(costs) <= len(study.best_trials)
