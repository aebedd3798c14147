"""Requests as columns: what long traces are, where a `Workload` of records would be too heavy.

A prompt is a row of chunks by id, then tokens that no chunk holds (the question). Ids are dense:
chunk `i` has `chunk_tokens[i]` tokens. With `chained` an id also stands for everything before it
(vLLM's and Mooncake's block hashes): then reuse is by prefix and exact. Without, an id names the
content alone, and a chunk may return at any position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import WorkloadError
from .units import NS_PER_S

TOKENS_MAX = (1 << 31) - 1
LAST_NS = 1 << 62
"""146 years: sums of two times do not overflow."""
"""Lengths are int32."""


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
        chunk_names: what the file called each chunk; None where the number is all there is.
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
    chunk_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.arrival_ns)

    def chunks_of(self, row: int) -> NDArray[np.int32]:
        """Chunk ids of one row, in the order of the prompt."""
        return self.chunk_ids[self.chunk_start[row] : self.chunk_start[row + 1]]

    def rows_of_chunks(self) -> NDArray[np.int64]:
        """The row of each entry of `chunk_ids`."""
        return np.repeat(np.arange(len(self)), np.diff(self.chunk_start))

    def chunk_name(self, chunk: int) -> str:
        """What files call this chunk."""
        return str(chunk) if self.chunk_names is None else self.chunk_names[chunk]

    def take(self, rows: NDArray[np.int64], **provenance: str) -> RequestTable:
        """These rows, in this order; chunks that none of them has are forgotten.

        Args:
            rows: none twice, and none before the one it follows.
            provenance: what is to be said of it.

        Raises:
            WorkloadError: a row follows one that is not taken, or none is taken.
        """
        if len(rows) == 0:
            raise WorkloadError("a table holds at least one request", remedy="check the filters")
        counts = np.diff(self.chunk_start)[rows]
        starts = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(counts, out=starts[1:])
        picked = np.arange(starts[-1]) + np.repeat(self.chunk_start[rows] - starts[:-1], counts)
        used, ids = renumbered(self.chunk_ids[picked], len(self.chunk_tokens))
        names = self.chunk_names
        return replace(
            self,
            arrival_ns=self.arrival_ns[rows],
            prompt_tokens=self.prompt_tokens[rows],
            output_tokens=self.output_tokens[rows],
            chunk_start=starts,
            chunk_ids=ids,
            chunk_tokens=self.chunk_tokens[used],
            after=self._moved(rows),
            tenant=self.tenant[rows],
            slo_class=self.slo_class[rows],
            chunk_names=None if names is None else tuple(names[i] for i in used),
            provenance={**self.provenance, **provenance},
        )

    def _moved(self, rows: NDArray[np.int64]) -> NDArray[np.int32]:
        place = np.full(len(self), -1, np.int32)
        place[rows] = np.arange(len(rows))
        before = self.after[rows]
        moved = np.where(before < 0, np.int32(-1), place[before])
        lost = np.flatnonzero((before >= 0) & (moved < 0))
        if len(lost):
            row = int(rows[lost[0]])
            raise WorkloadError(
                "a request is kept together with the one it follows",
                values=f"row {row} follows row {int(self.after[row])}, which is left out",
                remedy="leave out both, or correct the one that is left out",
            )
        return moved.astype(np.int32)

    def scaled(self, rate: float) -> RequestTable:
        """The same requests, arriving `rate` times as often; pauses of users stay as they are.

        Raises:
            WorkloadError: `rate` is not a positive number, or so small that times overflow.
        """
        if not 0 < rate < float("inf"):
            raise WorkloadError("a rate is scaled by a positive number", values=str(rate))
        begins = self.after < 0
        times = np.where(begins, self.arrival_ns / rate, 0.0)
        if times.max() >= LAST_NS:
            raise WorkloadError(
                "arrivals are within 146 years of 0",
                values=f"the last at {times.max() / NS_PER_S:.3g} s, at {rate:g} times the rate",
                remedy="scale the rate by a larger number",
            )
        return replace(
            self,
            arrival_ns=np.where(begins, np.rint(times).astype(np.int64), self.arrival_ns),
            provenance={**self.provenance, "scale_rate": f"{rate:g}"},
        )

    def nominal_ns(self) -> NDArray[np.int64]:
        """The earliest each request may arrive: its pause after the arrival of the one before."""
        return self._from_roots()[0]

    def roots(self) -> NDArray[np.int64]:
        """The row each conversation, or user, began with."""
        return self._from_roots()[1]

    def _from_roots(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(sum of times, first row) along `after`, in log(longest) rounds of pointer jumping."""
        sums = self.arrival_ns.copy()
        roots = np.arange(len(self))
        before = self.after.astype(np.int64)
        while len(rows := np.flatnonzero(before >= 0)):
            jump = before[rows]
            sums[rows] += sums[jump]
            roots[rows] = roots[jump]
            before[rows] = before[jump]
        return sums, roots

    def duration_s(self) -> float:
        """From the first arrival to the last that may be, seconds."""
        nominal = self.nominal_ns()
        return float(nominal.max() - nominal.min()) / NS_PER_S

    def check(self, rows: Sequence[int] | NDArray[np.int64] | None = None) -> None:
        """Every rule above.

        Args:
            rows: what to call the rows in messages, such as lines of a file.

        Raises:
            WorkloadError: the rule, the row and its value.
        """
        n = len(self)
        if n == 0:
            raise WorkloadError("a table holds at least one request", remedy="check the filters")
        self._check_shape(n)

        def rule(holds: NDArray[np.bool_], column: NDArray[Any], text: str) -> None:
            if not holds.all():
                row = int(np.argmin(holds))
                raise WorkloadError(
                    text,
                    values=f"{column[row]} in row {row if rows is None else rows[row]}",
                    remedy="correct or drop this request",
                )

        rule(self.prompt_tokens >= 1, self.prompt_tokens, "prompt_tokens is at least 1")
        rule(self.output_tokens >= 1, self.output_tokens, "output_tokens is at least 1")
        free = self.after < 0
        rule(self.after < np.arange(n), self.after, "a request follows an earlier one")
        rule(free | (self.arrival_ns >= 0), self.arrival_ns, "a pause is not negative")
        before = np.maximum.accumulate(np.where(free, self.arrival_ns, self.arrival_ns.min()))
        rule(~free | (self.arrival_ns >= before), self.arrival_ns, "arrivals do not run backwards")
        for codes, names, what in (
            (self.tenant, self.tenants, "tenant"),
            (self.slo_class, self.classes, "slo_class"),
        ):
            rule((codes >= 0) & (codes < len(names)), codes, f"{what} is below {len(names)}")
        lengths = np.zeros(len(self.chunk_ids) + 1, np.int64)
        np.cumsum(self.chunk_tokens[self.chunk_ids], dtype=np.int64, out=lengths[1:])
        held = np.diff(lengths[self.chunk_start])
        rule(held <= self.prompt_tokens, held, "the chunks of a prompt fit into it")

    def _check_shape(self, n: int) -> None:
        """Columns as long as each other, chunk ids that exist."""
        known = len(self.chunk_tokens)
        start, ids = self.chunk_start, self.chunk_ids
        of_rows = (self.prompt_tokens, self.output_tokens, self.after, self.tenant, self.slo_class)
        for holds, text, values in (
            (all(len(c) == n for c in of_rows), "columns have equal lengths", f"{n} arrivals"),
            (
                len(start) == n + 1
                and start[0] == 0
                and start[-1] == len(ids)
                and bool((np.diff(start) >= 0).all()),
                "chunk_start rises from 0 to the number of chunk ids",
                f"{len(start)} entries for {n} rows, {len(ids)} ids",
            ),
            (
                not len(ids) or bool(ids.min() >= 0 and ids.max() < known),
                "chunk ids are from 0 up to the number of chunks",
                f"{known} chunks",
            ),
            (
                self.chunk_names is None or len(self.chunk_names) == known,
                "every chunk has a name, or none",
                f"{known} chunks",
            ),
            (
                not known or bool((self.chunk_tokens >= 1).all()),
                "a chunk has at least 1 token",
                f"{known} chunks",
            ),
        ):
            if not holds:
                raise WorkloadError(text, values=values, remedy="build the table again")


def renumbered(ids: NDArray[Any], n_chunks: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """(ids that occur, ascending; `ids` as places in that list)."""
    occurs = np.zeros(n_chunks, np.bool_)
    occurs[ids] = True
    place = np.cumsum(occurs, dtype=np.int32) - np.int32(1)
    return np.flatnonzero(occurs), place[ids]
