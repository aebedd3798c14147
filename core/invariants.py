"""The numbered invariants, and a check of those that a timeline shows, simulated or measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from .errors import InvariantViolation
from .ops import Schedule, Span
from .timeline import Timeline
from .workload import Request, Workload


class Invariant(NamedTuple):
    """A law of the project and the place that holds it."""

    number: int
    statement: str
    checked_in: str


INVARIANTS = (
    Invariant(1, "every request ends exactly once", "core/invariants.py, timelines of `serve`"),
    Invariant(
        2,
        "spans of one stream never overlap and keep submission order",
        "core/invariants.py",
    ),
    Invariant(3, "no span starts before its dependencies end", "core/invariants.py"),
    Invariant(
        4,
        "used + free = capacity in every tier, always",
        "BlockPool.check_integrity at each free, ChunkIndex.check_integrity in tests: "
        "a timeline does not show capacities",
    ),
    Invariant(
        5,
        "nothing is read before it was written",
        "core/invariants.py: load before restore, restore before the layers that read it, all "
        "layers before the head; bytes on disk by the store's checksums",
    ),
    Invariant(6, "same seed, same bytes (simulator)", "tests/simulator/test_determinism.py"),
    Invariant(7, "no policy sees the true output length", "tests/core/test_engine.py"),
    Invariant(
        8,
        "the engine is never idle with admissible work",
        "core/invariants.py with `idle_ns`: some op is under way while a request is open",
    ),
    Invariant(
        9,
        "bytes per stream = sum over ops",
        "core/invariants.py: one span per op; with a schedule, its bytes stream by stream",
    ),
    Invariant(10, "ratio 1 equals full prefill", "tests of the runtime: values, not times"),
)
"""All of them; `check` raises with the number."""


def check(
    timeline: Timeline,
    workload: Workload | None = None,
    schedule: Schedule | None = None,
    *,
    idle_ns: int | None = None,
) -> None:
    """Hold a timeline against INV-1, 2, 3, 5, 9 and, with `idle_ns`, 8.

    Args:
        timeline: of `serve` or `execute`.
        workload: what was served; by default the timeline's own requests.
        schedule: the DAG that was replayed, if one was.
        idle_ns: longest time in which nothing may be under way while a request is open; 0 for a
            simulator, the loop's own delay for a real executor.

    Raises:
        InvariantViolation: the number and both sides.
    """
    requests = workload.requests if workload is not None else timeline.requests
    if timeline.requests:
        _check_requests(timeline, requests)
    _check_streams(timeline)
    _check_deps(timeline)
    _check_reads(timeline)
    _check_bytes(timeline, schedule)
    if idle_ns is not None and timeline.requests:
        _check_idle(timeline, requests, idle_ns)


def _check_requests(timeline: Timeline, requests: Iterable[Request]) -> None:
    """INV-1: one head in the last attempt, then one decode step per further token."""
    heads: dict[int, list[Span]] = {}
    tokens: Counter[int] = Counter()
    first_decode: dict[int, int] = {}
    ended_early: set[int] = set()
    for span in timeline.spans:
        ended_early |= set(span.outcome.ended)
        if span.op.kind == "head":
            heads.setdefault(span.op.request_ids[0], []).append(span)
        elif span.op.kind == "decode":
            for request_id in span.op.request_ids:
                tokens[request_id] += not span.op.passes_on
                start = min(span.start_ns, first_decode.get(request_id, span.start_ns))
                first_decode[request_id] = start
    known = {r.request_id: r for r in requests}
    strange = sorted((heads.keys() | tokens.keys()) - known.keys())
    if strange:
        raise InvariantViolation(f"INV-1 spans name the requests {strange}, the workload does not")
    last_attempt: Counter[int] = Counter()
    for span in timeline.spans:
        if span.op.kind != "decode":
            for op in span.op.members:
                request_id = op.request_ids[0]
                last_attempt[request_id] = max(last_attempt[request_id], op.attempt)
    for request_id, request in known.items():
        last = [s for s in heads.get(request_id, ()) if s.op.attempt == last_attempt[request_id]]
        if len(last) != 1:
            raise InvariantViolation(
                f"INV-1 request {request_id} has {len(last)} first tokens in its last attempt, "
                "not 1"
            )
        made = tokens[request_id] + 1
        n_missing = request.output_tokens - made
        if n_missing < 0 or (n_missing and request_id not in ended_early):
            raise InvariantViolation(
                f"INV-1 request {request_id} made {made} tokens, it asked for "
                f"{request.output_tokens}"
            )
        if first_decode.get(request_id, last[0].end_ns) < last[0].end_ns:
            raise InvariantViolation(
                f"INV-1 request {request_id} decodes at {first_decode[request_id]} ns, its first "
                f"token is there at {last[0].end_ns} ns"
            )


def _check_streams(timeline: Timeline) -> None:
    """INV-2: one worker per stream, in submission order, and times that make sense."""
    seen: dict[int, Span] = {}
    for span in timeline.spans:
        if not timeline.start_ns <= span.submit_ns <= span.start_ns <= span.end_ns:
            raise InvariantViolation(
                f"INV-2 op {span.op.op_id}: clock start {timeline.start_ns}, submit "
                f"{span.submit_ns}, start {span.start_ns}, end {span.end_ns} ns must not decrease"
            )
        other = seen.setdefault(span.seq, span)
        if other is not span:
            raise InvariantViolation(
                f"INV-2 ops {other.op.op_id} and {span.op.op_id} both have seq {span.seq}"
            )
    for name, spans in timeline.by_stream().items():
        for before, after in zip(spans, spans[1:], strict=False):
            if after.start_ns < before.end_ns:
                raise InvariantViolation(
                    f"INV-2 stream {name}: op {after.op.op_id} (seq {after.seq}) starts at "
                    f"{after.start_ns} ns, op {before.op.op_id} (seq {before.seq}) before it ends "
                    f"at {before.end_ns} ns"
                )


def _check_deps(timeline: Timeline) -> None:
    """INV-3: dependencies are in the timeline and end first."""
    end_of = {s.op.op_id: s.end_ns for s in timeline.spans}
    for span in timeline.spans:
        for dep in span.op.deps:
            end_ns = end_of.get(dep)
            if end_ns is None or end_ns > span.start_ns:
                raise InvariantViolation(
                    f"INV-3 op {span.op.op_id} starts at {span.start_ns} ns, its dependency {dep} "
                    + ("never ends" if end_ns is None else f"ends at {end_ns} ns")
                )


def _check_reads(timeline: Timeline) -> None:
    """INV-5, request by request and attempt by attempt."""
    prompts: dict[tuple[int, int], dict[str, list[Span]]] = {}
    for span in timeline.spans:
        if span.op.kind != "decode":
            for op in span.op.members:
                kinds = prompts.setdefault((op.request_ids[0], op.attempt), {})
                kinds.setdefault(op.kind, []).append(span)
    for (request_id, _), kinds in prompts.items():
        loads, restores = kinds.get("load", []), kinds.get("restore", [])
        computed = kinds.get("prefill", [])
        for restore in restores:
            _check_restore(request_id, restore, loads)
        for span in computed:
            _check_after(request_id, span, [r for r in restores if _share_layers(r, span)])
        for head in kinds.get("head", []):
            _check_after(request_id, head, [*restores, *computed])


def _check_restore(request_id: int, restore: Span, loads: list[Span]) -> None:
    """Every (chunk, layer) that is restored was loaded before."""
    wanted = set(restore.op.chunks)
    sources = [s for s in loads if _share_layers(s, restore) and wanted & set(s.op.chunks)]
    _check_after(request_id, restore, sources)
    n_layers = restore.op.n_layers
    for chunk in restore.op.chunks:
        covered: set[int] = set()
        for source in sources:
            if chunk in source.op.chunks:
                covered |= set(range(source.op.layer_start, source.op.layer_stop))
        missing = set(range(restore.op.layer_start, restore.op.layer_stop)) - covered
        if missing:
            raise InvariantViolation(
                f"INV-5 request {request_id}: op {restore.op.op_id} restores {n_layers} layers of "
                f"chunk {chunk}, of which {sorted(missing)} were never loaded"
            )


def _check_after(request_id: int, reader: Span, writers: Iterable[Span]) -> None:
    for writer in writers:
        if reader.start_ns < writer.end_ns:
            raise InvariantViolation(
                f"INV-5 request {request_id}: {reader.op.kind} op {reader.op.op_id} starts at "
                f"{reader.start_ns} ns, {writer.op.kind} op {writer.op.op_id} that it reads ends "
                f"at {writer.end_ns} ns"
            )


def _share_layers(a: Span, b: Span) -> bool:
    return a.op.layer_start < b.op.layer_stop and b.op.layer_start < a.op.layer_stop


def _check_bytes(timeline: Timeline, schedule: Schedule | None) -> None:
    """INV-9: one span per op, and the schedule's bytes on each stream."""
    times = Counter(s.op.op_id for s in timeline.spans)
    repeated = sorted(i for i, n in times.items() if n > 1)
    if repeated:
        raise InvariantViolation(f"INV-9 the ops {repeated} have more than one span")
    if schedule is None:
        return
    planned: Counter[str] = Counter()
    for op in schedule.ops:
        planned[f"{op.device}:{op.stream}"] += op.n_bytes
    done = {name: sum(s.op.n_bytes for s in spans) for name, spans in timeline.by_stream().items()}
    if len(times) != len(schedule.ops) or done != dict(planned):
        raise InvariantViolation(
            f"INV-9 {len(times)} spans with bytes {done}, {len(schedule.ops)} ops with bytes "
            f"{dict(planned)}"
        )


def _check_idle(timeline: Timeline, requests: Iterable[Request], idle_ns: int) -> None:
    """INV-8: while a request is open, some op is submitted and has not ended."""
    end_of: dict[int, int] = {}
    for span in timeline.spans:
        for request_id in span.op.request_ids:
            end_of[request_id] = max(span.end_ns, end_of.get(request_id, 0))
    under_way = _merged((s.submit_ns, s.end_ns) for s in timeline.spans)
    is_open = _merged((timeline.start_ns + r.arrival_ns, end_of[r.request_id]) for r in requests)
    at = 0
    for start, stop in is_open:
        covered = start
        while covered < stop:
            while at < len(under_way) and under_way[at][1] <= covered:
                at += 1
            resumes = under_way[at][0] if at < len(under_way) else stop
            if resumes - covered > idle_ns:
                raise InvariantViolation(
                    f"INV-8 nothing is under way from {covered} to {resumes} ns, "
                    f"longer than {idle_ns} ns, and a request is open"
                )
            covered = under_way[at][1] if at < len(under_way) else stop


def _merged(intervals: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Disjoint intervals that cover the same points, in order."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged
