"""The conformance suite on the simulated executor, exact and with noise."""

from __future__ import annotations

import pytest
from cachetune.core.chunk_index import ChunkIndex
from cachetune.core.plan import ReusePlan
from cachetune.simulator.executor import SimExecutor
from executors.conformance import *  # noqa: F403
from executors.conformance import WORKLOAD, DecisionOf, Rig
from support import make_index, make_model, make_profile


@pytest.fixture(params=[0.0, 0.3], ids=["exact", "noisy"])
def rig(request: pytest.FixtureRequest) -> Rig:
    def index(plan: ReusePlan) -> ChunkIndex:
        return make_index(WORKLOAD)

    def executor(plan: ReusePlan, decision_of: DecisionOf) -> SimExecutor:
        return SimExecutor(make_profile(), seed=1, noise=request.param)

    return Rig(make_model(), index, executor)
