"""Timelines as files: Chrome trace events to look at, raw spans to compute from again.

The trace opens in ui.perfetto.dev and chrome://tracing: a process per device, a thread per
stream, a slice per op, an arrow per dependency, an instant where the host has waited for a device.
Source: the Trace Event Format document.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, astuple, fields
from pathlib import Path
from typing import Any

from .errors import SchemaError
from .ops import NOTHING, Op, Outcome, Segment, Span
from .record import canonical_json, write_atomic
from .timeline import HostWait, Timeline
from .units import NS_PER_US
from .workload import Request

SPANS_VERSION = 1


def to_chrome(timeline: Timeline) -> dict[str, Any]:
    """The trace as a JSON object; times are microseconds since the timeline's start."""
    lanes = _lanes(timeline)
    spans = sorted(timeline.spans, key=lambda s: s.seq)
    by_id = {s.op.op_id: s for s in spans}
    events = _names(lanes)
    for span in spans:
        events.append(_slice(span, lanes, timeline.start_ns))
    n_arrows = 0
    for span in spans:
        for dep in span.op.deps:
            if dep in by_id:
                events += _arrow(by_id[dep], span, n_arrows, lanes, timeline.start_ns)
                n_arrows += 1
    events += [_instant(wait, lanes, timeline.start_ns) for wait in timeline.waits]
    for request in timeline.requests:
        at_us = request.arrival_ns / NS_PER_US
        name = f"arrival {request.request_id}"
        events.append({"ph": "i", "s": "g", "name": name, "pid": 0, "tid": 0, "ts": at_us})
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"label": timeline.label, "start_ns": timeline.start_ns},
    }


def write_chrome(path: str | Path, timeline: Timeline) -> None:
    """Write the trace; the same timeline gives the same bytes."""
    write_atomic(path, canonical_json(to_chrome(timeline)).encode())


def _lanes(timeline: Timeline) -> dict[tuple[int, str], int]:
    """Thread number of each (device, stream): alphabetic, from 1 on each device."""
    lanes: dict[tuple[int, str], int] = {}
    n_on: dict[int, int] = {}
    for device, stream in sorted({(s.op.device, s.op.stream) for s in timeline.spans}):
        n_on[device] = n_on.get(device, 0) + 1
        lanes[device, stream] = n_on[device]
    return lanes


def _names(lanes: dict[tuple[int, str], int]) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    for device in sorted({device for device, _ in lanes}):
        args = {"name": f"device {device}"}
        events.append({"ph": "M", "name": "process_name", "pid": device, "tid": 0, "args": args})
    for (device, stream), tid in lanes.items():
        where = {"ph": "M", "pid": device, "tid": tid}
        events.append({**where, "name": "thread_name", "args": {"name": stream}})
        events.append({**where, "name": "thread_sort_index", "args": {"sort_index": tid}})
    return events


def _slice(span: Span, lanes: dict[tuple[int, str], int], start_ns: int) -> dict[str, Any]:
    op = span.op
    layers = f" L{op.layer_start}-{op.layer_stop - 1}" if op.n_layers else ""
    who = f" r{op.request_ids[0]}" if len(op.request_ids) == 1 else f" x{len(op.request_ids)}"
    return {
        "ph": "X",
        "name": op.kind + layers + who,
        "cat": op.kind,
        "pid": op.device,
        "tid": lanes[op.device, op.stream],
        "ts": (span.start_ns - start_ns) / NS_PER_US,
        "dur": span.duration_ns / NS_PER_US,
        "args": {
            "op_id": op.op_id,
            "seq": span.seq,
            "wait_us": (span.start_ns - span.submit_ns) / NS_PER_US,
            **{name: value for name, value in _plain(op).items() if name in _ARGS},
        },
    }


def _instant(wait: HostWait, lanes: dict[tuple[int, str], int], start_ns: int) -> dict[str, Any]:
    """Where the wait ended: on the lane of its stream, else on the device's own."""
    tid = lanes.get((wait.device, wait.stream), 0)
    return {
        "ph": "i",
        "s": "t" if tid else "p",
        "name": f"sync: {wait.why}",
        "cat": "sync",
        "pid": wait.device,
        "tid": tid,
        "ts": (wait.end_ns - start_ns) / NS_PER_US,
        "args": {"wait_us": (wait.end_ns - wait.start_ns) / NS_PER_US},
    }


_ARGS = frozenset(
    ("request_ids", "n_tokens", "n_pairs", "n_bytes", "n_reads", "tier", "chunks", "attempt")
)


def _arrow(
    before: Span, after: Span, number: int, lanes: dict[tuple[int, str], int], start_ns: int
) -> list[dict[str, Any]]:
    """From the last nanosecond of one slice (its end is the next one's) to the start of another."""
    tail_ns = max(before.start_ns, before.end_ns - 1)
    ends = []
    for phase, span, at_ns in (("s", before, tail_ns), ("f", after, after.start_ns)):
        event: dict[str, Any] = {
            "ph": phase,
            "id": number,
            "name": "dep",
            "cat": "dep",
            "pid": span.op.device,
            "tid": lanes[span.op.device, span.op.stream],
            "ts": (at_ns - start_ns) / NS_PER_US,
        }
        ends.append(event)
    ends[1]["bp"] = "e"
    return ends


def write_spans(path: str | Path, timeline: Timeline) -> None:
    """Write raw spans as JSON lines: a header with the requests, then one span per line."""
    header: dict[str, Any] = {
        "document": "spans",
        "schema_version": SPANS_VERSION,
        "label": timeline.label,
        "start_ns": timeline.start_ns,
        "requests": [r.model_dump(mode="json", exclude_defaults=True) for r in timeline.requests],
    }
    if timeline.waits:
        header["waits"] = [astuple(wait) for wait in timeline.waits]
    lines = [canonical_json(header)]
    for span in timeline.spans:
        line: dict[str, Any] = {
            "seq": span.seq,
            "submit_ns": span.submit_ns,
            "start_ns": span.start_ns,
            "end_ns": span.end_ns,
            "op": _plain(span.op),
        }
        if span.outcome != NOTHING:
            line["outcome"] = _plain(span.outcome)
        lines.append(canonical_json(line))
    write_atomic(path, ("\n".join(lines) + "\n").encode())


def read_spans(path: str | Path) -> Timeline:
    """The timeline that `write_spans` wrote, equal to the original.

    Raises:
        SchemaError: not readable, another version, or a line that is not a span.
    """
    try:
        header, *lines = Path(path).read_text(encoding="utf-8").splitlines()
        head = json.loads(header)
        found = head.get("document"), head.get("schema_version")
        if found == ("spans", SPANS_VERSION):
            return Timeline(
                spans=tuple(_span(json.loads(line)) for line in lines),
                start_ns=head["start_ns"],
                requests=tuple(
                    Request.model_validate_json(json.dumps(r)) for r in head["requests"]
                ),
                label=head["label"],
                waits=tuple(HostWait(*wait) for wait in head.get("waits", ())),
            )
    except OSError as e:
        raise SchemaError(
            "the spans file must be readable",
            values=f"{path}: {e.strerror}",
            remedy="check the path",
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise SchemaError(
            f"{path} must hold a header and one span per line",
            values=f"{type(e).__name__}: {e}".splitlines()[0],
            remedy="record the run again",
        ) from None
    raise SchemaError(
        f"{path} must be a spans file of version {SPANS_VERSION}",
        values=f"document={found[0]}, schema_version={found[1]}",
        remedy="record the run again with this version of cachetune",
    )


def _plain(item: Op | Outcome) -> dict[str, Any]:
    """Fields of a dataclass that differ from their default, as JSON values."""
    plain: dict[str, Any] = {}
    for field in fields(item):
        value = getattr(item, field.name)
        if field.default is MISSING or value != field.default:
            if field.name == "segments":
                value = [(s.part, s.start, s.stop) for s in value]
            elif field.name == "parts":
                value = [_plain(part) for part in value]
            plain[field.name] = list(value) if isinstance(value, tuple) else value
    return plain


def _span(line: dict[str, Any]) -> Span:
    outcome = {k: tuple(v) for k, v in line.get("outcome", {}).items()}
    return Span(
        op=_op(line["op"]),
        seq=line["seq"],
        submit_ns=line["submit_ns"],
        start_ns=line["start_ns"],
        end_ns=line["end_ns"],
        outcome=Outcome(**outcome) if outcome else NOTHING,
    )


def _op(fields_of: dict[str, Any]) -> Op:
    op: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields_of.items()}
    op["segments"] = tuple(Segment(*s) for s in op.get("segments", ()))
    op["parts"] = tuple(_op(part) for part in op.get("parts", ()))
    return Op(**op)
