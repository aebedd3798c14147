"""Timelines as Chrome traces.

A trace opens in ui.perfetto.dev and chrome://tracing: a process per device, a thread per
stream, a slice per op, an arrow per dependency, an instant where the host has waited for a device.
Source: the Trace Event Format document.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .ops import Span
from .record import canonical_json, write_atomic
from .timeline import HostWait, Timeline
from .units import NS_PER_US


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
            "request_ids": list(op.request_ids),
            **{name: _plain(value) for name in _ARGS if (value := getattr(op, name))},
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


_ARGS = ("n_tokens", "n_pairs", "n_bytes", "n_reads", "tier", "chunks", "attempt")


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


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
