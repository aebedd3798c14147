"""`TraceColumns`: rows of a trace file, checked as they come, become a `RequestTable`."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable, Sequence
from typing import Literal, get_args

import numpy as np

from .errors import WorkloadError
from .request_table import TOKENS_MAX, RequestTable
from .trace_lines import TraceSource

ZeroOutput = Literal["refuse", "drop"]
"""What becomes of a row without output: Azure, BurstGPT and logs keep failed requests so."""

CODES_MAX = 1 << 15


class TraceColumns:
    """Columns in the making; every row is checked, with the line it comes from.

    Args:
        source: the file, for errors.
        sort: rows may come in any order of time (logs); otherwise running backwards is refused.
        zero_output: what becomes of a row without output.
        stop_at: rows after which `is_full`.
    """

    def __init__(
        self,
        source: TraceSource,
        *,
        sort: bool = False,
        zero_output: ZeroOutput = "refuse",
        stop_at: int | None = None,
    ) -> None:
        if zero_output not in get_args(ZeroOutput):
            raise WorkloadError("zero_output is 'refuse' or 'drop'", values=repr(zero_output))
        self.source = source
        self.sort = sort
        self.zero_output = zero_output
        self.stop_at = stop_at
        self.n_dropped = 0
        self.n_untimed = 0
        """Rows that need a time of arrival from elsewhere."""
        self.place_of = array("i")
        """Row of the table for each request of the file, -1 where it was dropped."""
        self._times, self._starts = array("q"), array("q", [0])
        self._prompts, self._outputs, self._after = array("i"), array("i"), array("i")
        self._tenants, self._classes = array("h"), array("h")
        self._ids, self._tokens = array("i"), array("i")
        self._known: dict[Hashable, int] = {}
        self._tenant_codes: dict[str, int] = {}
        self._class_codes: dict[str, int] = {}
        self._last_ns = -(1 << 63)

    def __len__(self) -> int:
        return len(self._times)

    @property
    def is_full(self) -> bool:
        """No further row is wanted."""
        return self.stop_at is not None and len(self) >= self.stop_at

    def add(
        self,
        line: int,
        arrival_ns: int | None,
        prompt_tokens: object,
        output_tokens: object,
        *,
        names: tuple[str, str] = ("input_length", "output_length"),
        after: int = -1,
        tenant: object = "",
        slo_class: object = "",
    ) -> bool:
        """One request; its chunks follow by `add_chunks`.

        Args:
            line: of the file, from 1.
            arrival_ns: absolute, None if the file does not say; with `after`, the pause after the
                end of that request.
            prompt_tokens, output_tokens: as the file has them, checked here.
            names: what the file calls these two.
            after: number of the request it follows, -1 for none.
            tenant, slo_class: names.

        Returns:
            Whether it was kept.

        Raises:
            WorkloadError: a length, a name or a time that cannot be.
        """
        prompt = self._length(line, names[0], prompt_tokens)
        if type(output_tokens) is int and output_tokens == 0:
            if self.zero_output == "refuse":
                raise self.source.error(
                    line,
                    f"{names[1]} is at least 1",
                    f"{names[1]}=0",
                    "drop such rows with zero_output='drop' (--drop-empty, of `cachetune trace` "
                    "--zero-output drop)",
                )
            self.n_dropped += 1
            self.place_of.append(-1)
            return False
        output = self._length(line, names[1], output_tokens)
        if arrival_ns is None:
            self.n_untimed += 1
            arrival_ns = 0
        elif after < 0:
            if arrival_ns < self._last_ns and not self.sort:
                raise self.source.error(
                    line,
                    "arrivals do not run backwards",
                    f"{(self._last_ns - arrival_ns) / 1e9:g} s before the one above",
                    "sort the file by time",
                )
            self._last_ns = arrival_ns
        else:
            after = self._parent(line, after)
            if arrival_ns < 0:
                raise self.source.bad(line, "pause", arrival_ns, "is not negative, ns")
        self.place_of.append(len(self))
        self._times.append(arrival_ns)
        self._prompts.append(prompt)
        self._outputs.append(output)
        self._after.append(after)
        self._tenants.append(self._code(line, "tenant", tenant, self._tenant_codes))
        self._classes.append(self._code(line, "slo_class", slo_class, self._class_codes))
        self._starts.append(len(self._ids))
        return True

    def add_chunks(self, keys: Iterable[Hashable], tokens: Sequence[int]) -> None:
        """Chunks of the row added last: what tells each apart, and its tokens (used if new)."""
        known = self._known
        for key, n_tokens in zip(keys, tokens, strict=True):
            number = known.setdefault(key, len(known))
            if number == len(self._tokens):
                self._tokens.append(n_tokens)
            self._ids.append(number)
        self._starts[-1] = len(self._ids)

    def add_blocks(self, keys: Sequence[Hashable], n_tokens: int) -> None:
        """Blocks of equal length, as `add_chunks`, faster."""
        known = self._known
        self._ids.extend([known.setdefault(key, len(known)) for key in keys])
        self._tokens.extend([n_tokens] * (len(known) - len(self._tokens)))
        self._starts[-1] = len(self._ids)

    def tokens_of(self, key: Hashable) -> int | None:
        """Tokens of a chunk met before."""
        number = self._known.get(key)
        return None if number is None else self._tokens[number]

    def table(self, name: str, *, chained: bool, from_first: bool) -> RequestTable:
        """What was added; with `from_first`, time 0 is the first arrival.

        Raises:
            WorkloadError: nothing was added.
        """
        if not len(self):
            dropped = f", {self.n_dropped} dropped" if self.n_dropped else ""
            raise WorkloadError(
                "a trace holds at least one request",
                values=f"0 in {self.source.path.name}{dropped}",
                remedy="check the file and the filters",
            )
        times = np.array(self._times, np.int64)
        after = np.array(self._after, np.int32)
        if from_first:
            free = after < 0  # row 0 is, at least
            times[free] -= times[free].min()
        found = RequestTable(
            name=name,
            arrival_ns=times,
            prompt_tokens=np.array(self._prompts, np.int32),
            output_tokens=np.array(self._outputs, np.int32),
            chunk_start=np.array(self._starts, np.int64),
            chunk_ids=np.array(self._ids, np.int32),
            chunk_tokens=np.array(self._tokens, np.int32),
            after=after,
            tenant=np.array(self._tenants, np.int16),
            slo_class=np.array(self._classes, np.int16),
            chained=chained,
            tenants=tuple(self._tenant_codes),
            classes=tuple(self._class_codes),
            chunk_names=_names(self._known),
        )
        return _sorted(found) if self.sort else found

    def _length(self, line: int, name: str, value: object) -> int:
        if type(value) is int and 1 <= value <= TOKENS_MAX:
            return value
        raise self.source.bad(line, name, value, f"is a whole number from 1 to {TOKENS_MAX}")

    def _parent(self, line: int, after: int) -> int:
        if after >= len(self.place_of):
            raise self.source.bad(line, "after", after, "is the number of an earlier request")
        place = self.place_of[after]
        if place < 0:
            raise self.source.bad(line, "after", after, "is a request that was not dropped")
        return place

    def _code(self, line: int, field: str, name: object, codes: dict[str, int]) -> int:
        if not isinstance(name, str):
            raise self.source.bad(line, field, name, "is a text")
        code = codes.setdefault(name, len(codes))
        if code >= CODES_MAX:
            raise self.source.bad(line, field, name, f"has at most {CODES_MAX} values")
        return code


def _names(keys: Iterable[Hashable]) -> tuple[str, ...] | None:
    """What the file called each chunk, if that tells them apart."""
    names = tuple(":".join(map(str, k)) if isinstance(k, tuple) else str(k) for k in keys)
    return names if names and len(set(names)) == len(names) else None


def _sorted(table: RequestTable) -> RequestTable:
    order = np.argsort(table.nominal_ns(), kind="stable")
    n_moved = int((order != np.arange(len(order))).sum())
    return table.take(order, rows_moved_by_sorting=str(n_moved)) if n_moved else table
