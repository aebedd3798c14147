"""What-if changes: what a candidate cannot take is said, and takes nothing else with it."""

from __future__ import annotations

import pytest
from cachetune.core.catalogue import Catalogue
from cachetune.core.errors import CacheTuneError
from cachetune.core.machine_spec import compose
from cachetune.core.model_presets import model_preset
from cachetune.core.workload import Slo
from cachetune.tuner.candidate import Candidate
from cachetune.tuner.question import Question
from cachetune.tuner.sensitivity import changes, check_changes, split
from cachetune.tuner.traffic import Traffic


@pytest.fixture(scope="module")
def question() -> Question:
    model = model_preset("Llama-3.1-8B")
    return Question(
        model=model, slo=Slo(ttft_ms=400, tpot_ms=50), traffic=Traffic(text="rag:output=16")
    )


def test_a_change_that_one_candidate_cannot_take(question: Question, catalogue: Catalogue) -> None:
    """Full recompute needs no DRAM for KV, reuse does: the answer to the rest is not lost."""
    machine = compose(catalogue, "H100-SXM")
    full, reuse = (Candidate(machine=machine, policy=p) for p in ("full_recompute", "cachetune"))
    asked = changes("dram_gib=16,disk=hdd-7200")
    check_changes(asked, question, [full, reuse], catalogue)
    able, unable = split(asked, question, reuse, catalogue)
    assert [c.text for c in able] == ["disk=hdd-7200"]
    (effect,) = unable
    assert effect["what"] == "dram_gib=16" and "DRAM must be above" in effect["why_not"]
    assert effect["ratio"] is None
    with pytest.raises(CacheTuneError, match="DRAM must be above"):
        check_changes(asked, question, [reuse], catalogue)
