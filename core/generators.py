"""Workloads from a seed. Each purpose has its own random stream, so knobs do not disturb others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .arrivals import check_duration
from .chunk_index import content_id_of
from .errors import WorkloadError
from .rng import rng
from .units import s_to_ns
from .workload import Content, Request, Slo, Workload

Length = int | tuple[int, int]
"""A number of tokens, or the two ends of an even spread over whole numbers, both included."""


def rag_workload(
    name: str = "rag",
    seed: int = 0,
    *,
    n_requests: int = 100,
    n_contents: int = 200,
    chunk_tokens: Length = 512,
    chunks_per_request: int = 8,
    suffix_tokens: Length = 64,
    output_tokens: Length = 64,
    rate_rps: float | None = None,
    spacing_s: float = 0.0,
    zipf_a: float = 0.9,
    slo: Slo | None = None,
    vocab_size: int | None = None,
) -> Workload:
    """Questions over shared passages: each prompt holds some of them in random order.

    Args:
        name: of the workload.
        seed: root of the streams `arrivals`, `content`, `lengths` and `tokens`.
        n_requests: prompts.
        n_contents: passages in all.
        chunk_tokens: length of a passage, tokens.
        chunks_per_request: different passages in one prompt.
        suffix_tokens: length of the question, tokens.
        output_tokens: length of the answer, tokens.
        rate_rps: Poisson arrivals at this rate; None spaces them evenly.
        spacing_s: seconds between arrivals where `rate_rps` is None; 0 means all at once.
        zipf_a: passage number k (from 1) is drawn with weight k ** -zipf_a; 0 draws evenly.
        slo: service level of every request.
        vocab_size: makes token ids below it, so that the workload can be run for real.

    Raises:
        WorkloadError: a prompt needs more passages than there are, or a rate is not positive.
    """
    _check(n_requests, n_contents, chunks_per_request, rate_rps)
    lengths = rng(seed, "lengths")
    chunk_lengths = _draw(lengths, chunk_tokens, n_contents)
    suffixes = _draw(lengths, suffix_tokens, n_requests)
    outputs = _draw(lengths, output_tokens, n_requests)
    tokens = rng(seed, "tokens")
    contents: dict[str, Content] = {}
    for number, n_tokens in enumerate(chunk_lengths):
        ids = _token_ids(tokens, n_tokens, vocab_size)
        content_id = f"passage-{number:05d}" if ids is None else content_id_of(ids)
        contents[content_id] = Content(n_tokens=n_tokens, token_ids=ids)
    arrivals = _arrivals(seed, n_requests, rate_rps, spacing_s)
    prompts = _prompts(seed, list(contents), n_requests, chunks_per_request, zipf_a)
    longest = output_tokens if isinstance(output_tokens, int) else output_tokens[1]
    requests = tuple(
        Request(
            request_id=i,
            arrival_ns=arrivals[i],
            chunks=prompts[i],
            suffix_tokens=suffixes[i],
            suffix_ids=_token_ids(tokens, suffixes[i], vocab_size),
            max_output_tokens=longest,
            output_tokens=outputs[i],
            slo=slo,
        )
        for i in range(n_requests)
    )
    return Workload(name=name, contents=contents, requests=requests, seed=seed)


def _check(n_requests: int, n_contents: int, n_chunks: int, rate_rps: float | None) -> None:
    if n_requests < 1:
        raise WorkloadError("a workload must hold at least one request", values=str(n_requests))
    if not 0 <= n_chunks <= n_contents:
        raise WorkloadError(
            "chunks_per_request must not exceed n_contents",
            values=f"{n_chunks} and {n_contents}",
            remedy="ask for fewer chunks or make more contents",
        )
    if rate_rps is not None and not rate_rps > 0:  # nan too
        raise WorkloadError(
            "rate_rps must be positive", values=str(rate_rps), remedy="leave it out to space evenly"
        )


def _draw(generator: np.random.Generator, length: Length, n: int) -> list[int]:
    """`n` lengths; a fixed length draws nothing."""
    if isinstance(length, int):
        return [length] * n
    low, high = length
    return [int(v) for v in generator.integers(low, high, size=n, endpoint=True)]


def _token_ids(
    generator: np.random.Generator, n: int, vocab_size: int | None
) -> tuple[int, ...] | None:
    if vocab_size is None:
        return None
    return tuple(int(t) for t in generator.integers(0, vocab_size, size=n))


def _arrivals(seed: int, n: int, rate_rps: float | None, spacing_s: float) -> list[int]:
    """Integer nanoseconds; the first request comes after the first gap of a Poisson process."""
    if rate_rps is None:
        return [s_to_ns(i * spacing_s) for i in range(n)]
    gaps_s = rng(seed, "arrivals").exponential(1.0, size=n) / rate_rps
    times_s = np.cumsum(gaps_s)
    check_duration(times_s, rate_rps)
    return [s_to_ns(float(t)) for t in times_s]


def _prompts(
    seed: int, names: Sequence[str], n_requests: int, n_chunks: int, zipf_a: float
) -> list[tuple[str, ...]]:
    """Different passages by Zipf weight, then shuffled: the popular ones stand anywhere."""
    generator = rng(seed, "content")
    if not n_chunks:
        return [()] * n_requests
    weights = np.arange(1, len(names) + 1, dtype=np.float64) ** -zipf_a
    weights /= weights.sum()
    prompts = []
    for _ in range(n_requests):
        picked = generator.choice(len(names), size=n_chunks, replace=False, p=weights)
        prompts.append(tuple(names[int(i)] for i in generator.permutation(picked)))
    return prompts
