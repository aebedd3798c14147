"""What a schedule costs at best: its flops and bytes at the limits measured in the same run.

Restoring is left out of the ideal: it moves what loading moves, on a stream of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core.model_spec import ModelSpec
from ..core.ops import Op, Schedule

if TYPE_CHECKING:
    from ..runtime.tiers import TierConfig
    from .ceilings import Ceiling


@dataclass(frozen=True)
class Work:
    """What one schedule asks for: flops of its matrices and attention, bytes of its loads."""

    flops: int
    n_bytes: int

    @staticmethod
    def of(schedule: Schedule, model: ModelSpec) -> Work:
        """Sums over the ops."""
        return Work(
            sum(op_flops(op, model) for op in schedule.ops),
            sum(op.n_bytes for op in schedule.ops if op.kind == "load"),
        )


def op_flops(op: Op, model: ModelSpec) -> int:
    """Flops of one op; loads and restores have none."""
    if op.kind in ("prefill", "decode"):
        linear = model.linear_flops(op.n_tokens, op.n_layers)
        return linear + model.attention_flops(op.n_pairs, op.n_layers)
    if op.kind == "select":  # only K is projected
        return 2 * op.n_tokens * model.hidden_size * model.n_kv_heads * model.head_dim
    if op.kind == "head":
        return 2 * model.vocab_size * model.hidden_size
    return 0


def load_rate(config: TierConfig, ceilings: Mapping[str, Ceiling]) -> tuple[float, str]:
    """Bytes per second that a tier could deliver, and which limit says so."""
    if config.limit_bytes_per_s is not None:
        return config.limit_bytes_per_s, "its limiter"
    if config.medium == "device":
        return math.inf, "nothing is moved"
    if config.medium == "file":
        if "disk" in ceilings:
            return ceilings["disk"].rate, "disk"
    elif config.medium != "dram":
        return ceilings["loopback"].rate, "loopback"
    if "h2d" in ceilings:
        return ceilings["h2d"].rate, "h2d"
    return ceilings["device_copy"].rate / 2, "half of device_copy"


@dataclass(frozen=True)
class Ideal:
    """The least a request could take: load and compute perfectly overlapped, milliseconds."""

    load_ms: float
    compute_ms: float

    @staticmethod
    def of(work: Work, load_bytes_per_s: float, flops_per_s: float) -> Ideal:
        """At these rates."""
        return Ideal(1e3 * work.n_bytes / load_bytes_per_s, 1e3 * work.flops / flops_per_s)

    @property
    def ms(self) -> float:
        """max(load, compute)."""
        return max(self.load_ms, self.compute_ms)


def ideal_speedup(baseline_ms: float, baseline: Work, work: Work, load_ms: float) -> float:
    """Speed-up if the flops that are left ran as fast as the baseline's did, loads beside them."""
    return baseline_ms / max(load_ms, baseline_ms * work.flops / baseline.flops)
