"""Tiers that load more slowly than the machine computes: what a candidate does with them."""

from __future__ import annotations

import pytest
from cachetune.core.catalogue import Catalogue
from cachetune.core.machine_spec import compose
from cachetune.core.model_presets import model_preset
from cachetune.core.model_spec import ModelSpec
from cachetune.core.units import GIB
from cachetune.core.workload import Slo
from cachetune.tuner.candidate import HOST_BYTES, Candidate
from cachetune.tuner.evaluate import RunLength, evaluate
from cachetune.tuner.traffic import Traffic

SLO = Slo(ttft_ms=400, tpot_ms=50)
RAG = Traffic(text="rag:passages=300,tokens=512,chunks=8,output=16")
SHORT = RunLength(horizon_s=10, min_requests=80, max_requests=80)


@pytest.fixture(scope="module")
def model() -> ModelSpec:
    return model_preset("Llama-3.1-8B")


def test_a_tier_beyond_break_even_is_computed(catalogue: Catalogue, model: ModelSpec):
    slow = Candidate(machine=compose(catalogue, "H100-SXM", disk="hdd-7200"))
    rho = slow.fleet(model, SLO).policy.rho
    assert 0 < rho["dram"] < 1 < 15 < rho["hdd-7200"] < 40
    assert slow.replace(break_even=False).fleet(model, SLO).policy.rho == {}
    small = slow.machine.replace(dram_limit_bytes=HOST_BYTES + GIB)
    for policy in ("cachetune", "epic", "full_reuse"):
        one = slow.replace(policy=policy, machine=small)
        found = evaluate(one.fleet(model, SLO), one.cost(model), RAG, SHORT, 4.0, 0)
        assert found.good_share == 1.0
        loaded = found.metrics["loaded_share"]["hdd-7200"]
        assert 5 * loaded < found.metrics["unloaded_share"]


@pytest.mark.parametrize("policy", ["prefix_cache", "cachetune", "full_reuse"])
def test_a_tier_more_never_hurts(catalogue: Catalogue, model: ModelSpec, policy: str):
    """Of any speed, below capacity and at it; up to 2 % of the median for what comes together."""
    disks = (None, "hdd-7200", "sata-ssd", "nvme-gen3", "nvme-gen5")
    for gpu, rate in (("H100-SXM", 4.0), ("H100-SXM", 9.0), ("L40S", 1.5), ("L40S", 3.0)):
        p50 = {}
        for disk in disks:
            machine = compose(catalogue, gpu, disk=disk, dram_limit_bytes=HOST_BYTES + GIB)
            candidate = Candidate(machine=machine, policy=policy)
            found = evaluate(
                candidate.fleet(model, SLO), candidate.cost(model), RAG, SHORT, rate, 0
            )
            p50[disk] = found.metrics["ttft_ms_p50"]
        assert max(p50.values()) <= 1.02 * p50[None], (gpu, rate, p50)
