"""Requests as columns: what long traces are, where a `Workload` of records would be too heavy.

A prompt is a row of chunks by id, then tokens that no chunk holds (the question). Ids are dense:
chunk `i` has `chunk_tokens[i]` tokens. With `chained` an id also stands for everything before it
(vLLM's and Mooncake's block hashes): then reuse is by prefix and exact. Without, an id names the
content alone, and a chunk may return at any position.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import WorkloadError


@dataclass(frozen=True)
class RequestTable:
    """Columns of equal length n, in order of arrival; `tenants` and `classes` name the codes.

    Attributes:
        arrival_ns: int64; for a row with `after` >= 0 the pause between the end of that row and
            this arrival instead (closed loops, turns of a conversation).
        prompt_tokens, output_tokens: int32, at least 1.
        chunk_start: int64 [n + 1]; row i holds `chunk_ids[chunk_start[i]:chunk_start[i + 1]]`.
        chunk_ids: int32, dense from 0.
        chunk_tokens: int32 [number of chunks].
        after: int32, row that must end first, -1 for none; always an earlier row.
        tenant, slo_class: int16 codes.
    """

    name: str
    arrival_ns: NDArray[np.int64]
    prompt_tokens: NDArray[np.int32]
    output_tokens: NDArray[np.int32]
    chunk_start: NDArray[np.int64]
    chunk_ids: NDArray[np.int32]
    chunk_tokens: NDArray[np.int32]
    after: NDArray[np.int32]
    tenant: NDArray[np.int16]
    slo_class: NDArray[np.int16]
    chained: bool = False
    tenants: tuple[str, ...] = ("",)
    classes: tuple[str, ...] = ("",)
    provenance: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.arrival_ns)

    def chunks_of(self, row: int) -> NDArray[np.int32]:
        """Chunk ids of one row, in the order of the prompt."""
        return self.chunk_ids[self.chunk_start[row] : self.chunk_start[row + 1]]

    def check(self) -> None:
        """Every rule above.

        Raises:
            WorkloadError: the rule, the row and its value.
        """
        n = len(self)
        if n == 0:
            raise WorkloadError("a table holds at least one request", remedy="check the filters")
        for what in ("prompt_tokens", "output_tokens"):
            column = getattr(self, what)
            _rule(column >= 1, column, f"{what} is at least 1")
        timed = self.arrival_ns[self.after < 0]
        _rule(np.diff(timed, prepend=timed[:1]) >= 0, timed, "arrivals do not run backwards")
        _rule(self.after < np.arange(n), self.after, "a request follows an earlier one")
        _rule(self.chunk_ids >= 0, self.chunk_ids, "chunk ids are not negative")
        known = len(self.chunk_tokens)
        _rule(self.chunk_ids < known, self.chunk_ids, f"chunk ids are below {known}")
        lengths = np.zeros(n + 1, np.int64)
        np.cumsum(
            np.add.reduceat(
                np.append(self.chunk_tokens[self.chunk_ids].astype(np.int64), 0),
                self.chunk_start[:-1],
            )
            * (np.diff(self.chunk_start) > 0),
            out=lengths[1:],
        )
        _rule(
            np.diff(lengths) <= self.prompt_tokens,
            self.prompt_tokens,
            "the chunks of a prompt fit into it",
        )


def _rule(holds: NDArray[np.bool_], column: NDArray[Any], rule: str) -> None:
    if not holds.all():
        row = int(np.argmin(holds))
        raise WorkloadError(
            rule, values=f"{column[row]} in row {row}", remedy="correct or drop this request"
        )
