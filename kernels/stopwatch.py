"""Times of one action on a device: warmed up, many repeats, a median with its quartiles.

Buffers rotate and, on a GPU, the L2 cache is flushed between launches, so that no repeat finds
its inputs where the last one left them. GPU times are those of events around the launch; the
flush before it is long enough to hide what Python needs to submit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

REPEATS = 20
WARM_UPS = 3
FLUSH_BYTES = 2 << 30
"""Many times the L2 of any GPU. Writing it takes half a millisecond at 4 TB/s, more than Python
needs for the launches of one action: a shorter one would count the host's work as the kernel's."""

Action = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of `n` times, seconds."""

    median: float
    low: float
    high: float
    n: int

    @staticmethod
    def of(seconds: Sequence[float]) -> Spread:
        """Quartiles interpolate linearly."""
        at = torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)
        median, low, high = torch.tensor(seconds, dtype=torch.float64).quantile(at).tolist()
        return Spread(median, low, high, len(seconds))


def seconds_of(
    actions: Sequence[Action], device: str, n: int = REPEATS, warm_ups: int = WARM_UPS
) -> Spread:
    """Time `n` runs of `actions`, which do the same work on different buffers, in turn.

    Args:
        device: ``cuda`` or ``cpu``, where the work is done.
        warm_ups: runs before, not counted.
    """
    times = _on_gpu if device.startswith("cuda") else _on_cpu
    return Spread.of(times(actions, n + warm_ups)[warm_ups:])


def _on_cpu(actions: Sequence[Action], n: int) -> list[float]:
    times = []
    for i in range(n):
        start = time.perf_counter()
        actions[i % len(actions)]()
        times.append(time.perf_counter() - start)
    return times


def _on_gpu(actions: Sequence[Action], n: int) -> list[float]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n)]
    for i, (start, stop) in enumerate(marks):
        flush.zero_()
        start.record()
        actions[i % len(actions)]()
        stop.record()
    torch.cuda.synchronize()
    return [1e-3 * start.elapsed_time(stop) for start, stop in marks]
