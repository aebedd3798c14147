"""A task for sweeps in other processes, which find it by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cachetune.core.rng import rng


def draws(task: Mapping[str, Any]) -> dict[str, Any]:
    """Sum and spread of `n` draws from the stream of a seed."""
    values = rng(task["seed"], "draws").normal(size=task["n"])
    return {"n": task["n"], "sum": float(values.sum()), "spread": float(values.std())}
