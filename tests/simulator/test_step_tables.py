"""`StepTables` against the `ModelCost` it is made from."""

from __future__ import annotations

import numpy as np
import pytest
from cachetune.core.model_presets import model_preset
from cachetune.core.rng import rng
from cachetune.simulator.kernel_cost import KernelCost
from cachetune.simulator.model_cost import ModelCost
from cachetune.simulator.step_tables import StepTables


@pytest.fixture(scope="module")
def cost() -> ModelCost:
    return ModelCost(model_preset("Llama-3.1-8B"), KernelCost.load("H100-SXM"))


def test_steps_are_those_of_the_model_cost(cost: ModelCost):
    draw = rng(3, "steps")
    tables = StepTables(cost, overhead_s=1e-3)
    errors = []
    for _ in range(150):
        n_pieces = int(draw.integers(1, 4))
        pieces = [
            (int(2 ** draw.uniform(0, 11)), int(2 ** draw.uniform(0, 17)) - 1)
            for _ in range(n_pieces)
        ]
        n_decode = int(draw.integers(0, 65))
        context = n_decode * int(draw.integers(16, 8192))
        exact = cost.step_s(pieces, n_decode, context) + 1e-3
        errors.append(tables.step_s(pieces, n_decode, context) / exact - 1)
    assert abs(np.mean(errors)) < 0.01
    assert np.percentile(np.abs(errors), 95) < 0.04
    assert np.abs(errors).max() < 0.1


def test_a_run_of_decodes_is_the_sum_of_its_steps(cost: ModelCost):
    tables = StepTables(cost, overhead_s=5e-4)
    steps = sum(tables.step_s([], 24, 24 * 700 + 24 * i) for i in range(400))
    assert tables.decode_run_s(24, 24 * 700, 400) == pytest.approx(steps, rel=1e-9)
