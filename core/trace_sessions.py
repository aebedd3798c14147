"""Traces of sessions and of assembled prompts: AIPerf's inputs, RAGPulse."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from .errors import WorkloadError
from .trace_blocks import LENGTHS, block_keys
from .trace_columns import TraceColumns
from .trace_lines import TraceSource, short
from .units import NS_PER_MS

TEXT_FIELDS = ("text_input", "messages", "payload")
RAGPULSE_PARTS = {
    "sys_prompt": "1_sys_prompt.jsonl",
    "passages_ids": "2_passages.jsonl",
    "history": "3_history.jsonl",
    "user_input": "4_user_input.jsonl",
    "web_search": "5_web_search.jsonl",
}
"""Part of a prompt -> the file beside the trace with the length of each of its pieces."""


class _Session:
    """What was said so far."""

    def __init__(self, name: str | None) -> None:
        self.name = name
        self.keys: list[Hashable] = []
        self.tokens: list[int] = []
        self.n_tokens = 0
        self.last = -1
        """Number of the last request in the file."""
        self.time_ns: int | None = None
        """Of the last turn with a time of its own."""

    def say(self, key: Hashable, n_tokens: int) -> None:
        self.keys.append(key)
        self.tokens.append(n_tokens)
        self.n_tokens += n_tokens


def read_aiperf(source: TraceSource, columns: TraceColumns, block_tokens: int) -> None:
    """ai-dynamo/aiperf, its `mooncake_trace` inputs: milliseconds, blocks of 512 tokens.

    In a session each line brings only what is new: its prompt is what was asked and answered
    before, then `input_length` tokens. `timestamp` is absolute; a turn without one follows the
    turn before it, `delay` milliseconds after its end.
    """
    sessions: dict[str, _Session] = {}
    for number, (line, row) in enumerate(source.objects()):
        if "input_length" not in row and any(name in row for name in TEXT_FIELDS):
            raise source.error(
                line,
                "a trace names lengths; text has none without its tokenizer",
                short(list(row)),
                "count the tokens and give them as input_length",
            )
        new, output = (source.field(line, row, name) for name in LENGTHS)
        name = row.get("session_id")
        if not isinstance(name, str | None):
            raise source.bad(line, "session_id", name, "is a text")
        session = _Session(None) if name is None else sessions.setdefault(name, _Session(name))
        time_ns, after = _time_of(source, line, row, session)
        if type(new) is not int or new < 1:
            raise source.bad(line, "input_length", new, "is a whole number from 1")
        session.last = number
        if columns.add(line, time_ns, session.n_tokens + new, output, after=after):
            _ask(source, line, row, session, new, block_tokens)
            columns.add_chunks(session.keys, session.tokens)
            if name is not None:
                session.say((name, number, "answer"), output)
        if columns.is_full:
            return


def _time_of(
    source: TraceSource, line: int, row: dict[str, Any], session: _Session
) -> tuple[int | None, int]:
    """(absolute time or None, -1), or (pause, number of the request before it in its session)."""
    given = row.get("timestamp")
    if given is not None:
        time_ns = source.time_ns(line, "timestamp", given, NS_PER_MS)
        if session.time_ns is not None and time_ns < session.time_ns:
            raise source.bad(line, "timestamp", given, "is not before its session's last one")
        session.time_ns = time_ns
        return time_ns, -1
    delay_ns = source.time_ns(line, "delay", row.get("delay") or 0, NS_PER_MS)
    return (delay_ns, session.last) if session.last >= 0 else (None, -1)


def _ask(
    source: TraceSource,
    line: int,
    row: dict[str, Any],
    session: _Session,
    new: int,
    block_tokens: int,
) -> None:
    """Add the new part of a prompt: its blocks, or in a session one piece."""
    if row.get("hash_ids") is None:
        if session.name is not None:
            session.say((session.name, len(session.keys), "question"), new)
        return
    keys = block_keys(source, line, row["hash_ids"], new, block_tokens)
    for key in keys:
        session.say(key, key[1] if isinstance(key, tuple) else block_tokens)
    rest = new - sum(session.tokens[len(session.tokens) - len(keys) :])
    if rest and session.name is not None:
        session.say((session.name, len(session.keys), "rest"), rest)


def read_ragpulse(source: TraceSource, columns: TraceColumns) -> None:
    """flashserve/RAGPulse: seconds, prompts of named pieces in the order of the line.

    Lengths of the pieces stand in five files beside the trace. The user's question is not a
    chunk: it is what every policy computes.
    """
    lengths = _piece_lengths(source)
    for line, row in source.objects():
        prompt, output, time = (source.field(line, row, n) for n in (*LENGTHS, "timestamp"))
        text = time if isinstance(time, str) else short(time)
        parts = source.field(line, row, "hash_ids")
        if not isinstance(parts, dict):
            raise source.bad(line, "hash_ids", parts, "is an object of lists")
        if columns.add(line, source.text_time_ns(line, "timestamp", text), prompt, output):
            keys, tokens = [], []
            for part, pieces in parts.items():
                if not isinstance(pieces, list) or part not in RAGPULSE_PARTS:
                    names = ", ".join(RAGPULSE_PARTS)
                    raise source.bad(line, short(part), pieces, f"is a list; parts are {names}")
                for piece in pieces if part != "user_input" else ():
                    if type(piece) is not int or piece not in lengths:
                        raise source.bad(line, part, piece, "has a length in the files beside it")
                    keys.append(piece)
                    tokens.append(lengths[piece])
            if sum(tokens) > prompt:
                raise source.error(
                    line, "the chunks of a prompt fit into it", f"{sum(tokens)} of {prompt} tokens"
                )
            columns.add_chunks(keys, tokens)
        if columns.is_full:
            return


def _piece_lengths(source: TraceSource) -> dict[int, int]:
    lengths: dict[int, int] = {}
    for file in RAGPULSE_PARTS.values():
        path = source.path.parent / file
        if not path.is_file():
            raise WorkloadError(
                "the lengths of a RAGPulse trace stand beside it",
                values=f"no {file}",
                remedy=f"put {', '.join(RAGPULSE_PARTS.values())} into the same folder",
            )
        pieces = TraceSource(path)
        for line, row in pieces.objects():
            values = list(row.values())
            if len(values) != 2 or not all(type(v) is int for v in values) or values[1] < 1:
                raise pieces.bad(line, "piece", row, "is an id and a token_length of at least 1")
            lengths[values[0]] = values[1]
    return lengths
