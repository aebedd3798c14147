"""Traffic of a question: a generator's parameters or a trace file, at any rate, for any seed.

A seed draws the requests; a rate only squeezes their arrivals, so that runs at different rates and
of different candidates see the same requests. Of a trace, a seed says where the window begins; few
seeds lie far apart, and a window that reaches the end goes on at the beginning. All windows are
squeezed by the same factor, that of the whole trace: its busy hours stay busy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ..core.arrivals import Arrivals
from ..core.errors import WorkloadError
from ..core.record import Record, made
from ..core.request_table import RequestTable
from ..core.rng import rng
from ..core.trace_files import read_trace
from ..core.trace_lines import TraceSource
from ..core.trace_make import Lengths, chat_table, rag_table
from ..core.trace_ticks import tick_s
from ..core.units import NS_PER_S

GENERATORS: dict[str, dict[str, float]] = {
    "rag": {
        "rate": 1.0,
        "passages": 1000,
        "tokens": 512,
        "chunks": 8,
        "zipf": 0.9,
        "question": 64,
        "output": 128,
        "spread": 0.0,
        "cv": 1.0,
    },
    "chat": {
        "rate": 1.0,
        "turns": 5,
        "system": 1000,
        "systems": 1,
        "message": 100,
        "output": 300,
        "think": 30.0,
        "spread": 0.0,
        "cv": 1.0,
    },
}
"""Parameters and their defaults: `core/trace_make.py`. Lengths in tokens, `rate` in requests per
second, `think` in seconds, `cv` of the gaps between arrivals (1 is Poisson), `spread` the
coefficient of variation of questions, messages and outputs, log-normal (0: all are equal)."""

FRACTIONS = frozenset(["rate", "zipf", "think", "spread", "cv"])
"""Parameters that need not be whole numbers."""

BASE_REQUESTS = 8192
"""Requests that are drawn at once: runs of fewer are the first of the same ones. Powers of two."""

GOLDEN = (5**0.5 - 1) / 2
"""Multiples of it, without their whole part, spread evenly however many there are."""


class Traffic(Record):
    """What comes, apart from how often.

    `text` is `rag:name=value,...` (see `cachetune whatif --help`) or the path of a trace.
    """

    text: str
    digest: str = ""
    """Of the trace's bytes: results of another file under the same name are not taken for it."""
    ids: Literal["prefix", "content"] = "prefix"
    """What hashes of a trace's blocks name: all that stands before, too, or the block alone."""
    zero_output: Literal["refuse", "drop"] = "refuse"
    """What becomes of a trace's requests without output."""
    shared: float = Field(default=1.0, ge=0, le=1)
    """Share of passages (of other traffic: of prompts) that remain; the rest is nobody else's."""

    def table(self, n_requests: int, rate_rps: float, seed: int) -> RequestTable:
        """`n_requests` (or as many as there are) at `rate_rps` on average.

        Of conversations, those requests that come first at that rate, later turns of the first
        ones beside first turns of later ones: after `ramp_s` they come at the rate.

        Raises:
            WorkloadError: the file or the parameters are not traffic.
        """
        base = self._whole(n_requests, seed)
        recorded_rps = rate_of(self._recorded) if self.is_trace else begun_rps(base)
        if not self.has_turns:
            table = _rows(base, 0, min(n_requests, len(base))).scaled(rate_rps / recorded_rps)
        else:
            table = base.scaled(rate_rps / recorded_rps)
            table = _picked(table, np.argsort(table.nominal_ns(), kind="stable")[:n_requests])
        if self.shared < 1 and not self.is_stationary:
            table = unshared(table, self.shared, seed)
        return table

    @property
    def ramp_s(self) -> float:
        """Seconds until about as many conversations are under way as later, 0 without turns.

        After them, 95 % of the turns come that will come at a steady rate.
        """
        return _ramp_s(self.replace(shared=1.0)) if self.has_turns else 0.0

    def before(self, n_requests: int, seed: int) -> RequestTable | None:
        """What came before `table`'s requests, ids as there; None if nothing is known of it.

        Of a trace, what it has before the window; of traffic without an order, more of the same.
        """
        base = self._whole(n_requests, seed)
        if self.is_trace:
            start = _start(len(base), seed)
            return _rows(base, len(base) - start, len(base)) if start else None
        if not self.is_stationary or len(base) <= n_requests:
            return None
        return _rows(base, n_requests, len(base))

    def longest(self, n_requests: int, seed: int) -> int:
        """Tokens of the longest prompt with its answer: of `n_requests`, or in all of a trace."""
        table = self._recorded if self.is_trace else self.table(n_requests, 1.0, seed)
        return int((table.prompt_tokens.astype(np.int64) + table.output_tokens).max())

    @property
    def classes(self) -> Sequence[str]:
        """Names of the requests' classes."""
        return self._whole(1, 0).classes

    @property
    def is_trace(self) -> bool:
        """Whether this is a file."""
        return not is_generator(self.text)

    @property
    def n_whole(self) -> int | None:
        """Requests of the trace; None of a generator, which has no end."""
        return len(self._recorded) if self.is_trace else None

    @property
    def tick_s(self) -> float | None:
        """Of a trace with a coarse clock (`core/trace_ticks.py`)."""
        return tick_s(self._recorded) if self.is_trace else None

    @property
    def is_stationary(self) -> bool:
        """Whether any request might as well have come before any other."""
        return self.text.startswith("rag:") and is_generator(self.text)

    @property
    def has_turns(self) -> bool:
        """Whether some requests come only after another one was answered."""
        return bool((self._whole(1, 0).after >= 0).any())

    @property
    def _recorded(self) -> RequestTable:
        return _trace(self.replace(shared=1.0))

    def _whole(self, n_requests: int, seed: int) -> RequestTable:
        whole = self if self.is_stationary else self.replace(shared=1.0)
        if self.is_trace:
            return _turned(whole, seed)
        return _generated(whole, round_up(2 * n_requests), seed)

    @property
    def provenance(self) -> dict[str, str]:
        """Where the requests come from."""
        if is_generator(self.text):
            return {"generator": self.text, "shared": f"{self.shared:g}"}
        return {**self._recorded.provenance, "shared": f"{self.shared:g}"}

    @property
    def rate_rps(self) -> float | None:
        """The rate that was asked for, or at which the trace was recorded."""
        if self.is_trace:
            return rate_of(self._recorded)
        return parameters(self.text)["rate"] if "rate=" in self.text else None


def traffic_of(text: str, **options: Any) -> Traffic:
    """Traffic by a generator's parameters or a trace's path; reads the trace once, checked.

    Raises:
        WorkloadError: neither, or what is wrong with it.
    """
    kind = text.partition(":")[0]
    if ":" in text and kind.isalpha() and kind not in GENERATORS and not Path(text).exists():
        raise WorkloadError(
            f"traffic must be a trace file or one of {', '.join(GENERATORS)} with its parameters",
            values=repr(text),
            remedy="for example rag:rate=2,passages=500,chunks=8",
        )
    if text in GENERATORS and is_generator(text):
        text += ":"
    digest = "" if is_generator(text) else TraceSource(text).sha256()
    found = made(Traffic, "traffic", error=WorkloadError, text=text, digest=digest, **options)
    found.longest(1, 0)  # reads or draws what comes: what is wrong with it is told now
    return found


def _rows(table: RequestTable, begin: int, end: int) -> RequestTable:
    """Rows in a row; chunk ids are not renumbered, so that those of two parts mean the same."""
    if (begin, end) == (0, len(table)):
        return table
    starts = table.chunk_start[begin : end + 1]
    columns = ("arrival_ns", "prompt_tokens", "output_tokens", "after", "tenant", "slo_class")
    return replace(
        table,
        chunk_start=starts - starts[0],
        chunk_ids=table.chunk_ids[starts[0] : starts[-1]],
        **{name: getattr(table, name)[begin:end] for name in columns},
    )


def _picked(table: RequestTable, rows: NDArray[np.int64]) -> RequestTable:
    """These rows in this order; chunk ids are not renumbered either."""
    kept = np.zeros(len(table), bool)
    kept[rows] = True
    used = np.unique(table.chunk_ids[np.repeat(kept, np.diff(table.chunk_start))])
    found = table.take(rows)
    return replace(
        found,
        chunk_ids=used[found.chunk_ids],
        chunk_tokens=table.chunk_tokens,
        chunk_names=table.chunk_names,
    )


def round_up(n: int) -> int:
    """Few sizes are drawn for many rates."""
    return max(BASE_REQUESTS, 1 << (n - 1).bit_length())


def rate_of(table: RequestTable) -> float:
    """Mean requests per second of a table whose arrivals are all known."""
    seconds = table.duration_s()
    return (len(table) - 1) / seconds if seconds > 0 else 1.0


def begun_rps(table: RequestTable) -> float:
    """Requests over the seconds in which conversations begin; other requests are one each."""
    seconds = float(np.ptp(table.arrival_ns[table.after < 0])) / NS_PER_S
    return (len(table) - 1) / seconds if seconds > 0 else 1.0


def unshared(table: RequestTable, shared: float, seed: int) -> RequestTable:
    """The same prompts, but only a share of them hold passages that others hold too."""
    alone = rng(seed, "unshared").random(len(table)) >= shared
    fresh = np.repeat(alone, np.diff(table.chunk_start))
    ids = table.chunk_ids.copy()
    n_known = len(table.chunk_tokens)
    ids[fresh] = n_known + np.arange(int(fresh.sum()), dtype=np.int32)
    tokens = np.concatenate([table.chunk_tokens, table.chunk_tokens[table.chunk_ids[fresh]]])
    source = {**table.provenance, "shared": f"{shared:g}"}
    return replace(table, chunk_ids=ids, chunk_tokens=tokens, chunk_names=None, provenance=source)


def is_generator(text: str) -> bool:
    """Whether this names a generator and not a file."""
    return text.partition(":")[0] in GENERATORS and not Path(text).exists()


def parameters(text: str) -> dict[str, float]:
    """Numbers of `kind:name=value,...` over the defaults of its kind.

    Raises:
        WorkloadError: an unknown name or a value that is no positive number.
    """
    kind, _, rest = text.partition(":")
    known = GENERATORS[kind]
    found = dict(known)
    for part in filter(None, rest.split(",")):
        name, _, value = part.partition("=")
        name = name.strip()
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if name not in known or not 0 <= number < float("inf"):
            raise WorkloadError(
                f"traffic {kind} takes {', '.join(known)}, each a number",
                values=repr(part),
                remedy=f"for example {kind}:rate=2,passages=500",
            )
        found[name] = number
    for name in set(found) - {"zipf", "think", "spread"}:
        if not found[name] > 0:
            raise WorkloadError(f"{name} of the traffic must be above zero", values=text)
        if name not in FRACTIONS and found[name] != int(found[name]):
            raise WorkloadError(f"{name} of the traffic must be a whole number", values=text)
    return found


def _start(n: int, seed: int) -> int:
    """Row where a seed's window begins: few of them are far apart, whatever their number."""
    return int(n * (seed * GOLDEN % 1))


def apart(seeds: Sequence[int]) -> float:
    """Longest way from where a seed's window of a trace begins to the next, over all of it."""
    starts = sorted(seed * GOLDEN % 1 for seed in seeds)
    return max(b - a for a, b in zip(starts, [*starts[1:], starts[0] + 1], strict=True))


@lru_cache(maxsize=8)
def _ramp_s(traffic: Traffic) -> float:
    whole = _trace(traffic) if traffic.is_trace else _generated(traffic, BASE_REQUESTS, 0)
    nominal = whole.nominal_ns()
    return float(np.percentile(nominal - nominal[whole.roots()], 95)) / NS_PER_S


@lru_cache(maxsize=8)
def _turned(traffic: Traffic, seed: int) -> RequestTable:
    """The trace from a seed's row on, then what is before it; turns keep their conversation."""
    whole = _trace(traffic)
    start = _start(len(whole), seed)
    if not start:
        return whole
    rows = np.concatenate([np.arange(start, len(whole)), np.arange(start)])
    if (whole.after >= 0).any():
        kept = np.zeros(len(whole), bool)
        for row in rows:
            before = whole.after[row]
            kept[row] = before < 0 or kept[before]
        rows = rows[kept[rows]]
    turned = whole.take(rows, window=f"{start}+")
    times = np.maximum.accumulate(np.where(whole.after < 0, whole.arrival_ns, 0))
    lasts_ns = int(times[-1]) + round(NS_PER_S / rate_of(whole))
    again = np.where(rows < start, lasts_ns, 0) - int(times[start])
    free = turned.after < 0
    return replace(turned, arrival_ns=np.where(free, turned.arrival_ns + again, turned.arrival_ns))


@lru_cache(maxsize=8)
def _generated(traffic: Traffic, n: int, seed: int) -> RequestTable:
    p = parameters(traffic.text)
    gaps: dict[str, Any] = {} if p["cv"] == 1 else {"kind": "gamma", "cv": p["cv"]}

    def lengths(name: str, cv: float = 0.0) -> Lengths:
        return made(Lengths, f"traffic {name}", error=WorkloadError, mean=p[name], cv=cv)

    def arrivals(rate_rps: float) -> Arrivals:
        return made(Arrivals, "traffic", error=WorkloadError, rate_rps=rate_rps, **gaps)

    if traffic.text.startswith("chat:"):
        return chat_table(
            max(1, round(n / p["turns"])),
            arrivals(1.0 / p["turns"]),
            turns=lengths("turns"),
            system=lengths("system"),
            systems=int(p["systems"]),
            message=lengths("message", p["spread"]),
            answer=lengths("output", p["spread"]),
            think_s=p["think"],
            seed=seed,
        )
    return rag_table(
        n,
        arrivals(1.0),
        passages=int(p["passages"]),
        per_request=int(p["chunks"]),
        passage=lengths("tokens"),
        question=lengths("question", p["spread"]),
        output=lengths("output", p["spread"]),
        zipf_a=p["zipf"],
        sharing=traffic.shared,
        seed=seed,
    )


@lru_cache(maxsize=2)
def _trace(traffic: Traffic) -> RequestTable:
    return read_trace(traffic.text, ids=traffic.ids, zero_output=traffic.zero_output)
