"""A synthetic machine of eight layers whose tiers have a known rho, and prompts for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cachetune.core.catalogue import Catalogue, load_catalogue
from cachetune.core.hardware import HardwareProfile
from cachetune.core.model_spec import ModelSpec
from cachetune.core.plan import TunedPlan
from cachetune.core.workload import Workload
from cachetune.tuner.search import tune
from support import make_model, make_profile, make_tier, make_workload

TOKEN_S = 1e-4
"""Seconds to recompute one token, over all layers."""
RHOS = {"fast": 0.05, "mid": 0.7, "slow": 25.0}


@pytest.fixture(scope="session")
def catalogue() -> Catalogue:
    """The one that ships."""
    return load_catalogue()


@pytest.fixture(scope="session")
def model() -> ModelSpec:
    return make_model(n_layers=8, hidden_size=64, intermediate_size=128, head_dim=16)


@pytest.fixture(scope="session")
def profile(model: ModelSpec) -> HardwareProfile:
    flop_s = TOKEN_S / model.linear_flops(1, model.n_layers)
    tiers = {
        name: make_tier(model.kv_bytes_per_token / (rho * TOKEN_S)) for name, rho in RHOS.items()
    }
    coefficients = {
        "prefill.op": 2e-5,
        "prefill.layer": 0.0,
        "prefill.small_flop": flop_s,
        "prefill.flop": flop_s,
        "restore.op": 1e-5,
        "dispatch.gap": 1e-5,
    }
    return make_profile(model=model, tiers=tiers, coefficients_s=coefficients)


@pytest.fixture(scope="session")
def workload() -> Workload:
    return make_workload([("a", "b", "c", "d"), ("d", "a", "c", "b")], chunk_tokens=256)


@pytest.fixture(scope="session")
def tuned(profile: HardwareProfile, workload: Workload) -> Callable[[str], TunedPlan]:
    """Tuned plans by tier, each made once."""
    made: dict[str, TunedPlan] = {}

    def of(tier: str) -> TunedPlan:
        if tier not in made:
            made[tier] = tune(profile, workload, tier, n_trials=60, noise_seeds=(0,))
        return made[tier]

    return of
