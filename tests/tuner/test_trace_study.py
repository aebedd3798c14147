"""Studies of fleets for a trace: the same however many workers, judged when traffic is steady."""

from __future__ import annotations

import pytest
from cachetune.core.model_presets import model_preset
from cachetune.core.model_spec import ModelSpec
from cachetune.core.workload import Slo
from cachetune.tuner.trace_study import Space, StudyQuestion, front, trace_study
from cachetune.tuner.traffic import Traffic, traffic_of

SLO = Slo(ttft_ms=400, tpot_ms=50)
RAG = Traffic(text="rag:passages=300,tokens=512,chunks=8,output=16")


@pytest.fixture(scope="module")
def model() -> ModelSpec:
    return model_preset("Llama-3.1-8B")


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


def test_a_study_judges_conversations_once_they_are_under_way(
    model: ModelSpec, monkeypatch: pytest.MonkeyPatch
):
    only = Space(
        gpus=("H100-SXM",), n_replicas=(1, 1), policies=("cachetune",), stored=("bf16",),
        disks=("none",), networks=("none",), dram_gib=(64,), evictions=("lru",),
        routers=("least_load",), batch_tokens=(8192,),
    )  # fmt: skip
    question = StudyQuestion(
        model=model, traffic=traffic_of("chat:output=100"), slo=SLO, n_requests=400, rate_rps=15.0,
        space=only, n_trials=1,
    )  # fmt: skip
    later = trace_study(question)[1][0]
    monkeypatch.setattr(Traffic, "ramp_s", 0.0)
    first = trace_study(question)[1][0]
    assert later["why_not"] == first["why_not"] == ""
    assert later["tpot_ms_p99"] > 1.1 * first["tpot_ms_p99"]
