"""Made tables: shape, sharing, laws of their draws, streams that do not disturb each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cachetune.core.arrivals import Arrivals
from cachetune.core.errors import WorkloadError
from cachetune.core.request_table import RequestTable
from cachetune.core.trace_make import Lengths, chat_table, plain_table, rag_table
from cachetune.core.trace_stats import reuse_ceiling
from pydantic import ValidationError

RATE = Arrivals(rate_rps=2.0)


def rag(n: int = 500, **changes: Any) -> RequestTable:
    table = rag_table(n, RATE, **{"passages": 100, "per_request": 5, "seed": 1, **changes})
    table.check()
    return table


def columns(table: RequestTable) -> list[np.ndarray]:
    return [table.arrival_ns, table.prompt_tokens, table.chunk_ids, table.chunk_tokens]


def test_same_seed_same_columns():
    for make in (
        lambda seed: rag(seed=seed),
        lambda seed: chat_table(30, RATE, seed=seed),
        lambda seed: plain_table(30, RATE, Lengths(mean=9, cv=1), Lengths(mean=9), seed),
    ):
        one, two = make(1), make(1)
        assert all((a == b).all() for a, b in zip(columns(one), columns(two), strict=True))
        assert (make(2).arrival_ns != one.arrival_ns).any()


def test_a_knob_leaves_the_other_columns():
    one, two = rag(), rag(passage=Lengths(mean=300, cv=0.4))
    assert (one.chunk_ids == two.chunk_ids).all() and (one.arrival_ns == two.arrival_ns).all()
    three = rag(question=Lengths(mean=9))
    assert (one.chunk_ids == three.chunk_ids).all()


@pytest.mark.parametrize("zipf_a", [0.0, 0.9, 4.0])
def test_prompts_hold_different_passages(zipf_a: float):
    for knobs in ({}, {"passages": 5}, {"passages": 1, "per_request": 1}):
        table = rag(200, zipf_a=zipf_a, **knobs)
        for row in range(len(table)):
            ids = table.chunks_of(row)
            assert len(set(ids.tolist())) == len(ids)


def test_passages_are_drawn_as_without_replacement():
    """Against numpy's own draw, which renormalises after each passage."""
    weights = np.arange(1, 7.0) ** -1.5
    weights /= weights.sum()
    n = 40_000
    table = rag_table(n, RATE, passages=6, per_request=3, zipf_a=1.5)
    uses = np.bincount(table.chunk_ids, minlength=6) / n
    stream = np.random.Generator(np.random.PCG64(0))
    exact = np.zeros(6)
    for _ in range(20_000):
        exact[stream.choice(6, size=3, replace=False, p=weights)] += 1 / 20_000
    np.testing.assert_allclose(uses, exact, atol=0.015)


def test_popular_passages_stand_anywhere():
    table = rag(4000, zipf_a=1.2)
    first = int(np.bincount(table.chunk_ids).argmax())
    places = np.flatnonzero(table.chunk_ids == first) % 5
    assert np.bincount(places, minlength=5).min() > 0.17 * len(places)


def test_sharing_is_the_share_of_common_passages():
    ceilings = []
    for sharing in (1.0, 0.5, 0.0):
        table = rag(2000, sharing=sharing)
        uses = np.bincount(table.chunk_ids)[table.chunk_ids]
        assert (uses > 1).mean() == pytest.approx(sharing, abs=0.03)
        ceilings.append(reuse_ceiling(table))
    assert ceilings[1] == pytest.approx(ceilings[0] / 2, rel=0.06) and ceilings[2] == 0.0


def test_no_passages():
    table = rag(10, per_request=0)
    assert not len(table.chunk_ids) and (table.prompt_tokens == 64).all()


def test_a_conversation_repeats_what_was_said():
    table = chat_table(
        40, RATE, turns=Lengths(mean=4, cv=0.5), message=Lengths(mean=90, cv=0.5), systems=3
    )
    table.check()
    assert table.chained and (np.diff(table.nominal_ns()) >= 0).all()
    for row in range(len(table)):
        before = int(table.after[row])
        ids = table.chunks_of(row).tolist()
        assert table.prompt_tokens[row] == table.chunk_tokens[ids].sum()
        if before < 0:
            assert len(ids) == 2
            continue
        assert ids[:-2] == table.chunks_of(before).tolist()
        assert table.chunk_tokens[ids[-2]] == table.output_tokens[before], "its answer"
    firsts = {int(table.chunks_of(r)[0]) for r in range(len(table))}
    assert len(firsts) == 3


def test_lengths():
    stream = np.random.Generator(np.random.PCG64(0))
    found = Lengths(mean=500, cv=0.8, high=100_000).draw(stream, 100_000)
    assert found.mean() == pytest.approx(500, rel=0.02)
    assert found.std() / found.mean() == pytest.approx(0.8, rel=0.05)
    cut = Lengths(mean=500, cv=2.0, low=100, high=900).draw(stream, 10_000)
    assert cut.min() >= 100 and cut.max() <= 900 and len(set(cut.tolist())) > 100
    assert Lengths(mean=7).draw(stream, 3).tolist() == [7, 7, 7]
    for knobs in ({"mean": 0}, {"mean": 5, "low": 6}, {"mean": float("nan")}, {"mean": 1 << 31}):
        with pytest.raises(ValidationError):
            Lengths(**knobs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "knobs",
    [{"n": 0}, {"per_request": 101}, {"passages": 0}, {"sharing": 1.5}, {"zipf_a": float("nan")}],
)
def test_refused(knobs: dict[str, Any]):
    with pytest.raises(WorkloadError):
        rag(**knobs)
    for change in ({"n_sessions": 0}, {"systems": 0}, {"think_s": -1.0}):
        with pytest.raises(WorkloadError):
            chat_table(**{"n_sessions": 2, "arrivals": RATE, **change})
