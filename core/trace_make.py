"""Tables of requests from a seed: plain prompts, conversations, RAG over shared passages.

Columns are drawn whole, each purpose from its own stream: a million requests in seconds, and a
knob of one column leaves the others as they were.
"""

from __future__ import annotations

import math
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from .arrivals import Arrivals, with_arrivals
from .errors import WorkloadError
from .record import Record
from .request_table import TOKENS_MAX, RequestTable, renumbered
from .rng import rng
from .units import NS_PER_S

Ints = NDArray[np.int64]

REDRAWS = 3
"""Times a passage that a prompt has already is drawn again, before the rest is drawn exactly."""

PASSAGES_MAX = 10_000_000


class Lengths(Record):
    """Numbers of tokens: `mean` always, or log-normal around it.

    `cv` is the coefficient of variation before rounding and cutting: draws outside `low` to `high`
    are drawn again, which moves the mean of what remains.
    """

    mean: float = Field(ge=1, le=TOKENS_MAX)
    cv: float = Field(default=0.0, ge=0, le=10)
    low: int = Field(default=1, ge=1)
    high: int = Field(default=1 << 20, ge=1, le=TOKENS_MAX)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.low <= self.mean <= self.high:
            raise ValueError(
                f"mean lies from low to high, got {self.low}, {self.mean}, {self.high}"
            )
        return self

    def draw(self, stream: np.random.Generator, n: int) -> Ints:
        """`n` of them."""
        if not self.cv:
            return np.full(n, round(self.mean), np.int64)
        sigma = math.sqrt(math.log1p(self.cv**2))
        mu = math.log(self.mean) - sigma**2 / 2
        found = np.rint(stream.lognormal(mu, sigma, size=n))
        while len(outside := np.flatnonzero((found < self.low) | (found > self.high))):
            found[outside] = np.rint(stream.lognormal(mu, sigma, size=len(outside)))
        return found.astype(np.int64)


def plain_table(
    n: int, arrivals: Arrivals, prompt: Lengths, output: Lengths, seed: int = 0
) -> RequestTable:
    """Requests that share nothing."""
    _check_count(n, "requests")
    table = _table(
        "plain",
        prompt=prompt.draw(rng(seed, "prompt"), n),
        output=output.draw(rng(seed, "output"), n),
        starts=np.zeros(n + 1, np.int64),
        ids=np.zeros(0, np.int64),
        chunk_tokens=np.zeros(0, np.int64),
        said=_said(prompt=prompt, output=output),
    )
    return with_arrivals(table, arrivals, seed)


def rag_table(
    n: int,
    arrivals: Arrivals,
    *,
    passages: int = 10_000,
    per_request: int = 8,
    passage: Lengths | None = None,
    question: Lengths | None = None,
    output: Lengths | None = None,
    zipf_a: float = 0.9,
    sharing: float = 1.0,
    seed: int = 0,
) -> RequestTable:
    """Questions over passages in random order; ids name contents.

    Args:
        n: requests.
        arrivals: when they come.
        passages: of the common pool.
        per_request: different passages of one prompt.
        passage, question, output: lengths; 512, 64 and 128 tokens.
        zipf_a: passage k of the pool (from 1) has weight k ** -zipf_a.
        sharing: chance that a place holds a passage of the pool, not one that nobody else asks
            for. Places that stay in the pool hold the same passage at any value.
        seed: root of the streams `passage`, `sharing`, `order`, `lengths`, `question`, `output`.

    Raises:
        WorkloadError: more different passages in a prompt than there are, a share beyond 0 to 1.
    """
    _check_count(n, "requests")
    if not 0 <= per_request <= passages <= PASSAGES_MAX or passages < 1:
        raise WorkloadError(
            f"a prompt holds different passages of a pool of at most {PASSAGES_MAX}",
            values=f"{per_request} of {passages}",
            remedy="ask for fewer, or make the pool larger",
        )
    if not 0 <= sharing <= 1 or not 0 <= zipf_a <= 4:
        raise WorkloadError(
            "sharing is from 0 to 1, zipf_a from 0 to 4", values=f"{sharing} and {zipf_a}"
        )
    passage, question = passage or Lengths(mean=512), question or Lengths(mean=64)
    output = output or Lengths(mean=128)
    picked = _different(rng(seed, "passage"), n, per_request, passages, zipf_a).T
    chance = rng(seed, "sharing").random((per_request, n)).T
    private = chance >= sharing
    n_private = int(private.sum())
    picked[private] = passages + np.arange(n_private)
    picked = rng(seed, "order").permuted(picked, axis=1)
    common = passage.draw(rng(seed, "lengths"), passages)
    lengths = np.append(common, passage.draw(rng(seed, "lengths", "private"), n_private))
    table = _table(
        "rag",
        prompt=lengths[picked].sum(axis=1) + question.draw(rng(seed, "question"), n),
        output=output.draw(rng(seed, "output"), n),
        starts=np.arange(n + 1, dtype=np.int64) * per_request,
        ids=picked.ravel(),
        chunk_tokens=lengths,
        said=_said(
            passages=passages,
            per_request=per_request,
            passage=passage,
            question=question,
            output=output,
            zipf_a=zipf_a,
            sharing=sharing,
        ),
    )
    return with_arrivals(table, arrivals, seed)


def chat_table(
    n_sessions: int,
    arrivals: Arrivals,
    *,
    turns: Lengths | None = None,
    system: Lengths | None = None,
    systems: int = 1,
    message: Lengths | None = None,
    answer: Lengths | None = None,
    think_s: float = 30.0,
    seed: int = 0,
) -> RequestTable:
    """Conversations: each turn sends all that was said before and a new message; ids are chains.

    Args:
        n_sessions: conversations; their first turns come by `arrivals`.
        arrivals: when conversations begin.
        turns: of a conversation; 5.
        system: length of a system prompt, 1000 tokens.
        systems: different ones, drawn evenly.
        message, answer: lengths; 100 and 300 tokens.
        think_s: mean of the exponential pause between an answer and the next message.
        seed: root of the streams `turns`, `system`, `message`, `answer`, `think`.

    Raises:
        WorkloadError: no conversation, no system prompt, a negative pause, too long a prompt.
    """
    _check_count(n_sessions, "conversations")
    _check_count(systems, "system prompts")
    if not 0 <= think_s < 1e8:
        raise WorkloadError("a pause is from 0 to 1e8 seconds", values=f"think_s={think_s}")
    turns, system = turns or Lengths(mean=5), system or Lengths(mean=1000)
    message, answer = message or Lengths(mean=100), answer or Lengths(mean=300)
    n_turns = turns.draw(rng(seed, "turns"), n_sessions)
    session = np.repeat(np.arange(n_sessions), n_turns)
    n = len(session)
    begin = np.cumsum(n_turns) - n_turns
    turn = np.arange(n) - begin[session]
    messages = message.draw(rng(seed, "message"), n)
    answers = answer.draw(rng(seed, "answer"), n)
    # Chunks: the system prompts; then of each conversation message, answer, message, answer, …
    systems_tokens = system.draw(rng(seed, "system", "lengths"), systems)
    chunk_tokens = np.append(systems_tokens, np.stack((messages, answers), axis=1))
    chosen = rng(seed, "system").integers(systems, size=n_sessions)
    starts, ids = _growing(turn, chosen[session], systems + 2 * begin[session])
    sums = np.append(0, np.cumsum(chunk_tokens[ids]))
    first = turn == 0
    pauses_s = np.where(first, 0.0, rng(seed, "think").exponential(think_s, size=n))
    table = _table(
        "chat",
        prompt=np.diff(sums[starts]),
        output=answers,
        starts=starts,
        ids=ids,
        chunk_tokens=chunk_tokens,
        said=_said(
            turns=turns,
            system=system,
            systems=systems,
            message=message,
            answer=answer,
            think_s=think_s,
        ),
        after=np.where(first, -1, np.arange(n) - 1),
        arrival_ns=np.rint(pauses_s * NS_PER_S).astype(np.int64),
        chained=True,
    )
    table = with_arrivals(table, arrivals, seed)
    return table.take(np.argsort(table.nominal_ns(), kind="stable"))


def _growing(turn: Ints, system: Ints, first: Ints) -> tuple[Ints, Ints]:
    """(starts, chunk ids) of rows that hold a system prompt and what was said up to `turn`."""
    counts = 2 * turn + 2
    starts = np.append(0, np.cumsum(counts))
    places = np.arange(starts[-1]) - np.repeat(starts[:-1], counts)
    ids = places - 1 + np.repeat(first, counts)
    ids[starts[:-1]] = system
    return starts, ids


def _different(
    stream: np.random.Generator, n: int, k: int, pool: int, zipf_a: float
) -> NDArray[np.int64]:
    """`k` different numbers below `pool` for each of `n` prompts, [k, n], by Zipf weight.

    The first k different draws of an endless row of draws, as drawing without replacement does.
    """
    weights = np.arange(pool, 0, -1, dtype=np.float64) ** -zipf_a  # the rarest first: small sums
    ends = np.cumsum(weights)
    found = np.empty((k, n), np.int64)
    for place in range(k):
        found[place] = np.searchsorted(ends, stream.random(n) * ends[-1], side="right")
        left = np.arange(n)
        for _ in range(REDRAWS if place else 0):
            left = left[(found[:place, left] == found[place, left]).any(axis=0)]
            draws = stream.random(len(left)) * ends[-1]
            found[place, left] = np.searchsorted(ends, draws, side="right")
        left = left[(found[:place, left] == found[place, left]).any(axis=0)]
        found[place, left] = _another(stream, found[:place, left], weights, ends)
    return pool - 1 - found


def _another(
    stream: np.random.Generator,
    taken: NDArray[np.int64],
    weights: NDArray[np.float64],
    ends: NDArray[np.float64],
) -> NDArray[np.int64]:
    """One number per column that `taken` does not hold: a draw from what they leave, moved past
    each of them."""
    taken = np.sort(taken, axis=0)
    total = ends[-1] - weights[taken].sum(axis=0)
    draws = stream.random(taken.shape[1]) * np.maximum(total, 0)
    for row in taken:
        draws = np.where(draws >= ends[row] - weights[row], draws + weights[row], draws)
    found: Ints = np.minimum(np.searchsorted(ends, draws, side="right"), len(ends) - 1)
    return found


def _table(
    name: str,
    *,
    prompt: Ints,
    output: Ints,
    starts: Ints,
    ids: Ints,
    chunk_tokens: Ints,
    said: dict[str, str],
    after: Ints | None = None,
    arrival_ns: Ints | None = None,
    chained: bool = False,
) -> RequestTable:
    n = len(prompt)
    if prompt.max() > TOKENS_MAX or len(chunk_tokens) > TOKENS_MAX:
        raise WorkloadError(
            f"a prompt has at most {TOKENS_MAX} tokens",
            values=str(int(prompt.max())),
            remedy="ask for fewer or shorter pieces",
        )
    used, numbers = renumbered(ids, len(chunk_tokens))
    return RequestTable(
        name=name,
        arrival_ns=np.zeros(n, np.int64) if arrival_ns is None else arrival_ns,
        prompt_tokens=prompt.astype(np.int32),
        output_tokens=output.astype(np.int32),
        chunk_start=starts,
        chunk_ids=numbers,
        chunk_tokens=chunk_tokens[used].astype(np.int32),
        after=np.full(n, -1, np.int32) if after is None else after.astype(np.int32),
        tenant=np.zeros(n, np.int16),
        slo_class=np.zeros(n, np.int16),
        chained=chained,
        provenance={"made": name, **said},
    )


def _check_count(n: int, what: str) -> None:
    if n < 1:
        raise WorkloadError(f"a workload has at least one of its {what}", values=str(n))


def _said(**knobs: Lengths | float) -> dict[str, str]:
    """Knobs as provenance: lengths as MEAN or MEAN:CV."""
    said = {}
    for name, knob in knobs.items():
        if isinstance(knob, Lengths):
            said[name] = f"{knob.mean:g}:{knob.cv:g}" if knob.cv else f"{knob.mean:g}"
        else:
            said[name] = f"{knob:g}"
    return said
