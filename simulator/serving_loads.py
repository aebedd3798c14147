"""`Loads`: what admitted requests load, from which tier, and when their first piece may begin.

Layers are pipelined: compute of layer l needs the bytes of layer l. With equal layers the first
piece, of compute C over n layers, begun behind the first layer's bytes, ends no earlier than
max(first bytes + C, end of the loads + C / n). So it may begin C (1 - 1 / n) before its loads end
and nothing waits for it: until then the engine computes for others. With loads in order it begins
behind the first bytes and holds the engine until the last, as a kernel in a stream that waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from ..core.step_cost import StepCost
from ..core.units import NS_PER_S
from .interference import SLOWEST
from .serving_fleet import Fleet
from .serving_jobs import Job
from .serving_links import Flow, Link, beside, join, leave
from .serving_policy import peek_rows
from .serving_tiers import ChunkTiers

Push = Callable[[int, int, Any, int], None]
"""Of (time, kind, object, version)."""

MOVED, READY = 1, 2
"""Kinds of events: a flow has ended, a first piece may begin."""


class Loads:
    """All loads of a fleet."""

    def __init__(self, fleet: Fleet, cost: StepCost, push: Push) -> None:
        self._policy = fleet.policy
        self._host_rate = fleet.replica.host_link_bytes_per_s
        self._duplex = fleet.replica.host_link_duplex
        self._gpu_rate = fleet.replica.gpu_bytes_per_s
        self._budget = fleet.replica.limits.max_num_batched_tokens
        self._host_links = [Link() for _ in range(fleet.n_replicas)]
        self._cost = cost
        self._push = push
        self._now_ns = 0
        self._in_order = fleet.replica.loads_in_order
        self._queues: dict[tuple[int, int], deque[Flow]] = {}
        """With loads in order, by (replica, tier): the first one moves."""

    def begin(self, job: Job, tiers: ChunkTiers, loads: dict[int, list[int]], now_ns: int) -> None:
        """A flow per tier. `loads`: by tier [chunks, tokens, ...]."""
        policy = self._policy
        self._now_ns = now_ns
        job.is_loading = True
        job.load_id += 1
        job.flows = []
        n_tokens = 0
        for tier, (n_chunks, n, _) in loads.items():
            n_tokens += n
            job.flows.append(self._flow(job, tiers, tier, n_chunks, n))
        job.extra_s = n_tokens * policy.restore_s_per_token
        if policy.name == "cacheblend":
            job.extra_s += job.n_tokens * policy.select_s_per_token
        piece = peek_rows(job, min(job.rows_left, self._budget))
        alone_ns = round((self._cost.step_s([piece], 0, 0) + job.extra_s) * NS_PER_S)
        job.tail_ns = alone_ns // policy.n_layers
        job.slack_ns = alone_ns - job.tail_ns
        job.first_bytes_ns = job.ready_ns = -1
        job.floor_ns = 0
        for flow in job.flows:
            if self._in_order:
                queue = self._queues.setdefault((job.replica.index, flow.tier), deque())
                queue.append(flow)
                if len(queue) > 1:
                    continue
            join(flow, now_ns, self._changed)
        self._moves(job)

    def moved(self, flow: Flow, now_ns: int) -> None:
        """All of a flow is there."""
        self._now_ns = now_ns
        flow.links[0].n_bytes -= flow.n_bytes
        leave(flow, now_ns, self._changed)
        if self._in_order:
            queue = self._queues[flow.owner.replica.index, flow.tier]
            queue.popleft()
            if queue:
                join(queue[0], now_ns, self._changed)
                if queue[0].owner_load == queue[0].owner.load_id:
                    self._moves(queue[0].owner)

    def _moves(self, job: Job) -> None:
        """Once all of its loads move, it is known how soon the first layer is there."""
        if all([flow.rate for flow in job.flows]):
            took_ns = job.load_end_ns - self._now_ns
            job.first_bytes_ns = self._now_ns + took_ns // self._policy.n_layers
            self._set_ready(job)

    def _flow(self, job: Job, tiers: ChunkTiers, tier: int, n_chunks: int, n: int) -> Flow:
        state = tiers.tiers[tier]
        spec = state.spec
        n_bytes = n * self._policy.kv_bytes_per_token
        state.read_bytes += n_bytes
        state.link.n_bytes += n_bytes
        seconds = n_bytes / spec.read_bytes_per_s
        if spec.iops is not None:
            seconds = max(seconds, n_chunks * self._policy.n_layers / spec.iops)
        links: tuple[Link, ...] = (state.link,)
        works: tuple[float, ...] = (seconds * NS_PER_S,)
        if self._host_rate is not None:
            links += (self._host_links[job.replica.index],)
            works += (self._link_ns(n_bytes, tiers.own[0].write_free_ns if tiers.own else 0),)
        latency_ns = round(spec.latency_s * NS_PER_S)
        return Flow(job, job.load_id, tier, n_bytes, links, works, latency_ns)

    def _link_ns(self, n_bytes: int, written_ns: int) -> float:
        """On the host link alone; slower until what is written the other way has passed."""
        assert self._host_rate is not None
        alone_ns = n_bytes / self._host_rate * NS_PER_S
        return beside(alone_ns, 1 - self._duplex, written_ns - self._now_ns)

    def landing(self, replica: int) -> tuple[float, int]:
        """Share of its GPU memory's bandwidth that what it loads takes, and until when; as of now,
        whatever begins later. By data sheet: `simulator/interference.py` has what was measured."""
        flows = self._host_links[replica].flows if self._gpu_rate is not None else ()
        if not flows:
            return 0.0, 0
        assert self._gpu_rate is not None
        bytes_per_ns = sum([flow.n_bytes * flow.rate for flow in flows])
        lost = min(1 - SLOWEST, bytes_per_ns * NS_PER_S / self._gpu_rate)
        return lost, max([flow.end_ns for flow in flows])

    def _changed(self, flow: Flow) -> None:
        self._push(flow.end_ns, MOVED, flow, flow.version)
        job = flow.owner
        if flow.owner_load == job.load_id and job.flows:
            job.load_end_ns = max([f.end_ns + f.latency_ns for f in job.flows])
            if self._in_order:
                self._keep_floor(job)
            if job.first_bytes_ns >= 0:
                self._set_ready(job)

    def _keep_floor(self, job: Job) -> None:
        """Layers that come after a rate has changed are computed after it, however fast they come:
        the loads end no earlier, as it were, than what is left of the compute from there."""
        left = max([f.left - f.rate * (self._now_ns - f.since_ns) for f in job.flows])
        if left < 1:
            end_ns = self._now_ns + round(left * (job.slack_ns + job.tail_ns))
            job.floor_ns = max(job.floor_ns, end_ns)
        job.load_end_ns = max(job.load_end_ns, job.floor_ns)

    def _set_ready(self, job: Job) -> None:
        slack_ns = job.load_end_ns if self._in_order else job.slack_ns
        ready_ns = max(job.first_bytes_ns, job.load_end_ns - slack_ns, self._now_ns)
        if job.is_loading and ready_ns != job.ready_ns:
            job.ready_ns = ready_ns
            self._push(ready_ns, READY, job, job.load_id)
