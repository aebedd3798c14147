"""Trace files: `read_trace` knows the formats in use, `write_trace` writes ours.

Nothing is clipped: what does not fit is refused with its line. What was left out on request is
counted in the table's `provenance`, beside the file's name, SHA-256 and format.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .arrivals import Arrivals, with_arrivals
from .errors import WorkloadError
from .request_table import RequestTable
from .trace_blocks import read_bailian, read_mooncake
from .trace_chains import chained, is_chained
from .trace_columns import TraceColumns, ZeroOutput
from .trace_csv import AZURE_COLUMNS, BURSTGPT_COLUMNS, read_azure, read_burstgpt
from .trace_lines import TraceSource, short
from .trace_logs import read_aiperf_export, read_request_log, read_vllm_bench
from .trace_own import HEADER_KEY, read_own, write_own
from .trace_sessions import TEXT_FIELDS, read_aiperf, read_ragpulse
from .units import NS_PER_S

write_trace = write_own

BLOCK_TOKENS = {"mooncake": 512, "aiperf": 512, "bailian": 16}
"""Block length of the formats that hash blocks."""

_BLOCKS: dict[str, Callable[[TraceSource, TraceColumns, int], None]] = {
    "mooncake": read_mooncake,
    "bailian": read_bailian,
    "aiperf": read_aiperf,
}
_ROWS: dict[str, Callable[[TraceSource, TraceColumns], None]] = {
    "ragpulse": read_ragpulse,
    "azure": read_azure,
    "burstgpt": read_burstgpt,
    "vllm_bench": read_vllm_bench,
    "request_log": read_request_log,
    "aiperf_export": read_aiperf_export,
}
FORMATS = ("cachetune", *_BLOCKS, *_ROWS)

_UNSORTED = frozenset({"aiperf", "ragpulse", "vllm_bench", "request_log", "aiperf_export"})
"""By conversation, or as requests ended: order by time is not theirs to keep."""


def read_trace(
    path: str | Path,
    format: str = "auto",
    *,
    first: int | None = None,
    between_s: tuple[float, float] | None = None,
    scale_rate: float = 1.0,
    zero_output: ZeroOutput = "refuse",
    block_tokens: int | None = None,
    ids: Literal["prefix", "content"] = "prefix",
    rate_rps: float | None = None,
    seed: int = 0,
) -> RequestTable:
    """The requests of a trace file; time 0 is the first arrival, in our format that of the file.

    Args:
        path: of the file.
        format: one of `FORMATS`, or `auto`, which looks at the first line.
        first: at most so many requests, of those that the other filters leave.
        between_s: only arrivals in [begin, end) seconds; `begin` becomes time 0. A request that
            follows another goes where that one goes.
        scale_rate: what if requests came so many times as often? Pauses of users stay.
        zero_output: what becomes of requests without output, which failed.
        block_tokens: another block length than the format's.
        ids: block hashes name all that stands before them (`prefix`, what a prefix cache sees), or
            `content` alone, for engines that reuse at any position.
        rate_rps: Poisson arrivals for a file without times.
        seed: root of these arrivals.

    Raises:
        WorkloadError: the file, a line or an option that cannot be.
    """
    _check_options(format, first, between_s, block_tokens, ids)
    source = TraceSource(path)
    if format == "auto":
        format = detect(source)
    stop_at = first if between_s is None else None
    columns = TraceColumns(
        source,
        sort=format in _UNSORTED,
        zero_output=zero_output,
        stop_at=None if format in _UNSORTED else stop_at,
    )
    table = _as_written(source, columns, format, block_tokens, ids)
    table = _timed(table, columns.n_untimed, rate_rps, seed)
    table = _filtered(table, first, between_s)
    if scale_rate != 1.0:
        table = table.scaled(scale_rate)
    table.provenance["rows"] = str(len(table))
    table.check()
    return table


def _as_written(
    source: TraceSource,
    columns: TraceColumns,
    format: str,
    block_tokens: int | None,
    ids: Literal["prefix", "content"],
) -> RequestTable:
    """All rows of the file, before any filter, with what is to be said of where they come from."""
    said = {"file": source.path.name, "sha256": source.sha256(), "format": format}
    header: dict[str, Any] = {}
    if format in _BLOCKS:
        block_tokens = block_tokens or BLOCK_TOKENS[format]
        said |= {"block_tokens": str(block_tokens), "ids": ids}
        _BLOCKS[format](source, columns, block_tokens)
    elif format in _ROWS:
        _ROWS[format](source, columns)
    else:
        header = read_own(source, columns)
        said |= {f"source_{k}": v for k, v in header.get("provenance", {}).items()}
    table = columns.table(
        header.get("name", source.path.stem),
        chained=bool(header.get("chained", False)),
        from_first=format != "cachetune",
    )
    if format in _BLOCKS and ids == "prefix":
        said["ids"] = "prefix" if is_chained(table) else "prefix, chained here"
        table = chained(table)
    if ids == "content" and table.chained:
        raise WorkloadError(
            "ids of contents cannot be had from ids of prefixes",
            values=f"ids='content', and those of {source.path.name} are chained",
            remedy="leave it out, or convert the source again with --ids content",
        )
    if columns.n_dropped:
        said["dropped_zero_output"] = str(columns.n_dropped)
    return replace(table, provenance={**said, **table.provenance})


def detect(source: TraceSource) -> str:
    """The format that the first line shows.

    Raises:
        WorkloadError: none of them.
    """
    line, text = next(source.lines(), (1, b""))
    if not text:
        raise WorkloadError(
            "a trace holds at least one request",
            values=f"0 in {source.path.name}",
            remedy="check the file: it is empty",
        )
    text = text.removeprefix(codecs.BOM_UTF8)
    if text.lstrip().startswith(b"[") or text.strip() == b"{":
        raise source.error(
            line,
            "each line is one JSON object",
            f"one that goes over several, or a list: {short(text[:30])}",
            "write each on a line of its own: jq -c . for one object, jq -c '.[]' for a list",
        )
    if not text.lstrip().startswith(b"{"):
        names = text.decode("utf-8-sig", "replace").strip().replace('"', "").split(",")
        for format, columns in (("azure", AZURE_COLUMNS), ("burstgpt", BURSTGPT_COLUMNS)):
            if set(columns.values()) <= set(names):
                return format
        raise _unknown(source, line, short(text[:60]))
    row = source.parsed(line, text)
    for format, holds in (
        ("cachetune", HEADER_KEY in row or "prompt_tokens" in row),
        ("vllm_bench", "input_lens" in row),
        ("request_log", "input_toks" in row),
        ("aiperf_export", "metadata" in row and "metrics" in row),
        ("ragpulse", isinstance(row.get("hash_ids"), dict)),
        ("bailian", "chat_id" in row),
        ("aiperf", any(k in row for k in ("session_id", "delay", *TEXT_FIELDS))),
        ("mooncake", "input_length" in row),
    ):
        if holds:
            return format
    raise _unknown(source, line, short(list(row)))


def _unknown(source: TraceSource, line: int, values: str) -> WorkloadError:
    return source.error(
        line, "the first line shows the format", values, f"name it: {', '.join(FORMATS)}"
    )


def _check_options(
    format: str,
    first: int | None,
    between_s: tuple[float, float] | None,
    block_tokens: int | None,
    ids: str,
) -> None:
    begin, end = between_s or (0.0, 1.0)
    for holds, rule, values in (
        (format == "auto" or format in FORMATS, f"format is auto or {', '.join(FORMATS)}", format),
        (first is None or first >= 1, "first is at least 1", str(first)),
        (0 <= begin < end, "between_s is a begin from 0 on and a later end", str(between_s)),
        (
            block_tokens is None or block_tokens >= 1,
            "block_tokens is at least 1",
            str(block_tokens),
        ),
        (ids in ("prefix", "content"), "ids is 'prefix' or 'content'", repr(ids)),
    ):
        if not holds:
            raise WorkloadError(rule, values=values)


def _timed(table: RequestTable, n_untimed: int, rate_rps: float | None, seed: int) -> RequestTable:
    file = table.provenance["file"]
    if not n_untimed:
        if rate_rps is None:
            return table
        raise WorkloadError(
            "a rate is for a trace without times",
            values=f"{rate_rps:g} requests/s, and {file} has times",
            remedy="leave it out, or change how often requests come by scale_rate (--scale-rate)",
        )
    if rate_rps is None or not 0 < rate_rps < float("inf"):
        raise WorkloadError(
            "a trace says when requests arrive",
            values=f"{n_untimed} without a time in {file}, a rate of {rate_rps}",
            remedy="give a rate for Poisson arrivals (rate_rps, `cachetune trace convert "
            "--rate-rps`)",
        )
    if n_untimed != int((table.after < 0).sum()):
        raise WorkloadError(
            "either every conversation says when it begins, or none does",
            values=f"{n_untimed} without a time in {file}",
            remedy="give the others a timestamp",
        )
    return with_arrivals(table, Arrivals(rate_rps=rate_rps), seed)


def _filtered(
    table: RequestTable, first: int | None, between_s: tuple[float, float] | None
) -> RequestTable:
    if between_s is not None:
        begin_ns, end_ns = (min(t, 1e9) * NS_PER_S for t in between_s)
        kept = (table.arrival_ns >= begin_ns) & (table.arrival_ns < end_ns)
        rows = np.flatnonzero(kept[table.roots()])
        if not len(rows):
            raise WorkloadError(
                "some request arrives between the two times",
                values=f"{between_s[0]:g} to {between_s[1]:g} s of {table.duration_s():g} s",
            )
        table = table.take(rows, between_s=f"{between_s[0]:g} to {between_s[1]:g}")
        table.arrival_ns[table.after < 0] -= round(begin_ns)
    if first is not None:
        table = table.take(np.arange(min(first, len(table))), first=str(first))
    return table
