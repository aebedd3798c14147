"""Traffic of a question: the same requests at any rate, conversations, windows of a trace."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cachetune.core.errors import WorkloadError
from cachetune.tuner.traffic import Traffic, rate_of, traffic_of

RAG = Traffic(text="rag:passages=300,tokens=512,chunks=8,output=16")


@pytest.mark.parametrize("text", [RAG.text, "chat:"])
def test_runs_at_all_rates_see_the_same_requests(text: str):
    traffic = traffic_of(text)
    slow, fast = traffic.table(200, 1.0, seed=5), traffic.table(350, 40.0, seed=5)
    begin_slow, begin_fast = (t.arrival_ns[t.after < 0] for t in (slow, fast))
    n = len(begin_slow)  # of conversations the beginnings are squeezed, their pauses stay
    assert begin_fast[:n] == pytest.approx(begin_slow / 40.0, abs=1)
    if text == RAG.text:
        assert rate_of(slow) == pytest.approx(1.0, rel=0.2)
        assert rate_of(fast) == pytest.approx(40.0, rel=0.2)
        assert (slow.prompt_tokens == fast.prompt_tokens[:200]).all()
        assert (slow.chunk_ids == fast.chunk_ids[: len(slow.chunk_ids)]).all()
    other = traffic.table(200, 1.0, seed=6)
    assert (slow.prompt_tokens != other.prompt_tokens).any() or (
        slow.chunk_ids != other.chunk_ids
    ).any()
    for table in (slow, fast, traffic.replace(shared=0.5).table(200, 1.0, 5)):
        table.check()


@pytest.mark.parametrize("rate", [1.0, 20.0])
@pytest.mark.parametrize("text", ["chat:", "chat:turns=10,think=60"])
def test_conversations_under_way_come_at_the_rate(text: str, rate: float):
    """Also where one lasts much longer than a run: what is judged comes after `ramp_s`."""
    chat = traffic_of(text)
    n_ramp = round(rate * chat.ramp_s)
    table = chat.table(n_ramp + 2400, rate, seed=1)
    at_s = np.sort(table.nominal_ns()) / 1e9
    judged = at_s[n_ramp:]
    assert judged[0] > chat.ramp_s and (np.diff(table.nominal_ns()) >= 0).all()
    assert len(judged) / np.ptp(judged) == pytest.approx(rate, rel=0.08)


def test_sharing_less_makes_more_different_chunks():
    for text in (RAG.text, "chat:systems=3"):
        different = [
            len(np.unique(traffic_of(text, shared=share).table(150, 1.0, 0).chunk_ids))
            for share in (1.0, 0.5, 0.0)
        ]
        assert different[0] < different[1] < different[2]


def test_a_trace_is_cut_into_windows_and_known_by_its_bytes(tmp_path: Path):
    path = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 100 * i, "input_length": 600 + i, "output_length": 5, "hash_ids": [i, i + 1]}
        for i in range(9000)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    traffic = traffic_of(str(path))
    assert traffic.rate_rps == pytest.approx(10.0, rel=1e-3) and len(traffic.digest) == 64
    starts = sorted(int(traffic.table(50, 2.0, seed).prompt_tokens[0]) for seed in range(5))
    gaps = np.diff([*starts, starts[0] + 9000])
    assert starts[0] == 600 and gaps.min() > 1200  # five windows, far apart
    late = traffic.table(9000, 2.0, 1)
    assert sorted(late.prompt_tokens.tolist()) == list(range(600, 9600))  # goes on at the beginning
    assert (np.diff(late.arrival_ns) > 0).all()
    before = traffic.before(50, 1)
    assert before is not None and traffic.before(50, 0) is None
    assert before.prompt_tokens[-1] + 1 == late.prompt_tokens[0]
    assert set(before.chunk_ids.tolist()) < set(late.chunk_ids.tolist())  # the same names
    assert rate_of(traffic.table(50, 2.0, 0)) == pytest.approx(2.0, rel=0.05)
    path.write_text(path.read_text().replace('"output_length": 5', '"output_length": 0', 1))
    with pytest.raises(WorkloadError, match="line 1"):
        traffic_of(str(path))


@pytest.mark.parametrize("kind", ["rag", "chat"])
def test_lengths_spread_around_their_mean(kind: str):
    even, wide = (
        traffic_of(f"{kind}:output=200,spread={cv}").table(4000, 1.0, 0).output_tokens
        for cv in (0, 1)
    )
    assert set(even.tolist()) == {200}
    assert wide.mean() == pytest.approx(200, rel=0.05)
    assert wide.std() == pytest.approx(200, rel=0.25)
    with pytest.raises(WorkloadError, match="cv: Input should be less than or equal to 10"):
        traffic_of(f"{kind}:spread=99")
