"""`Columns`: what a serving run writes down, a number per request and fact."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..core.ops import Span
from ..core.request_table import RequestTable
from .serving_fleet import Fleet
from .serving_replica import Replica
from .serving_result import ServingResult
from .serving_tiers import ChunkTiers


def _ints(n: int, value: int = 0) -> array[int]:
    return array("q", [value]) * n


class Columns:
    """One entry per row of the table; times are -1 until they are known."""

    def __init__(self, table: RequestTable, fleet: Fleet) -> None:
        self.table = table
        self.fleet = fleet
        n, n_tiers = len(table), len(fleet.replica.tiers)
        self.arrival_ns = _ints(n, -1)
        self.admitted_ns = _ints(n, -1)
        self.first_ns = _ints(n, -1)
        self.end_ns = _ints(n, -1)
        self.replica = _ints(n)
        self.n_preemptions = _ints(n)
        self.gpu_tokens = _ints(n)
        self.recomputed_tokens = _ints(n)
        self.computed_tokens = _ints(n)
        self.unloaded_tokens = _ints(n)
        self.repeated_tokens = _ints(n)
        self.loaded_tokens = [_ints(n) for _ in range(n_tiers)]
        self.loaded_bytes = [_ints(n) for _ in range(n_tiers)]
        self.n_inside = 0
        self.area_ns = 0
        self._since_ns = 0

    def inside(self, change: int, now_ns: int) -> None:
        """A request came or left: the sum over time of those inside, for Little's law."""
        self.area_ns += self.n_inside * (now_ns - self._since_ns)
        self._since_ns = now_ns
        self.n_inside += change

    def result(
        self,
        *,
        seed: int,
        replicas: Sequence[Replica],
        tiers: Sequence[ChunkTiers],
        names: Any,
        n_events: int,
        spans: Mapping[int, Sequence[Span]],
    ) -> ServingResult:
        """As arrays. `names` are the chunks behind the tiers' keys."""
        n = len(self.table)
        specs = self.fleet.replica.tiers
        orders = {
            spec.name: [t.tiers[i].order for t in (tiers[:1] if spec.shared else tiers)]
            for i, spec in enumerate(specs)
        }
        states_of = [{id(t.tiers[i]): t.tiers[i] for t in tiers} for i in range(len(specs))]
        written = [sum(s.written_bytes for s in states.values()) for states in states_of]
        dropped = [sum(s.dropped_bytes for s in states.values()) for states in states_of]
        return ServingResult(
            table=self.table,
            fleet=self.fleet,
            seed=seed,
            arrival_ns=np.array(self.arrival_ns),
            admitted_ns=np.array(self.admitted_ns),
            first_token_ns=np.array(self.first_ns),
            end_ns=np.array(self.end_ns),
            replica=np.array(self.replica),
            n_preemptions=np.array(self.n_preemptions),
            gpu_tokens=np.array(self.gpu_tokens),
            recomputed_tokens=np.array(self.recomputed_tokens),
            computed_tokens=np.array(self.computed_tokens),
            unloaded_tokens=np.array(self.unloaded_tokens),
            repeated_tokens=np.array(self.repeated_tokens),
            loaded_tokens=_side_by_side(self.loaded_tokens, n),
            loaded_bytes=_side_by_side(self.loaded_bytes, n),
            written_bytes=np.array(written, np.int64),
            dropped_bytes=np.array(dropped, np.int64),
            busy_ns=np.array([r.busy_ns for r in replicas]),
            n_steps=sum(r.n_steps for r in replicas),
            n_events=n_events,
            area_ns=self.area_ns,
            names=names,
            orders=orders,
            spans={row: tuple(found) for row, found in spans.items()},
        )


def _side_by_side(parts: list[array[int]], n: int) -> Any:
    return np.array(parts, np.int64).reshape(len(parts), n).T
