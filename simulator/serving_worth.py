"""`Worth`: what eviction policies ask of a chunk: seconds it saves, and when it is needed again."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import repeat

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
        self._by_size: dict[tuple[int, int], float] = {}
        self._rows: dict[int, list[int]] = {}

    def values(self, keys: Sequence[int]) -> list[float]:
        """Seconds to compute each chunk where it first stood, per byte."""
        try:
            return [*map(self._values.__getitem__, keys)]
        except KeyError:
            self._learn([key for key in keys if key not in self._values])
            return [*map(self._values.__getitem__, keys)]

    def _learn(self, keys: Sequence[int]) -> None:
        """The values of chunks nobody asked for yet."""
        feed = self._feed
        sizes = map(feed.tokens_of.__getitem__, keys)
        starts = map(feed.first_start.get, keys, repeat(0))
        known, values = self._by_size, self._values
        for key, size in zip(keys, zip(sizes, starts, strict=False), strict=True):
            worth = known.get(size)
            if worth is None:
                seconds = self._cost.step_s([size], 0, 0)
                worth = known[size] = seconds / max(1, feed.bytes_of[key])
            values[key] = worth

    def next_use(self, key: int) -> int:
        """Row that asks for a chunk next, in the order of the trace."""
        if not self._rows:
            for row in range(len(self._feed.table)):
                for other in self._feed.job(row, 0).content_keys:
                    self._rows.setdefault(other, []).append(row)
        rows = self._rows.get(key, ())
        at = bisect_right(rows, self.row)
        return rows[at] if at < len(rows) else NEVER
