"""`Workload`: who asks for what, when. Requests are made of chunks that come back.

The file format is one JSON document: a table of contents (id -> length, optionally token ids)
and requests that name contents in order. Lengths are tokens, times integer nanoseconds.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from .chunk_index import content_id_of
from .errors import CacheTuneError, WorkloadError
from .model_spec import ModelSpec
from .record import Document, Record

TokenId = Annotated[int, Field(ge=0, lt=1 << 32)]
"""Any model's; `Workload.check_fits` holds it against one vocabulary."""


class Slo(Record):
    """Service level: a request is good if it meets both."""

    ttft_ms: float = Field(gt=0)
    tpot_ms: float = Field(gt=0)


class Content(Record):
    """One reusable piece of text. `token_ids` is needed only to run it for real."""

    n_tokens: int = Field(gt=0)
    token_ids: tuple[TokenId, ...] | None = None

    @model_validator(mode="after")
    def _check(self) -> Content:
        if self.token_ids is not None and len(self.token_ids) != self.n_tokens:
            raise ValueError(
                f"n_tokens must equal the number of token_ids, got {self.n_tokens} and "
                f"{len(self.token_ids)}"
            )
        return self


class Request(Record):
    """One prompt: chunks by content id, then a suffix that is always computed."""

    request_id: int = Field(ge=0)
    arrival_ns: int = Field(ge=0)
    chunks: tuple[str, ...]
    suffix_tokens: int = Field(gt=0)
    suffix_ids: tuple[TokenId, ...] | None = None
    max_output_tokens: int = Field(gt=0)
    output_tokens: int = Field(gt=0)
    """True length, for executors only: no policy reads it (INV-7)."""
    tenant: str = ""
    slo: Slo | None = None

    @model_validator(mode="after")
    def _check(self) -> Request:
        if self.output_tokens > self.max_output_tokens:
            raise ValueError(
                "output_tokens must not exceed max_output_tokens, got "
                f"{self.output_tokens} > {self.max_output_tokens}"
            )
        if self.suffix_ids is not None and len(self.suffix_ids) != self.suffix_tokens:
            raise ValueError(
                f"suffix_tokens must equal the number of suffix_ids, got {self.suffix_tokens} "
                f"and {len(self.suffix_ids)}"
            )
        return self


class Workload(Document):
    """Requests over a table of contents."""

    document: ClassVar[str] = "workload"
    version: ClassVar[int] = 1
    error: ClassVar[type[CacheTuneError]] = WorkloadError

    name: str
    contents: dict[str, Content]
    requests: tuple[Request, ...]
    seed: int | None = None

    @model_validator(mode="after")
    def _check(self) -> Workload:
        if not self.requests:
            raise ValueError("a workload must hold at least one request, got 0")
        ids = [r.request_id for r in self.requests]
        if len(set(ids)) != len(ids):
            twice = next(i for i, n in Counter(ids).items() if n > 1)
            raise ValueError(f"request ids must be unique, got {twice} twice")
        for request in self.requests:
            for content_id in request.chunks:
                if content_id not in self.contents:
                    raise ValueError(
                        f"request {request.request_id} names the content '{content_id}', "
                        "which the table of contents lacks"
                    )
        return self

    def chunk_tokens(self, request: Request) -> tuple[int, ...]:
        """Length of each chunk of `request`, tokens."""
        return tuple(self.contents[c].n_tokens for c in request.chunks)

    def prompt_tokens(self, request: Request) -> int:
        """Tokens of the whole prompt."""
        return sum(self.chunk_tokens(request)) + request.suffix_tokens

    def check_fits(self, model: ModelSpec) -> None:
        """Refuse requests longer than the model's context, and tokens it does not have.

        Raises:
            WorkloadError: names the first request or content that does not fit.
        """
        for request in self.requests:
            total = self.prompt_tokens(request) + request.max_output_tokens
            if total > model.max_position:
                raise WorkloadError(
                    "prompt and output must fit the model's context",
                    values=f"request {request.request_id}: {total} tokens, "
                    f"{model.name} has {model.max_position}",
                    remedy="shorten the request or use a model with a longer context",
                )
            _check_ids(request.suffix_ids, f"request {request.request_id}", model)
        for content_id, content in self.contents.items():
            _check_ids(content.token_ids, f"content '{content_id}'", model)

    def check_runnable(self, model: ModelSpec) -> None:
        """Refuse what cannot be run for real: `check_fits`, and token ids everywhere.

        Raises:
            WorkloadError: names the first request or content that does not fit or has none.
        """
        self.check_fits(model)
        names = [
            f"content '{c}' has no token_ids"
            for c, x in self.contents.items()
            if x.token_ids is None
        ]
        names += [
            f"request {r.request_id} has no suffix_ids"
            for r in self.requests
            if r.suffix_ids is None
        ]
        if names:
            raise WorkloadError(
                "a workload that is run for real needs token ids",
                values=names[0],
                remedy="add token_ids and suffix_ids, or simulate it",
            )

    def by_content(self) -> Workload:
        """Contents with token ids named by the hash of these, as chunk stores know them.

        Two names of one text become one content. Requests and lengths stay what they are.
        """
        names = {
            name: name if content.token_ids is None else content_id_of(content.token_ids)
            for name, content in self.contents.items()
        }
        if all(new == old for old, new in names.items()):
            return self
        return self.replace(
            contents={names[old]: content for old, content in self.contents.items()},
            requests=tuple(
                r.replace(chunks=tuple(names[c] for c in r.chunks)) for r in self.requests
            ),
        )


def _check_ids(token_ids: tuple[int, ...] | None, what: str, model: ModelSpec) -> None:
    if not token_ids:
        return
    low, high = min(token_ids), max(token_ids)
    if low < 0 or high >= model.vocab_size:
        raise WorkloadError(
            f"token ids must lie in 0..{model.vocab_size - 1}, the vocabulary of {model.name}",
            values=f"{low if low < 0 else high} in {what}",
            remedy="make the workload with this model's tokenizer",
        )
