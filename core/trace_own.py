"""Our own trace format: JSON lines, one request each, chunks by any id at any position.

An optional first line `{"cachetune_trace": 1, "name": …, "chained": …, "provenance": {…}}`. Then

    {"arrival_s": 0.5, "prompt_tokens": 1100, "output_tokens": 20,
     "chunks": [{"id": "a", "tokens": 512}, "b"], "tenant": "t", "slo_class": "chat"}

A chunk seen before may be named by its id alone. A request that waits for another has, instead of
`arrival_s`, `after` (number of that request, from 0) and `think_s`. `arrival_ns` and `think_ns`
stand for the same in whole nanoseconds, which the writer uses where seconds would be inexact.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .record import write_atomic
from .request_table import RequestTable
from .trace_columns import TraceColumns
from .trace_lines import TraceSource, short
from .units import NS_PER_S

VERSION = 1
HEADER_KEY = "cachetune_trace"
HEADER_FIELDS = frozenset({HEADER_KEY, "name", "chained", "provenance"})
FIELDS = frozenset(
    [
        "arrival_s",
        "arrival_ns",
        "after",
        "think_s",
        "think_ns",
        "prompt_tokens",
        "output_tokens",
        "chunks",
        "tenant",
        "slo_class",
    ]
)
NAMES = "prompt_tokens", "output_tokens"


def read_own(source: TraceSource, columns: TraceColumns) -> dict[str, Any]:
    """All requests.

    Returns:
        The header, empty where there is none.
    """
    header: dict[str, Any] = {}
    for place, (line, row) in enumerate(source.objects()):
        if not place and HEADER_KEY in row:
            header = _header(source, line, row)
            continue
        unknown = row.keys() - FIELDS
        if unknown:
            raise source.error(
                line,
                "a request has no unknown fields",
                short(sorted(unknown)),
                f"fields are {', '.join(sorted(FIELDS))}",
            )
        prompt, output = (source.field(line, row, name) for name in NAMES)
        after, time_ns = _time(source, line, row)
        if columns.add(
            line,
            time_ns,
            prompt,
            output,
            names=NAMES,
            after=after,
            tenant=row.get("tenant", ""),
            slo_class=row.get("slo_class", ""),
        ):
            _add_chunks(source, columns, line, row.get("chunks", []), prompt)
        if columns.is_full:
            break
    return header


def _header(source: TraceSource, line: int, row: dict[str, Any]) -> dict[str, Any]:
    if row[HEADER_KEY] != VERSION:
        raise source.bad(line, HEADER_KEY, row[HEADER_KEY], f"is {VERSION}")
    unknown = row.keys() - HEADER_FIELDS
    if unknown:
        raise source.error(line, "a header has no unknown fields", short(sorted(unknown)))
    said = row.get("provenance", {})
    for name, holds, rule in (
        ("name", isinstance(row.get("name", ""), str), "is a text"),
        ("chained", isinstance(row.get("chained", False), bool), "is true or false"),
        (
            "provenance",
            isinstance(said, dict) and all(isinstance(v, str) for v in said.values()),
            "is an object of texts",
        ),
    ):
        if not holds:
            raise source.bad(line, name, row[name], rule)
    return row


def _time(source: TraceSource, line: int, row: dict[str, Any]) -> tuple[int, int]:
    """(`after` or -1, nanoseconds)."""
    follows = "after" in row
    seconds, exact = ("think_s", "think_ns") if follows else ("arrival_s", "arrival_ns")
    given = [k for k in ("arrival_s", "arrival_ns", "think_s", "think_ns") if k in row]
    if given not in ([seconds], [exact]):
        raise source.error(
            line,
            f"a request {'with' if follows else 'without'} after has {seconds} or {exact}",
            ", ".join(given) or "neither",
        )
    if follows and (type(row["after"]) is not int or row["after"] < 0):
        raise source.bad(line, "after", row["after"], "is the number of an earlier request")
    if given == [exact] and type(row[exact]) is not int:
        raise source.bad(line, exact, row[exact], "is a whole number")
    unit_ns = 1 if given == [exact] else NS_PER_S
    time_ns = source.time_ns(line, given[0], row[given[0]], unit_ns)
    if time_ns < 0:
        raise source.bad(line, given[0], row[given[0]], "is not negative")
    return row.get("after", -1), time_ns


def _add_chunks(
    source: TraceSource, columns: TraceColumns, line: int, chunks: object, prompt_tokens: int
) -> None:
    if not isinstance(chunks, list):
        raise source.bad(line, "chunks", chunks, "is a list")
    keys: list[str] = []
    tokens: list[int] = []
    here: dict[str, int] = {}
    for chunk in chunks:
        key, n_tokens = _chunk(source, line, chunk)
        known = here.get(key) or columns.tokens_of(key)
        if n_tokens is None:
            n_tokens = known
        if n_tokens is None or known not in (None, n_tokens):
            rule = f"has {known} tokens" if known else "has its tokens where it is first named"
            raise source.bad(line, f"chunk {short(key)}", chunk, rule)
        here[key] = n_tokens
        keys.append(key)
        tokens.append(n_tokens)
    if sum(tokens) > prompt_tokens:
        raise source.error(
            line,
            "the chunks of a prompt fit into it",
            f"{sum(tokens)} tokens of chunks, prompt_tokens={prompt_tokens}",
        )
    columns.add_chunks(keys, tokens)


def _chunk(source: TraceSource, line: int, chunk: object) -> tuple[str, int | None]:
    """(id, tokens or None where it is named by its id alone)."""
    if isinstance(chunk, dict):
        key, n_tokens = chunk.get("id"), chunk.get("tokens")
        if type(n_tokens) is not int or n_tokens < 1 or chunk.keys() != {"id", "tokens"}:
            raise source.bad(line, "chunk", chunk, "is {id, tokens} with at least 1 token")
    else:
        key, n_tokens = chunk, None
    if not isinstance(key, str):
        raise source.bad(line, "chunk id", key, "is a text")
    return key, n_tokens


def write_own(table: RequestTable, path: str | Path) -> None:
    """The table as a file that `read_own` reads back equal; old file or new, never half of one."""
    write_atomic(path, "".join(_lines(table)).encode())


def _lines(table: RequestTable) -> Iterator[str]:
    header = {
        HEADER_KEY: VERSION,
        "name": table.name,
        "chained": table.chained,
        "provenance": table.provenance,
    }
    yield json.dumps(header) + "\n"
    seen: set[int] = set()
    for row in range(len(table)):
        after, time_ns = int(table.after[row]), int(table.arrival_ns[row])
        request: dict[str, Any] = {} if after < 0 else {"after": after}
        what, seconds = "arrival" if after < 0 else "think", time_ns / NS_PER_S
        exact = round(seconds * NS_PER_S) == time_ns
        request[f"{what}_s" if exact else f"{what}_ns"] = seconds if exact else time_ns
        request["prompt_tokens"] = int(table.prompt_tokens[row])
        request["output_tokens"] = int(table.output_tokens[row])
        chunks: list[Any] = []
        for chunk in table.chunks_of(row).tolist():
            name = table.chunk_name(chunk)
            new = chunk not in seen
            chunks.append({"id": name, "tokens": int(table.chunk_tokens[chunk])} if new else name)
            seen.add(chunk)
        if chunks:
            request["chunks"] = chunks
        for field, codes, names in (
            ("tenant", table.tenant, table.tenants),
            ("slo_class", table.slo_class, table.classes),
        ):
            if names[codes[row]]:
                request[field] = names[codes[row]]
        yield json.dumps(request) + "\n"
