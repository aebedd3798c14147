"""`Step`: what an engine does at a time; `Stretch`: many decode steps as one event, cut short when
something comes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.step_cost import StepCost
from ..core.units import NS_PER_S
from .serving_links import beside

if TYPE_CHECKING:
    from .serving_jobs import Job
    from .serving_replica import Replica


Batch = tuple[int, int, int | None]
"""(decodes, their contexts summed, the longest where it matters)."""


class Stretch:
    """`n_steps` decode steps of one batch from `start_ns`; their times are a closed form.

    Until `until_ns` they lose a share of their speed, `lost`, to what is loaded beside them.
    """

    __slots__ = ("_batch", "_beside_ns", "_cost", "_lost", "end_ns", "n_steps", "start_ns")

    def __init__(
        self,
        cost: StepCost,
        batch: Batch,
        n_steps: int,
        start_ns: int,
        lost: float = 0.0,
        until_ns: int = 0,
    ) -> None:
        self._cost = cost
        self._batch = batch
        self._lost = lost
        self._beside_ns = until_ns - start_ns
        self.n_steps = n_steps
        self.start_ns = start_ns
        self.end_ns = start_ns + self.ns_of(n_steps)

    def ns_of(self, n_steps: int) -> int:
        """Time of the first `n_steps`."""
        n_decode, kv_tokens, kv_max = self._batch
        if kv_max is None:
            seconds = self._cost.decode_run_s(n_decode, kv_tokens, n_steps)
        else:  # a cost that has skew takes it
            seconds = self._cost.decode_run_s(n_decode, kv_tokens, n_steps, kv_max)  # type: ignore[call-arg]
        return round(beside(seconds * NS_PER_S, self._lost, self._beside_ns))

    def steps_by(self, at_ns: int) -> int:
        """The first step that ends at `at_ns` or later; regula falsi, as steps cost about alike."""
        wanted = at_ns - self.start_ns
        low, low_ns = 0, 0  # ends before
        high, high_ns = self.n_steps, self.end_ns - self.start_ns
        while high - low > 1:
            share = (wanted - low_ns) / (high_ns - low_ns) if high_ns > low_ns else 0.5
            guess = min(max(low + int(share * (high - low)), low + 1), high - 1)
            ns = self.ns_of(guess)
            if ns < wanted:
                low, low_ns = guess, ns
                ns = self.ns_of(guess + 1)
                guess += 1
                if guess >= high:
                    break
            if ns >= wanted:
                high, high_ns = guess, ns
            else:
                low, low_ns = guess, ns
        return high

    def cut(self, n_steps: int) -> None:
        """End after `n_steps` already."""
        self.n_steps = n_steps
        self.end_ns = self.start_ns + self.ns_of(n_steps)


class Step:
    """A step that was planned, or a stretch of decode steps.

    It is committed once nothing can change it any more: then the engine's state is that behind it.
    """

    __slots__ = ("commit_ns", "end_ns", "ending", "firsts", "is_committed", "is_late", "pieces",
                 "replica", "start_ns", "stretch", "version")  # fmt: skip

    def __init__(self, replica: Replica, start_ns: int) -> None:
        self.replica = replica
        self.start_ns = self.end_ns = self.commit_ns = start_ns
        self.stretch: Stretch | None = None
        """The decode steps, if there are no pieces beside them."""
        self.pieces: list[tuple[Job, int]] = []
        """(job, rows)."""
        self.firsts: list[Job] = []
        """Whose prompts it completes."""
        self.ending: list[Job] = []
        """Who makes the last token in it."""
        self.is_committed = False
        self.is_late = False
        """Whether it waits for loads of its pieces."""
        self.version = 0
        """Counts changes of its times: an event that was set for older ones is void."""
