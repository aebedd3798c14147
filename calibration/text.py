"""Passages and questions of real text, in tokens of the tokenizer the project ships.

No network and no data set: the text is the documentation inside the standard library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.chunk_index import content_id_of
from ..core.errors import WorkloadError
from ..core.generators import rag_workload
from ..core.rng import rng
from ..core.workload import Content, Slo, Workload
from .corpus import Docstring, docstrings_of, source_files

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_FILE = Path(__file__).parent / "text" / "tokenizer.json"
END_OF_TEXT = "<|end|>"


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of documentation of an exact length, and what it documents."""

    title: str
    token_ids: tuple[int, ...]
    subjects: tuple[Docstring, ...]
    """Docstrings that begin inside it, never empty."""


@cache
def load_tokenizer() -> Tokenizer:
    """The shipped byte-level BPE: 4,096 tokens, any text survives a round trip."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(TOKENIZER_FILE))


def passages(
    tokenizer: Tokenizer, n_tokens: int, n_passages: int, seed: int
) -> tuple[Passage, ...]:
    """`n_passages` different passages of exactly `n_tokens` tokens.

    Modules are taken in an order drawn from `seed`; the text of each is cut without overlap, and
    a passage begins where a docstring begins. What is left at the end of a module is dropped.

    Raises:
        WorkloadError: the standard library does not hold that much text.
    """
    if n_tokens < 1 or n_passages < 1:
        raise WorkloadError(
            "n_tokens and n_passages must be at least 1", values=f"{n_tokens} and {n_passages}"
        )
    files = source_files()
    found: list[Passage] = []
    for i in rng(seed, "passages").permutation(len(files)):
        found += _cut(tokenizer, docstrings_of(*files[i]), n_tokens)
        if len(found) >= n_passages:
            return tuple(found[:n_passages])
    raise WorkloadError(
        "the standard library must hold the passages that are asked for",
        values=f"{n_passages} of {n_tokens} tokens, it has {len(found)}",
        remedy="ask for fewer or shorter passages",
    )


def questions(
    passages_: Sequence[Passage], n_questions: int, seed: int
) -> tuple[tuple[int, str], ...]:
    """(index of a passage, a short question about something documented in it)."""
    draw = rng(seed, "questions")
    asked = []
    for _ in range(n_questions):
        index = int(draw.integers(len(passages_)))
        subjects = passages_[index].subjects
        asked.append((index, question(subjects[int(draw.integers(len(subjects)))])))
    return tuple(asked)


def rag_requests(
    seed: int,
    passages_: Sequence[Passage],
    tokenizer: Tokenizer,
    *,
    n_requests: int,
    chunks_per_request: int,
    zipf_a: float = 0.9,
    output_tokens: int = 16,
    rate_rps: float | None = None,
    spacing_s: float = 0.0,
    slo: Slo | None = None,
    name: str = "stdlib",
) -> Workload:
    """Questions over passages, with token ids: what RAG sends, each about one of its passages.

    Which passages meet, in which order and when, is `core.generators.rag_workload`'s draw.

    Raises:
        WorkloadError: more chunks in a request than there are passages, or two equal passages.
    """
    abstract = rag_workload(
        name,
        seed,
        n_requests=n_requests,
        n_contents=len(passages_),
        chunk_tokens=1,
        suffix_tokens=1,
        chunks_per_request=chunks_per_request,
        output_tokens=output_tokens,
        rate_rps=rate_rps,
        spacing_s=spacing_s,
        zipf_a=zipf_a,
        slo=slo,
    )
    real = dict(zip(abstract.contents, passages_, strict=True))
    contents = {
        content_id_of(p.token_ids): Content(n_tokens=len(p.token_ids), token_ids=p.token_ids)
        for p in passages_
    }
    if len(contents) != len(passages_):
        raise WorkloadError(
            "passages must differ", values=f"{len(contents)} different ones of {len(passages_)}"
        )
    draw = rng(seed, "questions")
    requests = []
    for request in abstract.requests:
        asked = [real[c] for c in request.chunks] or list(passages_)
        subjects = asked[int(draw.integers(len(asked)))].subjects
        text = question(subjects[int(draw.integers(len(subjects)))])
        suffix = tuple(tokenizer.encode(text).ids)
        chunks = tuple(content_id_of(real[c].token_ids) for c in request.chunks)
        requests.append(
            request.replace(chunks=chunks, suffix_tokens=len(suffix), suffix_ids=suffix)
        )
    return Workload(name=name, contents=contents, requests=tuple(requests), seed=seed)


def question(subject: Docstring) -> str:
    """The question that a docstring answers."""
    if not subject.name:
        return f"\n\nWhat is the module {subject.module} for?\n"
    last = subject.name.rsplit(".", 1)[-1]
    verb = "represent" if last[:1].isupper() else "do"
    return f"\n\nWhat does {subject.name} of the module {subject.module} {verb}?\n"


def _cut(tokenizer: Tokenizer, documents: Sequence[Docstring], n_tokens: int) -> list[Passage]:
    """Consecutive docstrings of one module, joined until they fill a passage."""
    cut: list[Passage] = []
    ids: list[int] = []
    subjects: list[Docstring] = []
    for document in documents:
        ids += tokenizer.encode(f"{document.title}\n\n{document.text}\n\n").ids
        subjects.append(document)
        if len(ids) >= n_tokens:
            cut.append(Passage(subjects[0].title, tuple(ids[:n_tokens]), tuple(subjects)))
            ids, subjects = [], []
    return cut
