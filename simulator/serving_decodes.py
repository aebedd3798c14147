"""`Decodes`: all requests that decode, never touched one by one.

A counter of steps, a sum of contexts and a heap of last steps stand for them. A request needs a new
block when its context is a multiple of the block size; as all contexts grow alike, counting
requests by that phase tells how many blocks any step needs.
"""

from __future__ import annotations

from heapq import heappop, heappush

from .serving_jobs import Job


class Decodes:
    """Requests that make one token per step."""

    __slots__ = ("ends", "kv_tokens", "longest", "n", "phases", "size", "step")

    def __init__(self, block_size: int, keeps_longest: bool = False) -> None:
        self.size = block_size
        self.n = 0
        self.kv_tokens = 0
        """Contexts, summed."""
        self.step = 0
        """Steps so far; a job ends behind its `end_step`, which is -1 for who does not decode."""
        self.ends: list[tuple[int, int, Job]] = []
        self.phases = [0] * block_size
        self.longest: list[tuple[int, int, Job]] | None = [] if keeps_longest else None
        """Longest context first."""

    def add(self, job: Job) -> None:
        """A prompt is done and its first token made."""
        job.join_step = self.step
        job.join_context = job.n_tokens
        job.end_step = self.step + job.n_output - job.emitted
        job.phase = (self.step - job.n_tokens) % self.size
        self.phases[job.phase] += 1
        self.n += 1
        self.kv_tokens += job.n_tokens
        heappush(self.ends, (job.end_step, job.order, job))
        if self.longest is not None:
            heappush(self.longest, (job.join_step - job.join_context, job.order, job))

    def remove(self, job: Job) -> int:
        """A request leaves; tokens in its context."""
        context = job.join_context + self.step - job.join_step
        self.n -= 1
        self.kv_tokens -= context
        self.phases[job.phase] -= 1
        job.end_step = -1
        return context

    def kv_max(self) -> int | None:
        """The longest context; None if nobody decodes, or nobody keeps count."""
        heap = self.longest
        while heap:
            ahead, order, job = heap[0]
            if order == job.order and job.end_step >= 0:
                return self.step - ahead
            heappop(heap)
        return None

    def advance(self, n_steps: int) -> list[Job]:
        """Steps are done; who has made its last token, in order of admission per step."""
        self.step += n_steps
        self.kv_tokens += n_steps * self.n
        ends, step = self.ends, self.step
        found = []
        while ends and ends[0][0] <= step:
            end, order, job = heappop(ends)
            if end == job.end_step and order == job.order:  # else it was preempted meanwhile
                found.append(job)
        return found

    def blocks_now(self) -> int:
        """Blocks that the next step needs."""
        return self.phases[self.step % self.size]

    def blocks_after_first(self, n_steps: int) -> int:
        """Blocks that the next `n_steps` need, those of the first left out."""
        turns, rest = divmod(n_steps - 1, self.size)
        need = turns * self.n
        phases, step, size = self.phases, self.step, self.size
        for k in range(1, rest + 1):
            need += phases[(step + k) % size]
        return need

    def run_length(self, n_free: int) -> int:
        """Steps until one of them ends or `n_free` blocks, those of this step taken, run out."""
        ends, step = self.ends, self.step
        while ends[0][0] != ends[0][2].end_step or ends[0][1] != ends[0][2].order:
            heappop(ends)
        n = ends[0][0] - step
        turns = n_free // self.n
        if (n - 1) // self.size < turns:
            return n
        left = n_free - turns * self.n
        phases, size = self.phases, self.size
        for k in range(1, size + 1):
            left -= phases[(step + k) % size]
            if left < 0:
                return min(n, turns * size + k)
        return n
