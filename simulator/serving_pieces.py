"""`PieceReplica`: the engine of this project (`core/engine.py`) on the level of requests.

Unlike vLLM's, its steps are not mixed: the compute stream takes decode steps and prompt pieces in
turn, at most `DEPTH` pieces queued; a prompt has its blocks, output included, from the start. A
piece is one composite: its layer groups are walked through once, with the streams and dependencies
of `core/lowering.py`, when it is queued. All before it on its streams is known by then, so nothing
is approximated where loads do not share a link with another replica's.
"""

from __future__ import annotations

from typing import Protocol

from ..core.engine import DEPTH
from ..core.ops import OpKind
from ..core.plan import ReusePlan
from ..core.step_cost import StepCost
from .cost import WAKE_AFTER_NS
from .profile_step_cost import PieceWork, Shape
from .serving_blocks import ENDLESS
from .serving_fleet import ServingLimits
from .serving_jobs import Job
from .serving_replica import Host, Replica
from .serving_step import Step, Stretch


class PieceCost(StepCost, Protocol):
    """A `StepCost` that also knows the ops of a prompt (`ProfileStepCost`)."""

    plan: ReusePlan
    gap_ns: int

    def pieces_of(self, shape: Shape, n_suffix: int) -> tuple[PieceWork, ...]:
        """Pieces of a prompt whose chunks are kept like this."""
        ...

    def wake_ns(self, kind: OpKind) -> int:
        """What an op takes longer on a stream that was idle."""
        ...


class PieceReplica(Replica):
    """State of one engine whose steps are decode steps or prompt pieces."""

    __slots__ = ("decode_flying", "free_ns", "joining", "n_pieces", "piece_cost", "wake_ns")

    def __init__(
        self, index: int, limits: ServingLimits, cost: PieceCost, host: Host, n_ranks: int
    ) -> None:
        super().__init__(index, limits, cost, host, n_ranks)
        self.piece_cost = cost
        self.decode_flying = False
        self.n_pieces = 0
        """Pieces under way."""
        self.joining: list[Job] = []
        """Whose first token is made, and no decode step was planned since."""
        self.free_ns: dict[str, int] = {}
        """When each stream has done what was queued on it."""
        self.wake_ns = {
            kind: cost.wake_ns(kind) for kind in ("load", "select", "restore", "prefill", "head")
        }

    @property
    def may_plan(self) -> bool:
        """Anything may queue behind what will not change any more."""
        return not self.flying or self.flying[-1].is_committed

    def plan(self, now_ns: int) -> Step | None:
        """The next decode step (a stretch, if no prompt waits) or prompt piece."""
        start_ns = max(now_ns, self.flying[-1].end_ns) if self.flying else now_ns
        if (self.decodes.n or self.joining) and not self.decode_flying:
            for job in self.joining:
                self.decodes.add(job)
            self.joining = []
            alone = not self.n_pieces and not self._prepare(now_ns)
            n = self.decodes.run_length(ENDLESS) if alone else 1
            step = Step(self, start_ns)
            batch = self.decodes.n, self.decodes.kv_tokens, None
            step.stretch = Stretch(self.cost, batch, n, start_ns)
            step.end_ns = step.commit_ns = step.stretch.end_ns
            step.is_committed = not alone
            self.decode_flying = True
        elif self.n_pieces < DEPTH and self._prepare(now_ns):
            step = self._piece(self.prefilling[0], now_ns, start_ns)
        else:
            return None
        self.free_ns["compute"] = step.end_ns
        self.flying.append(step)
        return step

    def cut(self, now_ns: int) -> Step | None:
        """Something came: it queues behind the decode step under way."""
        step = self.flying[-1]
        stretch = step.stretch
        if stretch is None or step.is_committed:
            return None
        step.is_committed = True
        n = max(1, stretch.steps_by(now_ns)) if now_ns > step.start_ns else 1
        if n >= stretch.n_steps:
            return None
        stretch.cut(n)
        step.end_ns = step.commit_ns = stretch.end_ns
        self.free_ns["compute"] = step.end_ns
        step.version += 1
        return step

    def finish(self, now_ns: int) -> Step | None:
        """The first step under way has ended."""
        step = self.flying.popleft()
        self.busy_ns += now_ns - step.start_ns
        if step.stretch is not None:
            self.decode_flying = False
            self.n_steps += step.stretch.n_steps
            for job in self.decodes.advance(step.stretch.n_steps):
                self.decodes.remove(job)
                self._end(job, now_ns)
            return None
        self.n_steps += 1
        self.n_pieces -= 1
        for _, rows in step.pieces:
            self.outstanding -= rows
        for job in step.firsts:
            job.emitted = 1
            self.host.first_token(self, job, now_ns)
            if job.n_output == 1:
                self._end(job, now_ns)
            else:
                self.joining.append(job)
        return None

    def _end(self, job: Job, now_ns: int) -> None:
        del self.running[job.order]
        self.blocks.give_back((), job.n_private, self.blocks.new_key())
        self.host.ended(self, job, now_ns)

    def _prepare(self, now_ns: int) -> bool:
        """Have a prompt with pieces left, admitting one if need be; False if none may be."""
        if self.prefilling:
            return True
        if not self.n_waiting or len(self.running) >= self.limits.max_num_seqs:
            return False
        queue = self._first_queue()
        job = queue[0]
        need = self.blocks.count(job.n_tokens + job.n_output)
        if need > self.blocks.n_free:
            return False
        queue.popleft()
        self.n_waiting -= 1
        self.blocks.take(need)
        job.n_private = need
        job.order = self.n_admitted
        self.n_admitted += 1
        self.running[job.order] = job
        self.host.admitted(self, job, 0, now_ns)
        n_suffix = job.n_prompt - (job.ends[-1] if job.ends else 0)
        job.parts = list(self.piece_cost.pieces_of(job.shape, n_suffix))
        self.outstanding += sum([part.n_rows for part in job.parts]) - job.n_tokens
        self.prefilling.append(job)
        return True

    def _piece(self, job: Job, now_ns: int, start_ns: int) -> Step:
        step = Step(self, start_ns)
        part = job.parts.pop(0)
        step.pieces.append((job, part.n_rows))
        step.end_ns = step.commit_ns = self._walk(part, now_ns)
        step.is_committed = True
        self.n_pieces += 1
        if not job.parts:
            self.prefilling.remove(job)
            step.firsts.append(job)
        return step

    def _walk(self, part: PieceWork, now_ns: int) -> int:
        """When a piece ends that is queued now."""
        look_ahead = self.piece_cost.plan.look_ahead
        computed: list[int] = []
        for g, group in enumerate(part.groups):
            gate = g - 1 - look_ahead
            may_ns = computed[gate] if gate >= 0 else now_ns
            there_ns = now_ns
            for stream, load in group.loads:
                ns = load.fixed_ns + load.alone_ns
                there_ns = max(there_ns, self._queue(stream, "load", ns, may_ns))
            ready_ns = computed[-1] if computed else now_ns
            if group.select_ns >= 0:
                ready_ns = self._queue(
                    "compute", "select", group.select_ns, max(ready_ns, there_ns)
                )
            if group.restore_ns >= 0:
                restored_ns = self._queue("restore", "restore", group.restore_ns, there_ns)
                ready_ns = max(ready_ns, restored_ns)
            computed.append(self._queue("compute", "prefill", group.prefill_ns, ready_ns))
        end_ns = computed[-1]
        if part.head_ns >= 0:
            end_ns = self._queue("compute", "head", part.head_ns, end_ns)
        return end_ns

    def _queue(self, stream: str, kind: OpKind, ns: int, ready_ns: int) -> int:
        """End of an op that is ready then, on a stream that takes its ops in order."""
        free_ns = self.free_ns.get(stream, -ENDLESS)
        start_ns = max(free_ns, ready_ns)
        if start_ns - free_ns >= WAKE_AFTER_NS:
            ns += self.wake_ns[kind]
        end_ns = self.free_ns[stream] = start_ns + self.piece_cost.gap_ns + ns
        return end_ns
