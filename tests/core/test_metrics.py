"""Metrics by hand: two requests, milliseconds in round numbers."""

from __future__ import annotations

import json

import pytest
from cachetune.core.metrics import (
    bytes_by_tier,
    goodput_rps,
    littles_law,
    per_request,
    statistics,
    summary,
    utilisation,
)
from cachetune.core.ops import Span
from cachetune.core.timeline import Timeline
from cachetune.core.workload import Slo
from support import make_op, make_workload

MS = 1_000_000
START = 5 * MS
WORKLOAD = make_workload([("a", "b"), ("a",)], output_tokens=3, gap_ns=2 * MS, suffix_tokens=8)


def span(op_id: int, start_ms: int, end_ms: int, kind: str = "head", **fields: object) -> Span:
    stream = "io.dram.0" if kind == "load" else "compute"
    op = make_op(op_id, kind, stream, **fields)
    return Span(op, op_id, START, START + start_ms * MS, START + end_ms * MS)


def by_hand() -> Timeline:
    """Request 0 arrives at 0, its first token at 10; request 1 at 2 and 14; then two steps.

    Request 0 needed a second attempt: the head at 6 was of the first.
    """
    whole = dict(layer_start=0, layer_stop=4)
    head = dict(layer_start=4, layer_stop=4)
    spans = (
        span(0, 1, 4, "load", n_bytes=300, tier="dram", **whole),
        span(1, 4, 5, "restore", n_tokens=64, **whole),
        span(2, 5, 6, **head),
        span(3, 6, 8, "load", n_bytes=100, tier="dram", attempt=1, **whole),
        span(4, 8, 9, "restore", n_tokens=34, attempt=1, **whole),
        span(5, 9, 10, attempt=1, **head),
        span(6, 10, 14, request_ids=(1,), **head),
        span(7, 14, 15, "decode", request_ids=(0, 1)),
        span(8, 17, 18, "decode", request_ids=(0, 1)),
    )
    return Timeline(spans, START, WORKLOAD.requests)


def test_times_of_each_request():
    rows = [
        (m.ttft_ms, m.tpot_ms, m.itl_ms, m.e2e_ms, m.queue_ms, m.n_attempts)
        for m in per_request(by_hand(), WORKLOAD)
    ]
    assert rows == [(10, 4, [5, 3], 18, 1, 2), (12, 2, [1, 3], 16, 8, 1)]


def test_loaded_share_counts_the_last_attempt():
    shares = [m.loaded_share for m in per_request(by_hand(), WORKLOAD)]
    assert shares == [34 / 136, 0.0]


def test_summary_by_hand():
    found = summary(by_hand(), WORKLOAD, Slo(ttft_ms=11, tpot_ms=4))
    expected = {
        "n_requests": 2,
        "n_ended": 2,
        "n_restarts": 1,
        "duration_s": 0.018,
        "prompt_tokens": 136 + 72,
        "output_tokens": 6,
        "throughput_rps": 2 / 0.018,
        "output_tokens_per_s": 6 / 0.018,
        "goodput_rps": 1 / 0.018,
        "ttft_ms_mean": 11,
        "ttft_ms_std": 1,
        "ttft_ms_p50": 11,
        "ttft_ms_p99": 11.98,
        "tpot_ms_p50": 3,
        "itl_ms_mean": 3,
        "e2e_ms_mean": 17,
        "queue_ms_p90": 7.3,
        "reuse_ratio": 34 / 208,
    }
    assert {k: found[k] for k in expected} == pytest.approx(expected)
    assert found["bytes_by_tier"] == bytes_by_tier(by_hand()) == {"dram": 400}
    busy = {"0:compute": 10 / 18, "0:io.dram.0": 5 / 18}
    assert found["utilisation"] == utilisation(by_hand()) == pytest.approx(busy)


def test_keys_are_stable_and_json():
    empty = summary(Timeline((), START, WORKLOAD.requests), WORKLOAD)
    assert list(empty) == list(summary(by_hand(), WORKLOAD))
    assert empty["ttft_ms_p99"] is None and empty["n_ended"] == 0
    json.dumps(empty, allow_nan=False)


def test_slo_needs_both_and_a_single_token_has_no_tpot():
    found = per_request(by_hand(), WORKLOAD)
    n_good = [
        (ttft, tpot, goodput_rps(found, 1.0, Slo(ttft_ms=ttft, tpot_ms=tpot)))
        for ttft, tpot in [(12, 4), (12, 3), (10, 4), (9, 9), (20, 1)]
    ]
    assert [n for _, _, n in n_good] == [2, 1, 1, 0, 0]
    assert goodput_rps(found, 1.0) is None
    single = Timeline(by_hand().spans[:7], START, WORKLOAD.requests)
    first = per_request(single, WORKLOAD)[0]
    assert first.tpot_ms is None and first.meets(Slo(ttft_ms=10, tpot_ms=0.001))


def test_requests_of_a_replayed_schedule_arrive_at_its_start():
    replayed = Timeline(by_hand().spans, START, ())
    assert [m.ttft_ms for m in per_request(replayed, WORKLOAD)] == [10, 14]


def test_littles_law_by_hand():
    """One in the system for 2 ms, then two for 16 ms."""
    law = littles_law(by_hand(), WORKLOAD)
    assert law.n_mean == pytest.approx((2 + 2 * 16) / 18)
    assert law.rate_rps == pytest.approx(2 / 0.018)
    assert law.error < 1e-12


def test_percentiles_interpolate():
    found = statistics("x_ms", [1.0, 2.0, 3.0, 4.0])
    assert found["x_ms_p50"] == 2.5 and found["x_ms_p90"] == pytest.approx(3.7)
