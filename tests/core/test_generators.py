"""Generated workloads: shape, sharing, determinism, streams that do not disturb each other."""

from __future__ import annotations

from collections import Counter

import pytest
from cachetune.core.chunk_index import content_id_of
from cachetune.core.errors import WorkloadError
from cachetune.core.generators import rag_workload
from cachetune.core.workload import Workload


def small(**changes: object) -> Workload:
    knobs: dict[str, object] = dict(n_requests=50, n_contents=20, chunks_per_request=4)
    return rag_workload("w", **{"seed": 3, **knobs, **changes})  # type: ignore[arg-type]


def test_same_seed_same_bytes():
    knobs: dict[str, object] = dict(chunk_tokens=(10, 90), output_tokens=(1, 9), rate_rps=5.0)
    assert small(**knobs).to_json() == small(**knobs).to_json()
    assert small(**knobs).to_json() != small(**knobs, seed=4).to_json()


def test_prompts_hold_different_passages():
    for request in small().requests:
        assert len(set(request.chunks)) == 4


def test_popular_passages_stand_anywhere():
    workload = small(n_requests=400, zipf_a=1.2)
    first = next(iter(workload.contents))
    places = Counter(r.chunks.index(first) for r in workload.requests if first in r.chunks)
    assert set(places) == {0, 1, 2, 3}
    assert min(places.values()) > 0.15 * sum(places.values())
    uses = Counter(c for r in workload.requests for c in r.chunks)
    assert uses[first] > 3 * uses[list(workload.contents)[-1]]


def test_lengths_stay_in_their_range():
    workload = small(chunk_tokens=(10, 12), suffix_tokens=(3, 5), output_tokens=(1, 4))
    assert {c.n_tokens for c in workload.contents.values()} == {10, 11, 12}
    assert {r.suffix_tokens for r in workload.requests} == {3, 4, 5}
    assert {r.output_tokens for r in workload.requests} == {1, 2, 3, 4}
    assert {r.max_output_tokens for r in workload.requests} == {4}


def test_poisson_arrivals_keep_the_rate():
    workload = small(n_requests=2000, rate_rps=8.0)
    arrivals = [r.arrival_ns for r in workload.requests]
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] / 1e9 == pytest.approx(2000 / 8.0, rel=0.1)


def test_without_a_rate_arrivals_are_evenly_spaced():
    assert [r.arrival_ns for r in small(n_requests=3).requests] == [0, 0, 0]
    spaced = small(n_requests=3, spacing_s=0.5)
    assert [r.arrival_ns for r in spaced.requests] == [0, 500_000_000, 1_000_000_000]


def test_one_knob_moves_one_stream():
    """Another rate or length leaves every prompt as it was (common random numbers)."""
    plain = [r.chunks for r in small().requests]
    assert [r.chunks for r in small(rate_rps=2.0, suffix_tokens=(1, 9)).requests] == plain
    slow, fast = small(rate_rps=1.0), small(rate_rps=2.0, zipf_a=0.1, output_tokens=(1, 9))
    for a, b in zip(slow.requests, fast.requests, strict=True):
        assert a.arrival_ns == pytest.approx(2 * b.arrival_ns, abs=2)


def test_token_ids_make_it_runnable():
    workload = small(vocab_size=50, chunk_tokens=(5, 9), suffix_tokens=4)
    for content_id, content in workload.contents.items():
        assert content.token_ids is not None and max(content.token_ids) < 50
        assert content_id == content_id_of(content.token_ids)
    assert all(len(r.suffix_ids or ()) == 4 for r in workload.requests)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"chunks_per_request": 21}, "must not exceed n_contents, got 21 and 20"),
        ({"rate_rps": 0.0}, "rate_rps must be positive"),
        ({"n_requests": 0}, "at least one request"),
    ],
)
def test_errors_name_the_knob(knobs: dict[str, object], message: str):
    with pytest.raises(WorkloadError, match=message):
        small(**knobs)
