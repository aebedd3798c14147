"""What-if of traffic in classes: each has its level, some go first."""

from __future__ import annotations

import json

import numpy as np
import pytest
from cachetune.core.catalogue import Catalogue
from cachetune.core.machine_spec import compose
from cachetune.core.model_presets import model_preset
from cachetune.core.rng import rng
from cachetune.core.workload import Slo
from cachetune.tuner.candidate import Candidate
from cachetune.tuner.evaluate import RunLength
from cachetune.tuner.question import LIMITS, Question
from cachetune.tuner.traffic import Traffic, traffic_of
from cachetune.tuner.whatif import plan, task_of

LOOSE = Slo(ttft_ms=20_000, tpot_ms=1e5)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Traffic:
    """Every fifth request is long and in no hurry."""
    path = tmp_path_factory.mktemp("traffic") / "mixed.jsonl"
    times = np.cumsum(rng(7, "gaps").exponential(0.2, 600)).round(4).tolist()
    rows = [
        {"arrival_s": at, "prompt_tokens": 16_000 if i % 5 == 0 else 500, "output_tokens": 8,
         "slo_class": "batch" if i % 5 == 0 else "chat"} for i, at in enumerate(times)
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    return traffic_of(str(path))


@pytest.fixture(scope="module")
def question(mixed: Traffic) -> Question:
    return Question(
        model=model_preset("Llama-3.1-8B"), slo=Slo(ttft_ms=600, tpot_ms=1e5), traffic=mixed,
        seeds=(0,), attainment=0.95, kernel_band=False, tolerance=0.05,
        length=RunLength(horizon_s=20, min_requests=600, max_requests=600),
    )  # fmt: skip


def test_each_class_is_held_to_its_own_level(question: Question, catalogue: Catalogue) -> None:
    candidate = Candidate(machine=compose(catalogue, "H100-SXM"), policy="full_recompute")
    batch = question.replace(class_slo={"batch": LOOSE})
    first = batch.replace(priority=("chat",))
    one, own, ahead = (plan(task_of(q, candidate)) for q in (question, batch, first))
    assert one["capacity_rps"] < own["capacity_rps"] < 0.9 * ahead["capacity_rps"]
    shares = [row["at_capacity"]["good_share_by_class"] for row in (one, own, ahead)]
    assert shares[0]["batch"] < shares[1]["batch"] and set(shares[2]) == {"batch", "chat"}
    assert "% of batch" in ahead["note"] and "keep their level" in ahead["note"]


def test_runs_are_long_enough_for_the_slowest_class(question: Question) -> None:
    assert question.replace(class_slo={"batch": LOOSE}).runs.horizon_s >= LIMITS * 20
    assert "batch 20000 and 100000 ms" in question.replace(class_slo={"batch": LOOSE}).asked
    assert question.traffic.classes == ("batch", "chat")
