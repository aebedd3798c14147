"""`ServingResult`: what became of every request, in columns, and the summary of a run.

TTFT runs from arrival to the first token, TPOT is (last token - first) / (tokens - 1) of requests
with two tokens or more, E2E from arrival to the last token; percentiles interpolate linearly.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import WorkloadError
from ..core.ops import Span
from ..core.request_table import RequestTable
from ..core.timeline import Timeline
from ..core.units import NS_PER_MS, NS_PER_S
from ..core.workload import Request
from .serving_eviction import Order
from .serving_fleet import Fleet

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class ServingResult:
    """Columns of length n, one row per request of the table, in its order.

    Attributes:
        arrival_ns: with `after` resolved to the time it came.
        admitted_ns: when it got its place in the engine (the first time).
        gpu_tokens: prompt tokens whose KV was still in GPU memory.
        loaded_tokens, loaded_bytes: by tier, [n, tiers].
        recomputed_tokens: of found chunks, computed again by the policy.
        computed_tokens: of the prompt, loaded from nowhere. The four fates add up to the prompt;
            what a preempted request computes again is in `repeated_tokens`.
        unloaded_tokens: of those, what a tier held from which loading takes longer.
        written_bytes, dropped_bytes: by tier, of the run.
        busy_ns: per replica, time in which a step ran.
        spans: of watched rows.
    """

    table: RequestTable
    fleet: Fleet
    seed: int
    arrival_ns: Ints
    admitted_ns: Ints
    first_token_ns: Ints
    end_ns: Ints
    replica: Ints
    n_preemptions: Ints
    gpu_tokens: Ints
    recomputed_tokens: Ints
    computed_tokens: Ints
    unloaded_tokens: Ints
    repeated_tokens: Ints
    loaded_tokens: Ints
    loaded_bytes: Ints
    written_bytes: Ints
    dropped_bytes: Ints
    busy_ns: Ints
    n_steps: int
    n_events: int
    area_ns: int
    """Requests in the system, integrated over time by the simulator: L times the duration."""
    names: Ints = field(repr=False)
    """What chunks are called, by the keys that tiers use."""
    orders: dict[str, list[Order]] = field(repr=False)
    """Contents of each tier at the end, per replica (once if shared)."""
    spans: dict[int, tuple[Span, ...]]

    def __len__(self) -> int:
        return len(self.arrival_ns)

    @cached_property
    def snapshot(self) -> dict[str, list[Ints]]:
        """What lies in each tier at the end, coldest first, per replica (once if shared); most
        reports do without."""
        return {
            tier: [self.names[np.array(order.coldest_first(), np.int64)] for order in orders]
            for tier, orders in self.orders.items()
        }

    @property
    def tier_names(self) -> tuple[str, ...]:
        """Columns of `loaded_tokens`."""
        return tuple(t.name for t in self.fleet.replica.tiers)

    @property
    def ttft_ms(self) -> Floats:
        """Time to first token."""
        return (self.first_token_ns - self.arrival_ns) / NS_PER_MS

    @property
    def tpot_ms(self) -> Floats:
        """Time per output token after the first; nan for a single token."""
        gaps = (self.table.output_tokens - 1).astype(np.float64)
        gaps[gaps == 0] = np.nan
        return (self.end_ns - self.first_token_ns) / NS_PER_MS / gaps

    @property
    def e2e_ms(self) -> Floats:
        """Arrival to last token."""
        return (self.end_ns - self.arrival_ns) / NS_PER_MS

    @property
    def queue_ms(self) -> Floats:
        """Arrival to admission."""
        return (self.admitted_ns - self.arrival_ns) / NS_PER_MS

    @property
    def duration_s(self) -> float:
        """From the first arrival to the last token."""
        return float(self.end_ns.max() - self.arrival_ns.min()) / NS_PER_S

    def keeps_slo(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which requests keep the TTFT and the TPOT of their class; all do where none is asked."""
        table = self.table
        levels = [self.fleet.slo_of(name) for name in table.classes]
        ttft_ms = np.array([np.inf if level is None else level.ttft_ms for level in levels])
        tpot_ms = np.array([np.inf if level is None else level.tpot_ms for level in levels])
        return (
            self.ttft_ms <= ttft_ms[table.slo_class],
            np.nan_to_num(self.tpot_ms) <= tpot_ms[table.slo_class],
        )

    def meets_slo(self) -> dict[str, NDArray[np.bool_]]:
        """By class with a service level: which of its requests keep TTFT and TPOT."""
        in_ttft, in_tpot = self.keeps_slo()
        return {
            name: (in_ttft & in_tpot)[self.table.slo_class == code]
            for code, name in enumerate(self.table.classes)
            if self.fleet.slo_of(name) is not None
        }

    def littles_law(self) -> tuple[float, float]:
        """Both sides: requests in the system on average, and rate times mean time in it."""
        whole_s = max(self.duration_s, 1e-9)
        rate = len(self) / whole_s
        return self.area_ns / NS_PER_S / whole_s, rate * float(self.e2e_ms.mean()) / 1e3

    def summary(self) -> dict[str, Any]:
        """Everything a report prints, as JSON values with stable keys; units stand in names."""
        whole_s = max(self.duration_s, 1e-9)
        prompt = int(self.table.prompt_tokens.sum(dtype=np.int64))
        output = int(self.table.output_tokens.sum(dtype=np.int64))
        law = self.littles_law()
        good = self.meets_slo()
        return {
            "n_requests": len(self.table),
            "n_ended": int((self.end_ns >= 0).sum()),
            "duration_s": self.duration_s,
            "prompt_tokens": prompt,
            "output_tokens": output,
            "throughput_rps": len(self) / whole_s,
            "output_tokens_per_s": output / whole_s,
            "goodput_rps": {name: float(g.sum()) / whole_s for name, g in good.items()},
            "good_share": {name: float(g.mean()) for name, g in good.items() if len(g)},
            **_statistics("ttft_ms", self.ttft_ms),
            **_statistics("tpot_ms", self.tpot_ms),
            **_statistics("e2e_ms", self.e2e_ms),
            **_statistics("queue_ms", self.queue_ms),
            "utilisation": [float(b) / NS_PER_S / whole_s for b in self.busy_ns],
            "n_preemptions": int(self.n_preemptions.sum()),
            "gpu_hit_rate": float(self.gpu_tokens.sum()) / prompt,
            "tier_hit_rate": self._by_tier(self.loaded_tokens.sum(axis=0) / prompt),
            "loaded_bytes": self._by_tier(self.loaded_bytes.sum(axis=0)),
            "written_bytes": self._by_tier(self.written_bytes),
            "dropped_bytes": self._by_tier(self.dropped_bytes),
            "recomputed_tokens": int(self.recomputed_tokens.sum()),
            "computed_tokens": int(self.computed_tokens.sum()),
            "unloaded_tokens": int(self.unloaded_tokens.sum()),
            "repeated_tokens": int(self.repeated_tokens.sum()),
            "littles_law_n_mean": law[0],
            "littles_law_rate_x_time": law[1],
            "n_steps": self.n_steps,
            "n_events": self.n_events,
        }

    def columns(self) -> dict[str, NDArray[Any]]:
        """Facts by name, an array with one entry per request each: a data frame's columns."""
        columns: dict[str, NDArray[Any]] = {
            "tenant": np.asarray(self.table.tenants, dtype=object)[self.table.tenant],
            "slo_class": np.asarray(self.table.classes, dtype=object)[self.table.slo_class],
            "prompt_tokens": self.table.prompt_tokens,
            "output_tokens": self.table.output_tokens,
        }
        for name in (
            "arrival_ns", "admitted_ns", "first_token_ns", "end_ns", "replica", "n_preemptions",
            "gpu_tokens", "recomputed_tokens", "computed_tokens", "unloaded_tokens",
            "repeated_tokens", "ttft_ms", "tpot_ms", "e2e_ms", "queue_ms",
        ):  # fmt: skip
            columns[name] = getattr(self, name)
        for i, tier in enumerate(self.tier_names):
            columns[f"loaded_tokens_{tier}"] = self.loaded_tokens[:, i]
            columns[f"loaded_bytes_{tier}"] = self.loaded_bytes[:, i]
        return columns

    def request_trace(self, row: int) -> Timeline:
        """One request's life: its loads, prompt pieces and decode steps, for `core/trace.py`.

        Raises:
            WorkloadError: the run did not watch this row; what happens to it does not depend on
                being watched, so run again with `watch={row}`.
        """
        if row not in self.spans:
            raise WorkloadError(
                "a request's life is recorded only while it is watched",
                values=f"row {row}",
                remedy=f"run again with watch={{{row}}}",
            )
        request = Request(
            request_id=row,
            arrival_ns=int(self.arrival_ns[row]),
            chunks=(),
            suffix_tokens=int(self.table.prompt_tokens[row]),
            max_output_tokens=int(self.table.output_tokens[row]),
            output_tokens=int(self.table.output_tokens[row]),
        )
        return Timeline(self.spans[row], 0, (request,), f"{self.table.name}, row {row}")

    def _by_tier(self, values: NDArray[Any]) -> dict[str, float | int]:
        return {name: v.item() for name, v in zip(self.tier_names, values, strict=True)}


def _statistics(name: str, values: Floats) -> dict[str, float | None]:
    values = values[~np.isnan(values)]
    if not len(values):
        return {f"{name}_{s}": None for s in ("mean", *(f"p{p}" for p in PERCENTILES))}
    found: dict[str, float | None] = {f"{name}_mean": float(values.mean())}
    for p, value in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True):
        found[f"{name}_p{p}"] = float(value)
    return found
