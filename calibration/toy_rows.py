"""The trained model, timed and scored in the same runs: TTFT and answers belong together."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from statistics import median
from typing import Any

from .quality import TIER, Arm, Tally, ask, ingest_record, workload_of
from .task_file import toy_library, toy_records
from .toy_model import TOY_FOLDER

TASK = "running_header"
RATIO = 0.15
ARMS = (
    Arm("full_recompute", "", 1.0),
    Arm("full_reuse", "", 0.0),
    Arm("epic", "chunk_start", RATIO),
    Arm("cacheblend", "", RATIO),
    Arm("cachetune", "low_pass", RATIO),
    Arm("cachetune", "spread_high_pass", RATIO),
)


def toy_rows(
    seed: int, n_contexts: int = 10, progress: Callable[[str, int, int], None] | None = None
) -> list[dict[str, Any]]:
    """A row per policy: median TTFT over fresh contexts, and the share of right answers."""
    from ..runtime.loaded_model import load_model
    from ..runtime.runner import Runner
    from ..runtime.tiers import TierConfig

    records = toy_records(seed, n_contexts)[TASK]
    library = toy_library(seed)[TASK]
    found: dict[Arm, list[Tally]] = {arm: [] for arm in ARMS}
    with (
        tempfile.TemporaryDirectory(prefix="cachetune-") as folder,
        Runner(load_model(TOY_FOLDER), folder, [TierConfig(TIER, "dram")], seed=seed) as runner,
    ):
        for i, record in enumerate(records):
            workload = workload_of(record)
            indexes = {o: runner.store.index(o) for o in ingest_record(runner, record, library)}
            for arm in ARMS:
                ask(runner, workload, record, arm, indexes[arm.order])  # warm-up, not timed
                found[arm].append(ask(runner, workload, record, arm, indexes[arm.order]))
            if progress is not None:
                progress("trained model", i + 1, n_contexts)
    baseline = median(t.ttft_ms for t in found[ARMS[0]])
    return [_row(arm, tallies, baseline) for arm, tallies in found.items()]


def _row(arm: Arm, tallies: list[Tally], baseline_ms: float) -> dict[str, Any]:
    cross_right, n_cross, local_right, n_local, _, n = (
        sum(t.counts[i] for t in tallies) for i in range(6)
    )
    ttft_ms = median(t.ttft_ms for t in tallies)
    return {
        "policy": arm.policy,
        "selector": arm.selector,
        "recompute_ratio": arm.ratio,
        "ttft_ms": ttft_ms,
        "speedup": baseline_ms / ttft_ms,
        "cross": cross_right / n_cross,
        "local": local_right / n_local,
        "n": n,
    }
