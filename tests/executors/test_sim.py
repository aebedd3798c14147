"""The conformance suite on the simulated executor."""

from __future__ import annotations

import pytest
from cachetune.core.plan import ReusePlan
from cachetune.core.workload import Workload
from cachetune.simulator.executor import SimExecutor
from executors.conformance import *  # noqa: F403
from executors.conformance import MakeExecutor
from support import make_profile


@pytest.fixture(params=[0.0, 0.3], ids=["exact", "noisy"])
def make_executor(request: pytest.FixtureRequest) -> MakeExecutor:
    def make(workload: Workload, plan: ReusePlan) -> SimExecutor:
        return SimExecutor(make_profile(), seed=1, noise=request.param)

    return make
