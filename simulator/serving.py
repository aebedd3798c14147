"""`serve_trace`: a trace through a fleet, on the level of requests. No process per request: a heap
of events, and work only where something begins or ends.

    result = serve_trace(table, fleet, cost)
    result.summary()["ttft_ms_p99"]

What a request loads moves over fair-shared links while others compute. Its first piece joins the
batch as late as does not delay it: the layers are pipelined, so all but one layer's compute may
lie before the end of the loads, and the first layer's bytes come before any of it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from heapq import heappop, heappush
from itertools import chain
from typing import Any

import numpy as np

from ..core.errors import CapacityError, InvariantViolation
from ..core.request_table import RequestTable
from ..core.step_cost import StepCost
from .serving_columns import Columns
from .serving_fleet import Fleet
from .serving_jobs import Job, JobFeed
from .serving_life import Lives
from .serving_links import Flow
from .serving_loads import MOVED, READY, Loads
from .serving_pieces import PieceReplica
from .serving_replica import Replica
from .serving_result import ServingResult
from .serving_router import Router
from .serving_step import Step
from .serving_stores import Snapshot, Stores

COME, DONE, COMMIT = 0, 3, 4
"""Kinds of events beside those of loads; at one time they are handled in this order."""

PROGRESS_EVERY = 1024
END_OF_TIME = 1 << 62

Progress = Callable[[int, int], None]


def serve_trace(
    table: RequestTable,
    fleet: Fleet,
    cost: StepCost,
    *,
    seed: int = 0,
    snapshot: Snapshot | None = None,
    progress: Progress | None = None,
    watch: Collection[int] = (),
) -> ServingResult:
    """Serve every request of `table`; the same arguments give the same result.

    Args:
        cost: seconds of a step on one replica (a tensor-parallel group counts as one).
        seed: kept in the result; nothing here is random.
        snapshot: what lies in the tiers at the start, as `ServingResult.snapshot` of another run.
        progress: told (ended, of) now and then.
        watch: rows whose life is recorded for `ServingResult.request_trace`.

    Raises:
        CapacityError: a request is longer than a replica's KV memory.
        WorkloadError: the table breaks a rule.
    """
    table.check()
    _check_fits(table, fleet)
    with _without_collector():
        run = _Run(table, fleet, cost, progress, watch)
        if snapshot is not None:
            run.stores.fill(snapshot)
        run.serve()
        run.check()
        result = run.result(seed)
        run.let_go()
        del run
    return result


@contextmanager
def _without_collector() -> Iterator[None]:
    """Nothing here is left to the cycle collector, whose walks would cost a quarter of the run."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _check_fits(table: RequestTable, fleet: Fleet) -> None:
    limits = fleet.replica.limits
    if limits.n_blocks is None:
        return
    lengths = table.prompt_tokens.astype(np.int64) + table.output_tokens
    row = int(lengths.argmax())
    need = -(-int(lengths[row]) // limits.block_size)
    if need > limits.n_blocks:
        raise CapacityError(
            "the KV memory of a replica must hold the longest request",
            values=f"row {row} of {int(lengths[row])} tokens needs {need} blocks of "
            f"{limits.block_size}, a replica has {limits.n_blocks}",
            remedy="use more memory per replica, or drop that request",
        )


def _ranks(table: RequestTable, fleet: Fleet) -> list[int]:
    """Priority of each class code."""
    first = {name: i for i, name in enumerate(fleet.priority)}
    return [first.get(name, len(first)) for name in table.classes]


class _Run:
    """One simulation. It is the `Host` of its replicas."""

    def __init__(
        self,
        table: RequestTable,
        fleet: Fleet,
        cost: StepCost,
        progress: Progress | None,
        watch: Collection[int],
    ) -> None:
        policy, spec = fleet.policy, fleet.replica
        self.table = table
        self.fleet = fleet
        self.progress = progress
        self.columns = Columns(table, fleet)
        self.lives = Lives(watch, policy.n_layers)
        self.feed = JobFeed(
            table,
            _ranks(table, fleet),
            by_chain=policy.name == "prefix_cache",
            needs_chains=spec.limits.prefix_caching,
            needs_starts=any(t.eviction == "cost" for t in spec.tiers),
            kv_bytes_per_token=policy.kv_bytes_per_token,
        )
        n_ranks = len(fleet.priority) + 1
        self.in_pieces = spec.limits.steps == "pieces"
        make = PieceReplica if self.in_pieces else Replica
        self.replicas: list[Replica] = [
            make(i, spec.limits, cost, self, n_ranks)  # type: ignore[arg-type]
            for i in range(fleet.n_replicas)
        ]
        self.router = Router(fleet.router, self.replicas, self.feed.tokens_of)
        self.stores = Stores(fleet, self.feed, cost)
        self.loads = Loads(fleet, cost, self._push)
        self.heap: list[tuple[int, int, int, Any, int]] = []
        self.n_pushed = self.n_events = self.n_ended = 0
        self.dirty: dict[Replica, None] = {}
        """Replicas that may start a step at the present time."""
        self.now_ns = 0
        self.followers: dict[int, list[int]] = {}
        for row in np.flatnonzero(table.after >= 0).tolist():
            self.followers.setdefault(int(table.after[row]), []).append(row)

    def result(self, seed: int) -> ServingResult:
        """What happened."""
        return self.columns.result(
            seed=seed,
            replicas=self.replicas,
            tiers=self.stores.tiers,
            names=self.feed.names,
            n_events=self.n_events,
            spans=self.lives.spans,
        )

    def check(self) -> None:
        """Requests and memory are conserved (INV-1, INV-4).

        Raises:
            InvariantViolation: both sides.
        """
        left = [r.n_inside for r in self.replicas]
        if any(left) or self.columns.n_inside or self.n_ended != len(self.table):
            raise InvariantViolation(
                f"INV-1 {self.n_ended} of {len(self.table)} requests ended, {left} are inside"
            )
        for replica in self.replicas:
            replica.blocks.check()
        self.stores.check(END_OF_TIME)

    def let_go(self) -> None:
        """Break the cycles (replicas and loads know their host), so that memory is free at once
        and the collector, when it is back, has nothing to walk through."""
        vars(self).clear()

    # -- the loop ---------------------------------------------------------------------------------

    def serve(self) -> None:
        """Until every request has ended."""
        timed = np.flatnonzero(self.table.after < 0)
        rows: list[int] = timed.tolist()
        times: list[int] = self.table.arrival_ns[timed].tolist()
        rows.append(-1)
        times.append(END_OF_TIME)
        heap, dirty = self.heap, self.dirty
        at = 0
        come_ns = times[0]
        self.now_ns = come_ns
        n_events = 0
        while True:
            next_ns = heap[0][0] if heap else END_OF_TIME
            if come_ns < next_ns:
                next_ns = come_ns
            if dirty and next_ns > self.now_ns:
                self._plan_all()
                continue
            if next_ns == END_OF_TIME:
                break
            n_events += 1
            if come_ns == next_ns:
                self.now_ns = come_ns
                self._come(rows[at])
                at += 1
                come_ns = times[at]
                continue
            now_ns, kind, _, what, version = heappop(heap)
            if kind == DONE:
                if version == what.version:
                    self.now_ns = now_ns
                    self._done(what)
            elif kind == COMMIT:
                if version == what.version:
                    self.now_ns = now_ns
                    what.replica.commit(what)
                    self.dirty[what.replica] = None
            elif kind == MOVED:
                if version == what.version:
                    self.now_ns = now_ns
                    self._moved(what)
            elif kind == READY:
                if version == what.load_id and what.is_loading and what.ready_ns == now_ns:
                    self.now_ns = now_ns
                    what.replica.make_ready(what)
                    self._poke(what.replica)
            else:
                self.now_ns = now_ns
                self._come(what)
        self.n_events = n_events

    def _push(self, at_ns: int, kind: int, what: Any, version: int = 0) -> None:
        self.n_pushed += 1
        heappush(self.heap, (at_ns, kind, self.n_pushed, what, version))

    def _plan_all(self) -> None:
        dirty = self.dirty
        for replica in dirty:
            while replica.may_plan:
                step = replica.plan(self.now_ns)
                if step is None:
                    break
                self._schedule(step)
        dirty.clear()

    def _schedule(self, step: Step) -> None:
        self._push(step.end_ns, DONE, step, step.version)
        if not step.is_committed and step.commit_ns < step.end_ns:
            self._push(step.commit_ns, COMMIT, step, step.version)

    def _poke(self, replica: Replica) -> None:
        """Something new may run on `replica`."""
        if self.in_pieces or not replica.flying:
            self.dirty[replica] = None
        if replica.flying:
            step = replica.cut(self.now_ns)
            if step is not None:
                self._schedule(step)

    def _come(self, row: int) -> None:
        columns, now_ns = self.columns, self.now_ns
        columns.inside(1, now_ns)
        columns.arrival_ns[row] = now_ns
        job = self.feed.job(row, now_ns)
        replica = job.replica = self.router.choose(job)
        columns.replica[row] = replica.index
        if replica.enqueue(job):
            self._poke(replica)

    def _moved(self, flow: Flow) -> None:
        self.loads.moved(flow, self.now_ns)
        if self.lives.spans:
            self.lives.loaded(flow, self.fleet.replica.tiers[flow.tier].name)
        flying = flow.owner.replica.flying
        if flying and flying[0].is_late:
            self._hold(flying[0])

    def _done(self, step: Step) -> None:
        replica = step.replica
        step.is_late = self._hold(step)  # a load was slowed down after its piece began
        if step.is_late:
            return
        if self.lives.spans:
            self.lives.stepped(step, self.now_ns)
        changed = replica.finish(self.now_ns)
        if changed is not None:
            self._schedule(changed)
        self.dirty[replica] = None

    def _hold(self, step: Step) -> bool:
        """Whether a step's loads end after all of it was computed; then it ends behind them."""
        end_ns = self.now_ns
        for job, _ in step.pieces:
            end_ns = max(end_ns, job.load_end_ns + job.tail_ns)
        if end_ns != step.end_ns:
            step.replica.delay(end_ns)
            for flying in step.replica.flying:
                self._schedule(flying)
        return end_ns > self.now_ns

    # -- what replicas tell -----------------------------------------------------------------------

    def admitted(self, replica: Replica, job: Job, n_hit: int, now_ns: int) -> None:
        """Decide the fates of its tokens; begin its loads."""
        row, columns = job.row, self.columns
        is_first = columns.admitted_ns[row] < 0
        if is_first:
            columns.admitted_ns[row] = now_ns
            columns.gpu_tokens[row] = job.position
        found, loads = self.stores.decide(replica.index, job, n_hit, now_ns)
        if self.in_pieces:
            job.shape = self.stores.shape(job, found)
        elif loads:
            self.loads.begin(job, self.stores.tiers[replica.index], loads, now_ns)
        n_again = 0
        for tier, (_, n_loaded, again) in loads.items():
            n_again += again
            columns.loaded_bytes[tier][row] += n_loaded * self.fleet.policy.kv_bytes_per_token
            if is_first:
                columns.loaded_tokens[tier][row] = n_loaded
        if is_first:
            columns.recomputed_tokens[row] = n_again
            columns.computed_tokens[row] = job.rows_left - n_again
            tokens_of = self.feed.tokens_of
            unloaded = sum([tokens_of[key] for keys in job.unloaded.values() for key in keys])
            columns.unloaded_tokens[row] = unloaded
        else:
            columns.repeated_tokens[row] += job.rows_left

    def first_token(self, replica: Replica, job: Job, now_ns: int) -> None:
        """Its prompt is computed; what no tier had is kept."""
        if self.columns.first_ns[job.row] < 0:
            self.columns.first_ns[job.row] = now_ns
        if job.new_keys and self.fleet.policy.write_back:
            self.stores.tiers[replica.index].add_new(
                job.new_keys, now_ns, {*chain(*job.unloaded.values())}
            )
            job.new_keys = []

    def landing(self, replica: Replica) -> tuple[float, int]:
        """Share of its speed that decoding loses to loads, and until when."""
        return self.loads.landing(replica.index)

    def preempted(self, replica: Replica, job: Job) -> None:
        """It lost its place."""
        self.columns.n_preemptions[job.row] += 1

    def ended(self, replica: Replica, job: Job, now_ns: int) -> None:
        """It made its last token; who waited for that comes."""
        row, columns = job.row, self.columns
        job.flows = []  # they know their owner
        columns.end_ns[row] = now_ns
        columns.inside(-1, now_ns)
        if self.lives.spans:
            self.lives.ended(row, job.n_output, columns.first_ns[row], now_ns, replica.index)
        for follower in self.followers.get(row, ()):
            self._push(now_ns + int(self.table.arrival_ns[follower]), COME, follower)
        self.n_ended += 1
        if self.progress is not None and self.n_ended % PROGRESS_EVERY == 0:
            self.progress(self.n_ended, len(self.table))
