"""CPU time of long traces, with room for a slower machine."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from cachetune.core.arrivals import Arrivals
from cachetune.core.trace_files import read_trace
from cachetune.core.trace_make import Lengths, chat_table, plain_table, rag_table
from cachetune.core.trace_stats import trace_stats

pytestmark = pytest.mark.slow


def test_a_trace_of_12000_requests_is_read_in_a_moment(tmp_path: Path):
    stream = np.random.Generator(np.random.PCG64(0))
    path = tmp_path / "trace.jsonl"
    with open(path, "w") as f:
        for i, n in enumerate(stream.integers(1, 47, size=12_000).tolist()):
            ids = list(range(i * 50, i * 50 + n))
            row = {"timestamp": i * 300, "input_length": 512 * n - 9, "output_length": 300}
            f.write(json.dumps({**row, "hash_ids": ids}) + "\n")
    begin = time.process_time()
    table = read_trace(path)
    assert time.process_time() - begin < 0.8
    begin = time.process_time()
    trace_stats(table)
    assert time.process_time() - begin < 0.8


def test_a_million_requests_are_made_in_seconds():
    rate = Arrivals(rate_rps=100.0)
    length = Lengths(mean=500, cv=1.0)
    for make in (
        lambda: plain_table(1_000_000, rate, length, length),
        lambda: rag_table(1_000_000, rate),
        lambda: chat_table(200_000, rate),
    ):
        begin = time.process_time()
        table = make()
        assert time.process_time() - begin < 3.0 and len(table) == 1_000_000
