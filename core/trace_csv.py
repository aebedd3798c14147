"""Traces in CSV: lengths and times of requests, nothing of what they share.

Azure 2023 and 2024 (Azure/AzurePublicDataset: TIMESTAMP,ContextTokens,GeneratedTokens, the time
in UTC with up to 7 decimals, in 2024 with an offset). BurstGPT (HPMLL/BurstGPT: seconds, model,
request and response tokens, log type; a failed request has 0 response tokens).
"""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache

from .trace_columns import TraceColumns
from .trace_lines import TraceSource
from .units import NS_PER_S

AZURE_COLUMNS = {"time": "TIMESTAMP", "prompt": "ContextTokens", "output": "GeneratedTokens"}
BURSTGPT_COLUMNS = {
    "time": "Timestamp",
    "model": "Model",
    "prompt": "Request tokens",
    "output": "Response tokens",
    "log": "Log Type",
}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def read_azure(source: TraceSource, columns: TraceColumns) -> None:
    """Rows of an Azure LLM inference trace."""
    names = AZURE_COLUMNS["prompt"], AZURE_COLUMNS["output"]
    for line, row in source.records(AZURE_COLUMNS):
        time_ns = date_ns(row["time"])
        if time_ns is None:
            raise source.bad(line, "TIMESTAMP", row["time"], "is a date and a time")
        prompt = source.text_count(line, names[0], row["prompt"])
        output = source.text_count(line, names[1], row["output"])
        columns.add(line, time_ns, prompt, output, names=names)
        if columns.is_full:
            return


def read_burstgpt(source: TraceSource, columns: TraceColumns) -> None:
    """Rows of a BurstGPT trace; the model is the tenant, the kind of log the class."""
    names = BURSTGPT_COLUMNS["prompt"], BURSTGPT_COLUMNS["output"]
    for line, row in source.records(BURSTGPT_COLUMNS):
        columns.add(
            line,
            source.text_time_ns(line, "Timestamp", row["time"]),
            source.text_count(line, names[0], row["prompt"]),
            source.text_count(line, names[1], row["output"]),
            names=names,
            tenant=row["model"],
            slo_class=row["log"],
        )
        if columns.is_full:
            return


def date_ns(text: str) -> int | None:
    """Nanoseconds since 1970 of an ISO date and time, UTC where it names no offset, or None.

    Up to 9 decimals count: Azure writes 7, which `datetime` would cut to 6.
    """
    whole, dot, rest = text.strip().partition(".")
    digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
    if dot and not 0 < len(digits) <= 9:
        return None
    seconds = _seconds(whole + rest[len(digits) :])
    return None if seconds is None else seconds * NS_PER_S + int(digits.ljust(9, "0"))


@lru_cache(maxsize=1024)
def _seconds(text: str) -> int | None:
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return None
    if len(text) <= 10:  # a date alone is no time of arrival
        return None
    aware = found if found.tzinfo else found.replace(tzinfo=UTC)
    return int((aware - _EPOCH).total_seconds())
