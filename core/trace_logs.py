"""What benchmarks and engines wrote of requests they served, as traces of what was asked.

- `vllm bench serve --save-result --save-detailed`: one JSON object of lists (`input_lens`,
  `output_lens`, `start_times` in newer versions; seconds of a monotonic clock).
- Request logs of an engine, a JSON object per line: `input_toks`, `output_toks`, `arrival_time`
  (seconds), as LLMServingSim's benches of vLLM keep them.
- AIPerf's `profile_export.jsonl`, a JSON object per line: `metadata.request_start_ns`, lengths
  under `metrics`, `error` where the request failed.

Rows come as requests ended, so they are sorted by time. A failed request counts as 0 output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .trace_columns import TraceColumns
from .trace_lines import TraceSource, short


def read_vllm_bench(source: TraceSource, columns: TraceColumns) -> None:
    """A result file of `vllm bench serve`; without `start_times` it needs times of its own."""
    for line, result in source.objects():
        prompts = _list(source, line, result, "input_lens")
        outputs = _list(source, line, result, "output_lens")
        times: Sequence[Any]
        if "start_times" in result:
            times = _list(source, line, result, "start_times")
        else:
            times = [None] * len(prompts)
        if not len(prompts) == len(outputs) == len(times):
            raise source.error(
                line,
                "input_lens, output_lens and start_times have equal lengths",
                f"{len(prompts)}, {len(outputs)} and {len(times)}",
                "the file may be cut short or damaged",
            )
        for prompt, output, time in zip(prompts, outputs, times, strict=True):
            time_ns = None if time is None else source.time_ns(line, "start_times", time)
            columns.add(line, time_ns, prompt, output, names=("input_lens", "output_lens"))


def read_request_log(source: TraceSource, columns: TraceColumns) -> None:
    """Requests of an engine by arrival time."""
    names = "input_toks", "output_toks"
    for line, row in source.objects():
        prompt, output, time = (source.field(line, row, n) for n in (*names, "arrival_time"))
        columns.add(line, source.time_ns(line, "arrival_time", time), prompt, output, names=names)


def read_aiperf_export(source: TraceSource, columns: TraceColumns) -> None:
    """Records of an AIPerf run by the time each request was sent."""
    names = "input_sequence_length", "output_sequence_length"
    for line, row in source.objects():
        metadata = source.field(line, row, "metadata")
        metrics = source.field(line, row, "metrics")
        if not isinstance(metadata, dict) or not isinstance(metrics, dict | None):
            raise source.error(line, "metadata and metrics are JSON objects", short(row))
        time = source.field(line, metadata, "request_start_ns")
        time_ns = source.time_ns(line, "request_start_ns", time, 1)
        failed = row.get("error") is not None or metrics is None
        prompt = _metric(source, line, metrics, names[0], fallback="error_isl" if failed else "")
        output = 0 if failed else _metric(source, line, metrics, names[1])
        columns.add(line, time_ns, prompt, output, names=names)


def _list(source: TraceSource, line: int, result: dict[str, Any], name: str) -> list[Any]:
    if name not in result:
        raise source.error(
            line,
            f"a result of vllm bench serve has the list {name}",
            short(list(result)),
            "run it with --save-result --save-detailed",
        )
    found = result[name]
    if not isinstance(found, list):
        raise source.bad(line, name, found, "is a list")
    return found


def _metric(
    source: TraceSource, line: int, metrics: dict[str, Any] | None, name: str, fallback: str = ""
) -> Any:
    """The value of a metric; what failed has only a `fallback`, or nothing: 1 token then."""
    found = (metrics or {}).get(name, (metrics or {}).get(fallback))
    if found is None and fallback:
        return 1  # the row is dropped or refused for its output
    if not isinstance(found, dict) or "value" not in found:
        raise source.bad(line, name, found, "is an object with a value")
    return found["value"]
