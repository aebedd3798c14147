"""A loop over the steps of one engine, or of several in lockstep, nothing merged.

It serves twice: end-to-end validation against real vLLM runs, and the differential test of the fast
queue. With asynchronous scheduling a step is planned while the one before runs, so what a step
frees or finishes is seen one step later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from ..core.errors import CapacityError
from .step_profile import Step
from .step_scheduler import Arrival, EngineLimits, Launched, Life, Request, Scheduler

Seconds = Callable[[Sequence[Step]], float]
"""Of a step that all engines take together: one `Step` each, empty where one idles."""


class StepLoop:
    """Engines over a list of arrivals in time order; `run` returns a `Life` each.

    Engines in lockstep begin every step together: those of a data-parallel group that share
    experts meet in every layer. A request goes to the engine with the least to do.

    Raises:
        CapacityError: the KV cache cannot hold the longest request.
    """

    def __init__(
        self,
        limits: EngineLimits,
        seconds: Seconds,
        arrivals: Sequence[Arrival],
        n_engines: int = 1,
    ) -> None:
        self.limits = limits
        self.seconds = seconds
        self.requests = [Request(i, a) for i, a in enumerate(arrivals)]
        self.inbox = deque(sorted(self.requests, key=lambda r: r.arrival.arrival_s))
        most = max((a.n_prompt + a.n_output for a in arrivals), default=0)
        size = limits.block_size
        if limits.n_blocks is not None and -(-most // size) > limits.n_blocks:
            raise CapacityError(
                "the KV cache must hold the longest request",
                values=f"{limits.n_blocks} blocks of {size} tokens for {most} tokens",
                remedy="give more blocks, or shorter requests",
            )
        total = sum(-(-(a.n_prompt + a.n_output) // size) for a in arrivals)
        n_blocks = min(total, limits.n_blocks) if limits.n_blocks is not None else total
        self.engines = [Scheduler(limits, n_blocks) for _ in range(n_engines)]
        self.now = 0.0
        self.n_steps = 0

    @property
    def n_preemptions(self) -> int:
        """Of all engines."""
        return sum(e.n_preemptions for e in self.engines)

    def run(self) -> list[Life]:
        """Serve everything."""
        depth = 2 if self.limits.async_scheduling else 1
        flying: deque[tuple[float, list[Launched]]] = deque()
        device_free_s = 0.0
        while self.inbox or flying or any(e.is_busy for e in self.engines):
            self._drain()
            if len(flying) < depth:
                plans = [e.plan(self.now) for e in self.engines]
                if any(plans):
                    took_s = self.seconds([Scheduler.step(p) for p in plans])
                    device_free_s = max(device_free_s, self.now) + took_s
                    launched = [e.launch(p) for e, p in zip(self.engines, plans, strict=True)]
                    flying.append((device_free_s, launched))
                    self.n_steps += 1
                    continue
            if flying:
                self.now, done = flying.popleft()
                for engine, part in zip(self.engines, done, strict=True):
                    engine.finish(part, self.now)
            elif self.inbox:
                self.now = max(self.now, self.inbox[0].arrival.arrival_s)
            else:
                raise AssertionError("requests wait, and nothing runs or arrives")
        return [r.life for r in self.requests]

    def _drain(self) -> None:
        while self.inbox and self.inbox[0].arrival.arrival_s <= self.now:
            # Waiting counts four times, as in vLLM's balancer.
            least = min(self.engines, key=lambda e: 4 * len(e.waiting) + len(e.running))
            least.accept(self.inbox.popleft(), self.now)
