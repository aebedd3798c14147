"""`Engine`: admission, continuous batching, chunked prefill. No clock and no I/O.

It turns arrivals and finished spans into ops. At most `DEPTH` prefill pieces are queued on the
compute stream, so the next request loads while this one computes, and a decode step never waits
for more than those.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field

from .batching import can_join, in_batches, join, rows_of
from .block_pool import BlockPool
from .chunk_index import ChunkIndex
from .decision import ReuseDecision
from .errors import InvariantViolation
from .lowering import NewId, lower
from .model_spec import ModelSpec
from .ops import COMPUTE, Op, Outcome, Span
from .plan import ReusePlan
from .policies import IDLE, Backlog, decide
from .workload import Request, Workload

DEPTH = 2


@dataclass(slots=True)
class _Prefill:
    """A request whose prompt is being computed."""

    request: Request
    decision: ReuseDecision
    pieces: deque[list[Op]]
    attempt: int = 0
    n_in_flight: int = 0
    failed: set[int] = field(default_factory=set)


class Engine:
    """The decider. One instance serves one device.

    `on_wait` is told of each request that is not admitted as it arrives; it decides nothing.
    """

    def __init__(
        self,
        workload: Workload,
        model: ModelSpec,
        plan: ReusePlan,
        index: ChunkIndex,
        blocks: BlockPool,
        on_wait: Callable[[Request], None] | None = None,
    ) -> None:
        self.workload = workload
        self.model = model
        self.plan = plan
        self.index = index
        self.blocks = blocks
        self._on_wait = on_wait
        self.n_fallbacks = 0
        """Prompts decided again because stored bytes could not be used."""
        self._ids = itertools.count()
        self._waiting: deque[Request] = deque()
        self._prefills: dict[int, _Prefill] = {}
        self._queue: deque[int] = deque()
        self._decoding: dict[int, list[int]] = {}
        self._pieces_in_flight: dict[int, frozenset[int]] = {}
        """By the op that ends it: the requests of a piece."""
        self._decode_in_flight = False
        self._n_open = 0

    @property
    def n_open(self) -> int:
        """Requests that have arrived and not ended."""
        return self._n_open

    def decision_of(self, request_id: int) -> ReuseDecision:
        """The fates decided for a request that is being prefilled."""
        return self._prefills[request_id].decision

    def on_arrival(self, request: Request, now_ns: int) -> list[Op]:
        """A request has come; returns ops to submit."""
        self._n_open += 1
        self._waiting.append(request)
        ops = self._schedule()
        if self._on_wait is not None and self._waiting and self._waiting[-1] is request:
            self._on_wait(request)
        return ops

    def on_done(self, span: Span) -> list[Op]:
        """An op has ended; returns ops to submit."""
        op = span.op
        if op.kind == "decode":
            if op.passes_on:
                return []
            self._decode_in_flight = False
            for request_id in op.request_ids:
                self._token_made(request_id, span.outcome)
            return self._schedule()
        self._pieces_in_flight.pop(op.op_id, None)
        for request_id in op.request_ids:
            prefill = self._prefills[request_id]
            prefill.n_in_flight -= 1
            if span.outcome.failed_chunks:
                prefill.failed |= set(span.outcome.failed_chunks)
            if op.kind == "head" and not prefill.failed:
                self._prefill_done(prefill, span.outcome)
            if prefill.failed and prefill.n_in_flight == 0:
                self._start_again(prefill)
        return self._schedule()

    def _schedule(self) -> list[Op]:
        """Everything that may be submitted now: a decode step first, then prefill pieces."""
        ops: list[Op] = []
        if self._decoding and not self._decode_in_flight:
            ops += self._decode_step()
        while len(self._pieces_in_flight) < DEPTH:
            pieces = self._next_pieces()
            if not pieces:
                break
            piece = pieces[0] if len(pieces) == 1 else join(pieces)
            requests = frozenset(p[-1].request_ids[0] for p in pieces)
            self._pieces_in_flight[piece[-1].op_id] = requests
            for op in piece:
                for request_id in op.request_ids:
                    self._prefills[request_id].n_in_flight += 1
            ops += piece
        return ops

    def _next_pieces(self) -> list[list[Op]]:
        """The next piece, and pieces of other requests that go through the layers with it."""
        first = self._next_piece()
        if first is None:
            return []
        found, rows = [first], rows_of(first)
        while len(found) < self.plan.prefill_batch:
            taken = {piece[-1].request_ids[0] for piece in found}
            more = self._next_piece(taken, first, self.plan.prefill_chunk_tokens - rows)
            if more is None:
                break
            found.append(more)
            rows += rows_of(more)
        return found

    def _next_piece(
        self, taken: Container[int] = (), like: Sequence[Op] = (), room: int = 0
    ) -> list[Op] | None:
        """The next piece of the queue; behind `like`, of a request that is not `taken`, if it can
        join it and has at most `room` rows."""
        for request_id in list(self._queue):
            prefill = self._prefills[request_id]
            if prefill.pieces and not prefill.failed:
                if request_id in taken:
                    continue
                piece = prefill.pieces[0]
                if like and (rows_of(piece) > room or not can_join(like, piece)):
                    return None
                prefill.pieces.popleft()
                if not prefill.pieces:
                    self._queue.remove(request_id)
                return piece
            self._queue.remove(request_id)
        return self._next_piece(taken, like, room) if self._admit() else None

    def _admit(self) -> bool:
        """Move the oldest waiting request into prefill if it fits."""
        n_seqs = len(self._prefills) + len(self._decoding)
        if not self._waiting or n_seqs >= self.plan.max_num_seqs:
            return False
        request = self._waiting[0]
        n_tokens = self.workload.prompt_tokens(request) + request.max_output_tokens
        fits_empty = self.blocks.n_free == self.blocks.n_blocks
        if not self.blocks.can_allocate(n_tokens) and not fits_empty:
            return False
        self.blocks.allocate(request.request_id, n_tokens)
        self._waiting.popleft()
        self._begin(request, attempt=0)
        return True

    def _begin(self, request: Request, attempt: int) -> None:
        found = self.index.lookup(request.chunks, request.tenant)
        chunk_tokens = self.workload.chunk_tokens(request)
        backlog = self._backlog(request)
        decision = decide(self.plan, found, chunk_tokens, request.suffix_tokens, backlog)
        pieces = lower(
            request.request_id, decision, self.plan, self.model, self._ids.__next__, attempt
        )
        prefill = _Prefill(request, decision, deque(pieces), attempt)
        self._prefills[request.request_id] = prefill
        self._queue.append(request.request_id)

    def _backlog(self, request: Request) -> Backlog:
        """Of all but `request`; a prompt under way counts whole until it is done."""
        if all(rule.rho is None for rule in self.plan.rules):
            return IDLE
        n_layers = self.model.n_layers
        n_ahead = 0
        n_loading: Counter[str] = Counter()
        for request_id, prefill in self._prefills.items():
            if request_id != request.request_id:
                decision = prefill.decision
                n_ahead += decision.n_computed(0, n_layers)
                for ordinal, chunk in enumerate(decision.chunks):
                    n_loading[chunk.tier] += decision.n_loaded(ordinal, n_layers - 1, n_layers)
        n_behind_rows = sum(map(self.workload.prompt_tokens, self._waiting))
        return Backlog(n_ahead, len(self._waiting), n_behind_rows, n_loading)

    def _start_again(self, prefill: _Prefill) -> None:
        """Forget what could not be read and decide anew: those chunks are computed."""
        for ordinal in prefill.failed:
            self.index.discard(prefill.decision.chunks[ordinal].key)
        self.n_fallbacks += 1
        request_id = prefill.request.request_id
        if request_id in self._queue:
            self._queue.remove(request_id)
        for op_id in [i for i, r in self._pieces_in_flight.items() if r == {request_id}]:
            del self._pieces_in_flight[op_id]
        self._begin(prefill.request, prefill.attempt + 1)
        self._queue.rotate(1)

    def _prefill_done(self, prefill: _Prefill, outcome: Outcome) -> None:
        """The first token exists."""
        request = prefill.request
        if prefill.n_in_flight or prefill.pieces:
            raise InvariantViolation(
                f"head of request {request.request_id} ended with {prefill.n_in_flight} ops in "
                f"flight and {len(prefill.pieces)} pieces left"
            )
        del self._prefills[request.request_id]
        prompt = self.workload.prompt_tokens(request)
        self._decoding[request.request_id] = [prompt, request.output_tokens]
        self._token_made(request.request_id, outcome)

    def _token_made(self, request_id: int, outcome: Outcome) -> None:
        """One more token; the executor alone knows when the output ends."""
        state = self._decoding[request_id]
        state[0] += 1
        state[1] -= 1
        if state[1] == 0 or request_id in outcome.ended:
            del self._decoding[request_id]
            self.blocks.free(request_id)
            self._n_open -= 1

    def _decode_step(self) -> list[Op]:
        self._decode_in_flight = True
        request_ids = tuple(self._decoding)
        n_pairs = sum(self._decoding[r][0] for r in request_ids)
        return decode_ops(self._ids.__next__, request_ids, n_pairs, self.model, self.plan, None)


def schedule_of(
    workload: Workload, request: Request, model: ModelSpec, plan: ReusePlan, index: ChunkIndex
) -> tuple[ReuseDecision, list[Op]]:
    """One request's decision and its fixed DAG, as the engine would submit it alone."""
    one = workload.replace(requests=(request,))
    decisions, ops = batch_schedule_of(one, model, plan, index)
    return decisions[request.request_id], ops


def batch_schedule_of(
    workload: Workload, model: ModelSpec, plan: ReusePlan, index: ChunkIndex, n_decode: int = 0
) -> tuple[dict[int, ReuseDecision], list[Op]]:
    """All requests at once, then `n_decode` steps of the whole batch, as one fixed DAG."""
    ids = itertools.count()
    decisions = {}
    pieces = []
    for request in workload.requests:
        found = index.lookup(request.chunks, request.tenant)
        decision = decide(plan, found, workload.chunk_tokens(request), request.suffix_tokens)
        decisions[request.request_id] = decision
        pieces.append(lower(request.request_id, decision, plan, model, ids.__next__))
    ops = in_batches(pieces, plan.prefill_batch, plan.prefill_chunk_tokens)
    context = sum(workload.prompt_tokens(r) for r in workload.requests)
    batch = len(workload.requests)
    for step in range(1, n_decode + 1):
        n_pairs = context + step * batch
        last = ops[-1].op_id
        ops += decode_ops(ids.__next__, tuple(decisions), n_pairs, model, plan, last)
    return decisions, ops


def decode_ops(
    new_id: NewId,
    request_ids: tuple[int, ...],
    n_pairs: int,
    model: ModelSpec,
    plan: ReusePlan,
    after: int | None,
) -> list[Op]:
    """One step of a batch that sees `n_pairs` keys in all, per layer: an op on each stage."""
    ops: list[Op] = []
    for stage in range(plan.pipeline_stages):
        ops.append(
            Op(
                op_id=new_id(),
                kind="decode",
                stream=COMPUTE,
                request_ids=request_ids,
                layer_start=plan.stage_start(stage, model.n_layers),
                layer_stop=plan.stage_start(stage + 1, model.n_layers),
                n_tokens=len(request_ids),
                n_pairs=n_pairs,
                deps=() if after is None else (after,),
                device=stage,
                passes_on=stage + 1 < plan.pipeline_stages,
            )
        )
        after = ops[-1].op_id
    return ops


__all__ = ["DEPTH", "Engine", "batch_schedule_of", "schedule_of"]
