"""Traces whose prompts are lists of block hashes: Mooncake, Qwen-Bailian.

A hash names a block of equal length; the last block of a prompt may be shorter, and is then told
apart from a whole one of the same hash. Tokens behind the last block belong to no chunk.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from .trace_columns import TraceColumns
from .trace_lines import TraceSource
from .units import NS_PER_MS, NS_PER_S

LENGTHS = "input_length", "output_length"


def read_mooncake(source: TraceSource, columns: TraceColumns, block_tokens: int) -> None:
    """kvcache-ai/Mooncake, FAST25-release: milliseconds, blocks of 512 tokens, chained hashes."""
    for line, row in source.objects():
        prompt, output, time = (source.field(line, row, n) for n in (*LENGTHS, "timestamp"))
        time_ns = source.time_ns(line, "timestamp", time, NS_PER_MS)
        if columns.add(line, time_ns, prompt, output):
            add_blocks(source, columns, line, row.get("hash_ids", []), prompt, block_tokens)
        if columns.is_full:
            return


def read_bailian(source: TraceSource, columns: TraceColumns, block_tokens: int) -> None:
    """alibaba-edu/qwen-bailian-usagetraces-anon: seconds, blocks of 16 tokens hashed alone.

    A turn holds its whole history and its own time, so turns stay absolute arrivals: the wait of
    the user between them is in the trace, the wait for the answer as it was then too.
    """
    for line, row in source.objects():
        prompt, output, time = (source.field(line, row, n) for n in (*LENGTHS, "timestamp"))
        time_ns = source.time_ns(line, "timestamp", time, NS_PER_S)
        for name in ("chat_id", "parent_chat_id", "turn"):
            if type(row.get(name, 0)) is not int:
                raise source.bad(line, name, row[name], "is a whole number")
        if columns.add(line, time_ns, prompt, output, slo_class=row.get("type", "")):
            add_blocks(source, columns, line, row.get("hash_ids", []), prompt, block_tokens)
        if columns.is_full:
            return


def add_blocks(
    source: TraceSource,
    columns: TraceColumns,
    line: int,
    hash_ids: object,
    prompt_tokens: int,
    block_tokens: int,
) -> None:
    """The blocks of the row added last."""
    keys = block_keys(source, line, hash_ids, prompt_tokens, block_tokens)
    if keys and isinstance(keys[-1], tuple):
        columns.add_blocks(keys[:-1], block_tokens)
        columns.add_chunks(keys[-1:], [keys[-1][1]])
    else:
        columns.add_blocks(keys, block_tokens)


def block_keys(
    source: TraceSource, line: int, hash_ids: object, n_tokens: int, block_tokens: int
) -> list[Any]:
    """What tells blocks apart: the hash; for a short last block the hash and its tokens.

    Raises:
        WorkloadError: not a list of hashes, or more blocks than the tokens fill.
    """
    if not isinstance(hash_ids, list):
        raise source.bad(line, "hash_ids", hash_ids, "is a list")
    kinds = set(map(type, hash_ids))
    if kinds and kinds != {int} and kinds != {str}:
        raise source.bad(line, "hash_ids", hash_ids, "holds whole numbers, or texts")
    excess = len(hash_ids) * block_tokens - n_tokens
    if excess >= block_tokens:
        raise source.error(
            line,
            f"a prompt is as long as its blocks of {block_tokens} tokens",
            f"{len(hash_ids)} hash_ids for {n_tokens} tokens",
            "correct this line, or name another block length",
        )
    if excess <= 0:
        return hash_ids
    last: Hashable = hash_ids[-1], block_tokens - excess
    return [*hash_ids[:-1], last]
