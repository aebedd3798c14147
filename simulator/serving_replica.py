"""`Replica`: one engine on the level of requests, with vLLM-v1 semantics, decode steps merged.

Running requests go first, in order of admission; then the queue, first come first served, only when
nobody was preempted in this step. A prompt is computed in chunks under a token budget; a request is
admitted only if all its tokens fit; a shortage preempts the last admitted, which starts over at the
head of the queue. `simulator/step_loop.py` does the same step by step, and is the tests' peer.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from typing import Protocol

from ..core.step_cost import StepCost
from ..core.units import NS_PER_S
from .serving_decodes import Decodes
from .serving_fleet import ServingLimits
from .serving_job_blocks import JobBlocks
from .serving_jobs import Job
from .serving_policy import take_rows
from .serving_step import Step, Stretch


class Host(Protocol):
    """What a replica tells of its requests, and asks about what they may load."""

    def admitted(self, replica: Replica, job: Job, n_hit: int, now_ns: int) -> None:
        """Decide its rows behind `n_hit` cached chunks, and begin its loads."""
        ...

    def first_token(self, replica: Replica, job: Job, now_ns: int) -> None:
        """Its prompt is computed."""
        ...

    def preempted(self, replica: Replica, job: Job) -> None:
        """It lost its place."""
        ...

    def ended(self, replica: Replica, job: Job, now_ns: int) -> None:
        """It made its last token."""
        ...

    def landing(self, replica: Replica) -> tuple[float, int]:
        """Share of its speed that decoding loses to loads, and until when."""
        ...


class Replica:
    """State of one engine. `plan` starts a step, `finish` ends it; the caller keeps the clock.

    With asynchronous scheduling a second step is planned while one runs.
    """

    __slots__ = (
        "blocks", "budget", "busy_ns", "caching", "cost", "decodes", "depth", "flying", "host",
        "index", "limits", "n_admitted", "n_steps", "n_waiting", "outstanding", "prefilling",
        "queued", "running", "size", "waiting",
    )  # fmt: skip

    def __init__(
        self, index: int, limits: ServingLimits, cost: StepCost, host: Host, n_ranks: int
    ) -> None:
        self.index = index
        self.limits = limits
        self.budget = limits.max_num_batched_tokens
        self.size = limits.block_size
        self.caching = limits.prefix_caching
        self.cost = cost
        self.host = host
        self.blocks = JobBlocks(limits.n_blocks, limits.block_size, limits.prefix_caching)
        self.decodes = Decodes(self.size, getattr(cost, "has_skew", False))
        self.waiting: list[deque[Job]] = [deque() for _ in range(n_ranks)]
        """By priority."""
        self.n_waiting = 0
        self.running: dict[int, Job] = {}
        """By order of admission."""
        self.prefilling: list[Job] = []
        """Those whose next rows may be computed."""
        self.n_admitted = 0
        self.depth = 2 if limits.async_scheduling else 1
        self.flying: deque[Step] = deque()
        """Steps under way, the first one running."""
        self.n_steps = 0
        self.busy_ns = 0
        self.outstanding = 0
        """Prompt tokens that came and are not computed yet: what routers look at."""
        self.queued = 0
        """Of them, those of requests that have no place yet."""

    def enqueue(self, job: Job) -> bool:
        """A request has come; whether it may be admitted before another ends."""
        queue = self.waiting[job.rank]
        queue.append(job)
        self.n_waiting += 1
        job.rows_left = job.n_tokens
        self.outstanding += job.n_tokens
        self.queued += job.n_tokens
        return len(queue) == 1 and not any(self.waiting[: job.rank])

    @property
    def may_plan(self) -> bool:
        """Whether another step may be planned behind those under way."""
        flying = self.flying
        return not flying or (len(flying) < self.depth and flying[-1].is_committed)

    def plan(self, now_ns: int) -> Step | None:
        """The next step or stretch of decode steps; None if there is nothing to do."""
        preempted = False
        decodes = self.decodes
        if decodes.n:
            need = decodes.blocks_now()
            if need > self.blocks.n_free:
                preempted = self._grow_decodes()
            elif need:
                self.blocks.take(need)
        step = Step(self, max(now_ns, self.flying[-1].end_ns) if self.flying else now_ns)
        shapes: list[tuple[int, int]] = []
        budget = self.budget - decodes.n
        if self.prefilling:
            budget, hurt = self._continue(step, shapes, budget)
            preempted = preempted or hurt
        if not preempted and budget > 0:
            self._admit(step, shapes, budget, now_ns)
        if step.pieces:
            step.end_ns += self._step_ns(step, shapes)
            self._commit(step)
        elif decodes.n:
            n = 1 if preempted else decodes.run_length(self.blocks.n_free)
            batch = decodes.n, decodes.kv_tokens, decodes.kv_max()
            step.stretch = Stretch(self.cost, batch, n, step.start_ns, *self.host.landing(self))
            self._time(step, step.stretch)
        else:
            return None
        self.flying.append(step)
        return step

    def _time(self, step: Step, stretch: Stretch) -> None:
        """Set the times of a stretch of decode steps; what comes may still cut it."""
        step.end_ns = stretch.end_ns
        if self.depth == 1:
            step.commit_ns = stretch.end_ns
        elif stretch.n_steps == 1:
            self._commit(step)
        else:
            step.commit_ns = stretch.start_ns + stretch.ns_of(stretch.n_steps - 1)

    def cut(self, now_ns: int) -> Step | None:
        """Something came: end a stretch as soon as it may be; the step if its times are others."""
        step = self.flying[-1]
        stretch = step.stretch
        if stretch is None or step.is_committed or stretch.n_steps == 1:
            return None
        n = stretch.steps_by(now_ns) if now_ns > step.start_ns else 0
        n = max(1, n + self.depth - 1)
        if n >= stretch.n_steps:
            return None
        stretch.cut(n)
        self._time(step, stretch)
        step.version += 1
        return step

    def _commit(self, step: Step) -> None:
        """What a step does to the state that the next is planned on."""
        step.is_committed = True
        decodes = self.decodes
        n = 1
        if step.stretch is not None:
            n = step.stretch.n_steps
            if n > 1:
                self.blocks.take(decodes.blocks_after_first(n))
        elif self.caching:
            for job, _ in step.pieces:
                self.blocks.name_of(job)
        self.n_steps += n
        for job in decodes.advance(n):
            self._leave_decodes(job)
            step.ending.append(job)
        for job, _ in step.pieces:
            if not job.rows_left:
                self.prefilling.remove(job)
                job.emitted += 1
                step.firsts.append(job)
                if job.emitted == job.n_output:
                    step.ending.append(job)
                else:
                    decodes.add(job)

    def commit(self, step: Step) -> None:
        """The time has come from which nothing changes a stretch."""
        if not step.is_committed:
            self._commit(step)

    def finish(self, now_ns: int) -> Step | None:
        """The first step under way has ended; a stretch whose times are others thereby."""
        step = self.flying.popleft()
        self.commit(step)
        self.busy_ns += now_ns - step.start_ns
        for _, rows in step.pieces:
            self.outstanding -= rows
        for job in step.firsts:
            self.host.first_token(self, job, now_ns)
        for job in step.ending:
            if self.running.pop(job.order, None) is not None:
                self.blocks.leave(job)
            self.host.ended(self, job, now_ns)
        if step.ending and self.flying and self.n_waiting:
            return self.cut(now_ns)
        return None

    def delay(self, until_ns: int) -> None:
        """The running step lasts longer, as its loads do; what is planned behind it moves."""
        late_ns = until_ns - self.flying[0].end_ns
        for i, step in enumerate(self.flying):
            step.end_ns += late_ns
            step.version += 1
            if i:
                step.start_ns += late_ns
                step.commit_ns += late_ns
                if step.stretch is not None:
                    step.stretch.start_ns += late_ns
                    step.stretch.end_ns += late_ns

    def _step_ns(self, step: Step, shapes: list[tuple[int, int]]) -> int:
        """Time of a step with prompt pieces. A piece of one token costs what a decode does."""
        decodes = self.decodes
        n_decode, kv_tokens, kv_max = decodes.n, decodes.kv_tokens, decodes.kv_max()
        if any([n == 1 for n, _ in shapes]):
            single = [context for n, context in shapes if n == 1]
            n_decode += len(single)
            kv_tokens += sum(single)
            if decodes.longest is not None:
                kv_max = max([kv_max or 0, *single])
            shapes = [shape for shape in shapes if shape[0] > 1]
        seconds = self.cost.step_s(shapes, n_decode, kv_tokens, kv_max)
        for job, _ in step.pieces:
            seconds += job.extra_s
            job.extra_s = 0.0
        return round(seconds * NS_PER_S)

    def _leave_decodes(self, job: Job) -> int:
        context = self.decodes.remove(job)
        job.n_private += self.blocks.count(context) - self.blocks.count(job.join_context)
        return context

    def _continue(self, step: Step, shapes: list[tuple[int, int]], budget: int) -> tuple[int, bool]:
        """More pieces of prompts under way; (budget left, whether somebody was preempted)."""
        preempted = False
        for job in list(self.prefilling):
            n = min(job.rows_left, budget)
            if not n:
                break
            while job.order in self.running and not self._grow(job, n):
                self._preempt_last()
                preempted = True
            if job.order in self.running:
                self._launch(step, job, n, shapes)
                budget -= n
        return budget, preempted

    def _grow_decodes(self) -> bool:
        """One more token for each decode, in order, while memory is short."""
        preempted = False
        phase = self.decodes.step % self.size
        for order, job in list(self.running.items()):
            if job.end_step < 0 or job.phase != phase:
                continue
            while order in self.running and not self.blocks.n_free:
                self._preempt_last()
                preempted = True
            if order in self.running:
                self.blocks.take(1)
        return preempted

    def _preempt_last(self) -> None:
        """The last admitted gives up its memory and goes to the head of the queue."""
        _, job = self.running.popitem()
        self.host.preempted(self, job)
        if job.emitted == job.n_output or any([job in step.ending for step in self.flying]):
            self.blocks.leave(job)
            return  # its last token is under way
        if job.end_step >= 0:
            context = self._leave_decodes(job)
            job.emitted += context - job.n_tokens
        else:
            context = job.position
            if job in self.prefilling:
                self.prefilling.remove(job)
        job.is_loading = False
        job.load_id += 1
        job.load_end_ns = job.tail_ns = 0
        self.outstanding -= job.rows_left
        job.n_tokens = job.rows_left = job.n_prompt + job.emitted
        self.outstanding += job.rows_left
        self.queued += job.rows_left
        self.blocks.pause(job, context)
        self.waiting[job.rank].appendleft(job)
        self.n_waiting += 1

    def _admit(self, step: Step, shapes: list[tuple[int, int]], budget: int, now_ns: int) -> None:
        """From the queue, while memory, seats and budget allow."""
        while budget > 0 and self.n_waiting and len(self.running) < self.limits.max_num_seqs:
            queue = self._first_queue()
            if not self._take_in(queue[0], now_ns):
                return
            job = queue.popleft()
            self.n_waiting -= 1
            if not job.is_loading:
                n = min(job.rows_left, budget)
                self._grow(job, n)
                self.prefilling.append(job)
                self._launch(step, job, n, shapes)
                budget -= n

    def _first_queue(self) -> deque[Job]:
        """The queue of those that go first, while somebody waits."""
        return next(filter(None, self.waiting))

    def _take_in(self, job: Job, now_ns: int) -> bool:
        """Give a request its place, and what GPU memory has of it; False if it does not fit."""
        n_hit = self.blocks.enter(job)
        if n_hit is None:
            return False
        self.outstanding -= job.rows_left
        self.queued -= job.rows_left
        job.rows_left = job.n_tokens - job.position
        job.runs = None
        job.n_nameable = len(job.keys)
        job.order = self.n_admitted
        self.n_admitted += 1
        self.running[job.order] = job
        self.host.admitted(self, job, n_hit, now_ns)
        self.outstanding += job.rows_left
        if job.runs is not None:  # what is loaded lands anywhere: all blocks at once
            self.blocks.grow_to(job, job.n_tokens)
        return True

    def make_ready(self, job: Job) -> None:
        """Its loads are far enough for its first piece."""
        job.is_loading = False
        insort(self.prefilling, job, key=lambda j: j.order)

    def _launch(self, step: Step, job: Job, n: int, shapes: list[tuple[int, int]]) -> None:
        step.pieces.append((job, n))
        shapes.append(take_rows(job, n))

    def _grow(self, job: Job, n: int) -> bool:
        """Blocks for `n` more rows; False when there are too few."""
        return job.runs is not None or self.blocks.grow_to(job, job.position + n)

    @property
    def n_inside(self) -> int:
        """Requests that came and have not ended."""
        return len(self.running) + self.n_waiting
