"""`lower`: a decision becomes ops, by layer group, with streams and dependencies.

Both executors run exactly these ops. A prompt is computed in pieces of at most
`plan.prefill_chunk_tokens` rows (chunked prefill); all loads and restores belong to the first.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

from .decision import ReuseDecision
from .layout import n_reads, read_bytes
from .model_spec import ModelSpec
from .ops import COMPUTE, QUERY_BLOCK, RESTORE, Op, OpKind, Segment, io_stream
from .pairs import Run, scored_pairs
from .plan import ReusePlan

NewId = Callable[[], int]


def lower(
    request_id: int,
    decision: ReuseDecision,
    plan: ReusePlan,
    model: ModelSpec,
    new_id: NewId,
    attempt: int = 0,
) -> list[list[Op]]:
    """Ops of one prompt, a list per piece, in submission order; the last op is its `head`.

    Raises:
        PlanError: more pipeline stages than layers.
    """
    plan.check_stages(model.n_layers)
    return _Lowering(request_id, decision, plan, model, new_id, attempt).pieces()


@dataclass(frozen=True, slots=True)
class _Group:
    """Layers [start, stop) that share one band, hence one set of rows, and one device."""

    start: int
    stop: int
    stage: int = 0


class _Share(NamedTuple):
    """What one I/O stream loads in each layer of a regime."""

    stream: str
    tier: str
    chunks: tuple[int, ...]
    n_rows: int
    n_bytes: int
    n_reads: int


class _Rows(NamedTuple):
    """What a prefill of one piece computes in each layer of a regime."""

    n_rows: int
    n_pairs: int
    n_scored: int
    segments: tuple[Segment, ...]


class _Lowering:
    def __init__(
        self,
        request_id: int,
        decision: ReuseDecision,
        plan: ReusePlan,
        model: ModelSpec,
        new_id: NewId,
        attempt: int,
    ) -> None:
        self.request_id = request_id
        self.decision = decision
        self.plan = plan
        self.model = model
        self.new_id = new_id
        self.attempt = attempt
        self.groups = self._groups()
        # Layers of one regime are alike: counted once, as this is on the path of a request.
        self._shares: dict[tuple[int, bool], list[_Share]] = {}
        self._rows: dict[tuple[int, int, bool], _Rows] = {}
        self._sizes: dict[int, int] = {}
        self._loaded_in: dict[tuple[int, bool], tuple[tuple[int, ...], int]] = {}

    def _regime(self, layer: int) -> tuple[int, bool]:
        """Band, and which side of the check layer: what decides the rows of a layer."""
        band = self.decision.band_of(layer, self.model.n_layers)
        return band, layer >= self.decision.check_layer

    def _groups(self) -> list[_Group]:
        """Layer groups; none crosses a band or the check layer, where rows change."""
        n_layers = self.model.n_layers
        cuts = {0, n_layers}
        cuts |= {self.decision.band_start(b, n_layers) for b in range(self.decision.n_bands)}
        n_stages = self.plan.pipeline_stages
        stages = [self.plan.stage_start(s, n_layers) for s in range(n_stages)]
        cuts |= set(stages)
        if self.decision.selection == "deviation":
            cuts.add(min(self.decision.check_layer, n_layers))
        edges = sorted(cuts)
        groups = []
        for low, high in zip(edges, edges[1:], strict=False):
            stage = bisect_right(stages, low) - 1
            for start in range(low, high, self.plan.layer_group):
                groups.append(_Group(start, min(start + self.plan.layer_group, high), stage))
        return groups

    def pieces(self) -> list[list[Op]]:
        segments = self._piece_segments()
        pieces = [self._first_piece(segments[0])]
        for number, piece in enumerate(segments[1:], start=1):
            ops: list[Op] = []
            for group in self.groups:
                ops.append(self._prefill(group, piece, ops[-1:], number))
            pieces.append(ops)
        last = pieces[-1]
        n_layers = self.model.n_layers
        last.append(
            self._op(
                "head",
                COMPUTE,
                _Group(n_layers, n_layers, self.groups[-1].stage),
                n_tokens=1,
                after=last[-1:],
            )
        )
        return pieces

    def _first_piece(self, segments: tuple[Segment, ...]) -> list[Op]:
        """Loads, restores and compute of the first piece, group by group."""
        ops: list[Op] = []
        computed: list[Op] = []
        by_chunk = self._chunk_loads() if self.plan.load_order == "chunk" else []
        ops += by_chunk
        pending: list[Op] = []
        for g, group in enumerate(self.groups):
            loads = [op for op in by_chunk if op.device == group.stage]
            if self.plan.load_order == "layer":
                gate = g - 1 - self.plan.look_ahead
                # A stage looks ahead over its own groups: it loads while those before it compute.
                same = gate >= 0 and self.groups[gate].stage == group.stage
                loads = self._group_loads(group, computed[gate : gate + 1] if same else [])
                ops += loads
            if self._is_check(group):
                ops.append(self._select(group, loads + computed[-1:]))
                pending = ops[-1:]
            restore = self._restore(group, loads)
            ops += restore
            ops.append(self._prefill(group, segments, restore + pending + computed[-1:]))
            pending = []
            computed.append(ops[-1])
        return ops

    def _group_loads(self, group: _Group, gate: list[Op]) -> list[Op]:
        """One load per tier and worker: all chunks, this group's layers."""
        regime = self._regime(group.start)
        if regime not in self._shares:
            self._shares[regime] = self._shares_of(group.start)
        layers = group.stop - group.start
        return [
            self._op(
                "load", share.stream, group, n_tokens=share.n_rows,
                n_bytes=layers * share.n_bytes, n_reads=layers * share.n_reads,
                tier=share.tier, chunks=share.chunks, after=gate,
            )
            for share in self._shares[regime]
        ]  # fmt: skip

    def _shares_of(self, layer: int) -> list[_Share]:
        decision, n_layers = self.decision, self.model.n_layers
        ordinals: dict[tuple[str, int], list[int]] = {}
        for ordinal in self._loaded(layer)[0]:
            tier = decision.chunks[ordinal].tier
            ordinals.setdefault((tier, ordinal % self.plan.n_io_workers), []).append(ordinal)
        shares = []
        for (tier, worker), chunks in ordinals.items():
            rows = [decision.n_loaded(ordinal, layer, n_layers) for ordinal in chunks]
            n_bytes = [self._size(n) for n in rows]
            reads = sum(n_reads(size, self.plan.request_bytes) for size in n_bytes)
            stream = io_stream(tier, worker)
            shares.append(_Share(stream, tier, tuple(chunks), sum(rows), sum(n_bytes), reads))
        return sorted(shares)

    def _chunk_loads(self) -> list[Op]:
        """One load per chunk and stage: all its layers there, workers in turn."""
        loaded = {chunk for group in self.groups for chunk in self._loaded(group.start)[0]}
        ops = []
        for stage in range(self.plan.pipeline_stages):
            groups = [group for group in self.groups if group.stage == stage]
            whole = _Group(groups[0].start, groups[-1].stop, stage)
            alike: dict[tuple[int, bool], list[int]] = {}
            for group in groups:
                first = alike.setdefault(self._regime(group.start), [group.start, 0])
                first[1] += group.stop - group.start
            ops += [self._chunk_load(ordinal, whole, alike.values()) for ordinal in sorted(loaded)]
        # Not by rows: a few in some layers only are less than one per layer.
        return [op for op in ops if op.n_bytes]

    def _chunk_load(self, ordinal: int, whole: _Group, alike: Iterable[Sequence[int]]) -> Op:
        """`alike`: the first layer of each regime, and how many layers it has."""
        tokens = n_bytes = reads = 0
        for start, layers in alike:
            rows = self.decision.n_loaded(ordinal, start, self.model.n_layers)
            size = self._size(rows)
            tokens += layers * rows
            n_bytes += layers * size
            reads += layers * n_reads(size, self.plan.request_bytes)
        tier = self.decision.chunks[ordinal].tier
        stream = io_stream(tier, ordinal % self.plan.n_io_workers)
        return self._op(
            "load", stream, whole, n_tokens=tokens // (whole.stop - whole.start), n_bytes=n_bytes,
            n_reads=reads, tier=tier, chunks=(ordinal,), after=[],
        )  # fmt: skip

    def _size(self, rows: int) -> int:
        if rows not in self._sizes:
            self._sizes[rows] = read_bytes(self.model, rows) if rows else 0
        return self._sizes[rows]

    def _restore(self, group: _Group, loads: list[Op]) -> list[Op]:
        chunks, rows = self._loaded(group.start)
        if not chunks:
            return []
        layers = group.stop - group.start
        stream = COMPUTE if self.plan.restore_stream == "compute" else RESTORE
        op = self._op(
            "restore",
            stream,
            group,
            n_tokens=rows,
            n_bytes=rows * layers * self.model.kv_bytes_per_token_layer,
            n_reads=len(chunks) * layers,
            chunks=chunks,
            after=loads,
        )
        return [op]

    def _select(self, group: _Group, after: list[Op]) -> Op:
        check = _Group(group.start, group.start + 1, group.stage)
        chunks, _ = self._loaded(group.start)
        n_prompt = self.decision.n_prompt
        return self._op("select", COMPUTE, check, n_tokens=n_prompt, chunks=chunks, after=after)

    def _prefill(
        self, group: _Group, segments: tuple[Segment, ...], after: list[Op], piece: int = 0
    ) -> Op:
        key = (piece, *self._regime(group.start))
        if key not in self._rows:
            self._rows[key] = self._rows_of(segments, group.start)
        rows = self._rows[key]
        return self._op(
            "prefill", COMPUTE, group, n_tokens=rows.n_rows, n_pairs=rows.n_pairs,
            n_scored=rows.n_scored, segments=rows.segments, piece=piece, after=after,
        )  # fmt: skip

    def _rows_of(self, segments: tuple[Segment, ...], layer: int) -> _Rows:
        band = self.decision.band_of(layer, self.model.n_layers)
        runs = [r for s in segments if (r := self._run(s, band, layer)).n_rows]
        n_rows = sum(r.n_rows for r in runs)
        pairs, scored = sum(r.pairs for r in runs), scored_pairs(runs)
        if (window := self.model.sliding_window) is not None:
            pairs, scored = (
                min(pairs, n_rows * window),
                min(scored, n_rows * (window + QUERY_BLOCK)),
            )
        return _Rows(n_rows, pairs, scored, tuple(Segment(r.part, r.start, r.stop) for r in runs))

    def _run(self, segment: Segment, band: int, layer: int) -> Run:
        """The rows of a segment that pass through `layer`, taken as evenly spread."""
        chunks = self.decision.chunks
        if segment.part == len(chunks):
            n = total = self.decision.n_suffix
            offset = self.decision.n_prompt - n
        else:
            fate = chunks[segment.part]
            offset, n = fate.offset, fate.n_tokens
            total = self._n_selected(segment.part, band, layer)
        start, stop = min(segment.start, total), min(segment.stop, total)
        return Run(segment.part, offset, n, total, start, stop)

    def _n_selected(self, ordinal: int, band: int, layer: int) -> int:
        """Rows of a chunk that pass through `layer`; by deviation only their sum is exact."""
        fate = self.decision.chunks[ordinal]
        if self.decision.selection == "rank" or not fate.is_loaded:
            return fate.n_recompute[band]
        if layer < self.decision.check_layer:
            return fate.n_tokens
        before, total = self._candidates.get(ordinal, (0, 0))
        if not total:
            return 0
        n_selected = self.decision.n_selected
        return (before + fate.n_tokens) * n_selected // total - before * n_selected // total

    @cached_property
    def _candidates(self) -> dict[int, tuple[int, int]]:
        """Of each chunk among which the check layer chooses: tokens before it, and of all."""
        found = [(i, c.n_tokens) for i, c in enumerate(self.decision.chunks)
                 if c.is_loaded and not c.exact]  # fmt: skip
        ends = list(accumulate(n for _, n in found))
        return {i: (end - n, ends[-1]) for (i, n), end in zip(found, ends, strict=True)}

    def _piece_segments(self) -> list[tuple[Segment, ...]]:
        """Cut the computed rows into pieces; a chunk whose rows differ by band is never cut."""
        budget = self.plan.prefill_chunk_tokens
        if self.decision.selection == "deviation":
            budget = self.decision.n_prompt
        pieces: list[list[Segment]] = [[]]
        room = budget
        counts = [c.n_recompute for c in self.decision.chunks]
        for part, by_band in enumerate([*counts, (self.decision.n_suffix,)]):
            rows = by_band[0]
            if self.decision.selection == "deviation" and part < len(counts):
                rows = self.decision.chunks[part].n_tokens
            start = 0
            divisible = len(set(by_band)) == 1
            while start < rows:
                if room == 0 or (not divisible and rows > room and room < budget):
                    pieces.append([])
                    room = budget
                stop = min(rows, start + room) if divisible else rows
                pieces[-1].append(Segment(part, start, stop))
                room = max(0, room - (stop - start))
                start = stop
        return [tuple(p) for p in pieces]

    def _loaded(self, layer: int) -> tuple[tuple[int, ...], int]:
        """Chunks of which something is loaded in a layer, and the rows that are."""
        regime = self._regime(layer)
        if regime not in self._loaded_in:
            n_layers = self.model.n_layers
            n = len(self.decision.chunks)
            rows = [self.decision.n_loaded(i, layer, n_layers) for i in range(n)]
            self._loaded_in[regime] = tuple(i for i in range(n) if rows[i]), sum(rows)
        return self._loaded_in[regime]

    def _is_check(self, group: _Group) -> bool:
        return self.decision.selection == "deviation" and group.start == self.decision.check_layer

    def _op(
        self,
        kind: OpKind,
        stream: str,
        group: _Group,
        *,
        after: list[Op],
        n_tokens: int = 0,
        n_pairs: int = 0,
        n_scored: int = 0,
        n_bytes: int = 0,
        n_reads: int = 0,
        tier: str = "",
        chunks: tuple[int, ...] = (),
        segments: tuple[Segment, ...] = (),
        piece: int = 0,
    ) -> Op:
        return Op(
            op_id=self.new_id(),
            kind=kind,
            stream=stream,
            request_ids=(self.request_id,),
            layer_start=group.start,
            layer_stop=group.stop,
            n_tokens=n_tokens,
            n_pairs=n_pairs,
            n_scored=n_scored,
            n_bytes=n_bytes,
            n_reads=n_reads,
            tier=tier,
            chunks=chunks,
            segments=segments,
            piece=piece,
            deps=tuple(op.op_id for op in after),
            attempt=self.attempt,
            device=group.stage,
        )
