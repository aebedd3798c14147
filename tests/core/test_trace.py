"""Timelines as Chrome traces: well formed, the same bytes each time."""

from __future__ import annotations

import json
from pathlib import Path

from cachetune.core.ops import Outcome, Segment, Span
from cachetune.core.timeline import HostWait, Timeline
from cachetune.core.trace import to_chrome, write_chrome
from cachetune.core.workload import Slo
from support import make_op, make_workload

LOAD = make_op(
    0, "load", "io.dram.0", layer_stop=2, n_bytes=8192, n_reads=3, tier="dram", chunks=(0, 2)
)
PREFILL = make_op(1, "prefill", layer_stop=2, n_tokens=9, segments=(Segment(0, 1, 9),), deps=(0,))
HEAD = make_op(2, "head", layer_start=2, layer_stop=2, deps=(1,), attempt=1)
STEP = make_op(3, "decode", layer_stop=2, request_ids=(0, 1), device=1)


def timeline() -> Timeline:
    spans = (
        Span(LOAD, 0, 1000, 1500, 4500, Outcome(failed_chunks=(2,))),
        Span(PREFILL, 1, 1000, 4500, 6000),
        Span(HEAD, 2, 1000, 6000, 6007, Outcome(token_ids=(5,), ended=(0,))),
        Span(STEP, 3, 1001, 1002, 1003, Outcome(selected=(1, 2))),
    )
    requests = make_workload([("a",), ("a", "b")], gap_ns=250).requests
    with_slo = requests[1].replace(slo=Slo(ttft_ms=1.5, tpot_ms=2))
    waits = (
        HostWait(0, "rope table", 1100, 1350),
        HostWait(0, "end of load", 1500, 4500, "io.dram.0"),
    )
    return Timeline(spans, 1000, (requests[0], with_slo), "a label", waits)


def test_bytes_are_deterministic(tmp_path: Path):
    for name in ("one", "two"):
        write_chrome(tmp_path / name, timeline())
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_slices_are_microseconds_since_the_start():
    slices = [e for e in to_chrome(timeline())["traceEvents"] if e["ph"] == "X"]
    table = [(e["pid"], e["tid"], e["name"], e["ts"], e["dur"]) for e in slices]
    assert table == [
        (0, 2, "load L0-1 r0", 0.5, 3.0),
        (0, 1, "prefill L0-1 r0", 3.5, 1.5),
        (0, 1, "head r0", 5.0, 0.007),
        (1, 1, "decode L0-1 x2", 0.002, 0.001),
    ]
    assert slices[0]["args"] == {
        "op_id": 0,
        "seq": 0,
        "wait_us": 0.5,
        "request_ids": [0],
        "n_bytes": 8192,
        "n_reads": 3,
        "tier": "dram",
        "chunks": [0, 2],
    }


def test_devices_and_streams_have_names():
    events = [e for e in to_chrome(timeline())["traceEvents"] if e["ph"] == "M"]
    names = {(e["name"], e["pid"], e["tid"]): e["args"] for e in events}
    assert names["process_name", 1, 0] == {"name": "device 1"}
    assert names["thread_name", 0, 1] == {"name": "compute"}
    assert names["thread_name", 0, 2] == {"name": "io.dram.0"}


def test_arrows_run_from_inside_a_slice_to_the_start_of_another():
    arrows = [e for e in to_chrome(timeline())["traceEvents"] if e["ph"] in "sf"]
    table = [(e["ph"], e["id"], e["tid"], e["ts"]) for e in arrows]
    assert table == [("s", 0, 2, 3.499), ("f", 0, 1, 3.5), ("s", 1, 1, 4.999), ("f", 1, 1, 5.0)]
    assert all(e["bp"] == "e" for e in arrows if e["ph"] == "f")


def test_the_trace_is_plain_json(tmp_path: Path):
    write_chrome(tmp_path / "t.json", timeline())
    loaded = json.loads((tmp_path / "t.json").read_text())
    assert loaded["otherData"] == {"label": "a label", "start_ns": 1000}
    arrivals = [e["ts"] for e in loaded["traceEvents"] if e["name"].startswith("arrival")]
    assert arrivals == [0.0, 0.25]


def test_waits_of_the_host_are_instants_on_the_lane_of_their_stream():
    events = [e for e in to_chrome(timeline())["traceEvents"] if e.get("cat") == "sync"]
    table = [(e["name"], e["ph"], e["s"], e["tid"], e["ts"], e["args"]["wait_us"]) for e in events]
    assert table == [
        ("sync: rope table", "i", "p", 0, 0.35, 0.25),
        ("sync: end of load", "i", "t", 2, 3.5, 3.0),
    ]
