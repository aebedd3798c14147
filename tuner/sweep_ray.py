"""Sweeps on a Ray cluster: the one that runs, or one made here for the time of the sweep."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..core.errors import CacheTuneError


def on_ray(
    work: Any, tasks: Sequence[Mapping[str, Any]], workers: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(place of the task, result) as they end; at most `workers` at a time.

    With RAY_ADDRESS set the tasks go to that cluster, where this package must be installed.

    Raises:
        CacheTuneError: Ray is not installed.
    """
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError:
        raise CacheTuneError(
            "the backend ray needs Ray", values="not installed", remedy="pip install cachetune[ray]"
        ) from None
    address = os.environ.get("RAY_ADDRESS")
    local = {} if address else {"num_cpus": workers, "include_dashboard": False}
    ray.init(address=address, log_to_driver=False, logging_level="ERROR", **local)
    call = ray.remote(num_cpus=1)(_call)
    try:
        left = list(enumerate(tasks))[::-1]
        running: dict[Any, int] = {}
        while left or running:
            while left and len(running) < workers:
                at, task = left.pop()
                running[call.remote(sys.path, work.__module__, work.__qualname__, dict(task))] = at
            ready, _ = ray.wait(list(running), num_returns=1)
            yield running.pop(ready[0]), ray.get(ready[0])
    finally:
        ray.shutdown()


def _call(path: list[str], module: str, name: str, task: dict[str, Any]) -> dict[str, Any]:
    """By name: what crosses the wire is data, and imports work as they do in the driver."""
    sys.path[:] = list(dict.fromkeys([*path, *sys.path]))
    result: dict[str, Any] = getattr(importlib.import_module(module), name)(task)
    return result
