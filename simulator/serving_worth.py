"""`Worth`: what eviction policies ask of a chunk: seconds it saves, and when it is needed again."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection

from ..core.step_cost import StepCost
from .serving_eviction import NEVER
from .serving_jobs import JobFeed


class Worth:
    """Answers by key; `row` is the request that is being admitted, which the host keeps."""

    def __init__(self, feed: JobFeed, cost: StepCost) -> None:
        self.row = 0
        self._feed = feed
        self._cost = cost
        self._values: dict[int, float] = {}
        self._seconds: dict[tuple[int, int], float] = {}
        self._rows: dict[int, list[int]] = {}

    def values(self, keys: Collection[int]) -> list[float]:
        """Seconds to compute each chunk where it first stood, per byte."""
        try:
            return [*map(self._values.__getitem__, keys)]
        except KeyError:
            return [*map(self._value, keys)]

    def _value(self, key: int) -> float:
        worth = self._values.get(key)
        if worth is None:
            feed = self._feed
            sizes = feed.tokens_of[key], feed.first_start.get(key, 0)
            found = self._seconds.get(sizes)
            if found is None:
                found = self._seconds[sizes] = self._cost.step_s([sizes], 0, 0)
            worth = self._values[key] = found / max(1, feed.bytes_of[key])
        return worth

    def next_use(self, key: int) -> int:
        """Row that asks for a chunk next, in the order of the trace."""
        if not self._rows:
            for row in range(len(self._feed.table)):
                for other in self._feed.job(row, 0).content_keys:
                    self._rows.setdefault(other, []).append(row)
        rows = self._rows.get(key, ())
        at = bisect_right(rows, self.row)
        return rows[at] if at < len(rows) else NEVER
