"""Metrics of a timeline: per request, in aggregate, and the checks that they add up.

Definitions (tools differ): TTFT runs from arrival to the end of the `head` span of the last
attempt; TPOT is (last token - first token) / (tokens - 1) of requests with two tokens or more;
ITL are the gaps between tokens, pooled over requests; E2E runs from arrival to the last token;
queue time from arrival to the start of the request's first op. Percentiles interpolate linearly,
the standard deviation is of the population.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .ops import Span
from .timeline import Timeline
from .units import NS_PER_S, ns_to_ms
from .workload import Request, Slo, Workload

STATISTICS = ("mean", "std", "p50", "p90", "p95", "p99")


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """One request that made its first token. Times on the executor's clock."""

    request: Request
    arrival_ns: int
    start_ns: int
    """Start of its first op."""
    token_ns: tuple[int, ...]
    """When each output token was there."""
    n_attempts: int
    loaded_share: float
    """Part of the prompt whose KV was loaded, over all layers; 0 to 1."""

    @property
    def ttft_ms(self) -> float:
        """Time to first token."""
        return ns_to_ms(self.token_ns[0] - self.arrival_ns)

    @property
    def tpot_ms(self) -> float | None:
        """Time per output token, the first left out; None for a single token."""
        if len(self.token_ns) < 2:
            return None
        return ns_to_ms(self.token_ns[-1] - self.token_ns[0]) / (len(self.token_ns) - 1)

    @property
    def itl_ms(self) -> list[float]:
        """Gaps between tokens."""
        times = self.token_ns
        return [ns_to_ms(b - a) for a, b in zip(times, times[1:], strict=False)]

    @property
    def e2e_ms(self) -> float:
        """Arrival to last token."""
        return ns_to_ms(self.token_ns[-1] - self.arrival_ns)

    @property
    def queue_ms(self) -> float:
        """Arrival to the start of the first op."""
        return ns_to_ms(self.start_ns - self.arrival_ns)

    def meets(self, slo: Slo) -> bool:
        """Whether TTFT and TPOT both keep the level; a single token has no TPOT to miss."""
        return self.ttft_ms <= slo.ttft_ms and (self.tpot_ms or 0.0) <= slo.tpot_ms


class LittlesLaw(NamedTuple):
    """Both sides of L = rate x time in the system, over the whole timeline."""

    n_mean: float
    """Requests in the system, from a sweep over arrivals and ends."""
    rate_rps: float
    time_mean_s: float

    @property
    def error(self) -> float:
        """Relative difference of the two sides."""
        expected = self.rate_rps * self.time_mean_s
        return abs(self.n_mean - expected) / expected if expected else abs(self.n_mean)


def per_request(timeline: Timeline, workload: Workload) -> list[RequestMetrics]:
    """Metrics of each request with a first token, in the workload's order.

    In a timeline of `execute` nobody arrives: its requests are taken to arrive at its start.
    """
    spans_of: dict[int, list[Span]] = {}
    for span in timeline.spans:
        for request_id in span.op.request_ids:
            spans_of.setdefault(request_id, []).append(span)
    found = []
    for request in workload.requests:
        spans = spans_of.get(request.request_id, [])
        heads = [s for s in spans if s.op.kind == "head"]
        if heads:
            offset_ns = request.arrival_ns if timeline.requests else 0
            arrival_ns = timeline.start_ns + offset_ns
            n_prompt = workload.prompt_tokens(request)
            found.append(_measure(request, arrival_ns, spans, heads, n_prompt))
    return found


def _measure(
    request: Request, arrival_ns: int, spans: list[Span], heads: list[Span], n_prompt: int
) -> RequestMetrics:
    last = max(s.op.attempt for s in spans)
    first_ns = max(s.end_ns for s in heads)
    decodes = sorted(s.end_ns for s in spans if s.op.kind == "decode" and not s.op.passes_on)
    n_layers = max(s.op.layer_stop for s in heads)
    loaded = sum(
        s.op.n_tokens * s.op.n_layers
        for s in spans
        if s.op.kind == "restore" and s.op.attempt == last
    )
    return RequestMetrics(
        request=request,
        arrival_ns=arrival_ns,
        start_ns=min(s.start_ns for s in spans),
        token_ns=(first_ns, *decodes),
        n_attempts=last + 1,
        loaded_share=loaded / max(1, n_prompt * n_layers),
    )


def statistics(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """`name`_mean, _std, _p50 and so on; None where there is no value."""
    if not values:
        return {f"{name}_{statistic}": None for statistic in STATISTICS}
    data = np.asarray(values, dtype=np.float64)
    found = [float(data.mean()), float(data.std())]
    found += [float(p) for p in np.percentile(data, [50, 90, 95, 99])]
    return {f"{name}_{s}": v for s, v in zip(STATISTICS, found, strict=True)}


def bytes_by_tier(timeline: Timeline) -> dict[str, int]:
    """Bytes loaded from each tier."""
    total: dict[str, int] = {}
    for span in timeline.spans:
        if span.op.kind == "load":
            total[span.op.tier] = total.get(span.op.tier, 0) + span.op.n_bytes
    return dict(sorted(total.items()))


def utilisation(timeline: Timeline) -> dict[str, float]:
    """Share of the makespan in which each stream carried out an op."""
    whole = max(1, timeline.makespan_ns)
    streams = timeline.by_stream()
    return {name: sum(s.duration_ns for s in streams[name]) / whole for name in sorted(streams)}


def goodput_rps(
    metrics: Iterable[RequestMetrics], duration_s: float, slo: Slo | None = None
) -> float | None:
    """Requests per second that meet `slo`, or their own; None if nobody has one."""
    levels = [(m, slo or m.request.slo) for m in metrics]
    if all(level is None for _, level in levels):
        return None
    n_good = sum(level is not None and m.meets(level) for m, level in levels)
    return n_good / duration_s if duration_s else 0.0


def littles_law(timeline: Timeline, workload: Workload) -> LittlesLaw:
    """L from a sweep over time, rate and time from the requests: they must agree."""
    found = per_request(timeline, workload)
    whole_s = max(1, timeline.makespan_ns) / NS_PER_S
    changes = sorted([(m.arrival_ns, 1) for m in found] + [(m.token_ns[-1], -1) for m in found])
    area = n_inside = 0
    before = timeline.start_ns
    for at, change in changes:
        area += n_inside * (at - before)
        n_inside += change
        before = at
    mean_s = sum(m.e2e_ms for m in found) / 1e3 / max(1, len(found))
    return LittlesLaw(area / NS_PER_S / whole_s, len(found) / whole_s, mean_s)


def summary(timeline: Timeline, workload: Workload, slo: Slo | None = None) -> dict[str, Any]:
    """Everything a report prints, as JSON values with stable keys; units stand in the names.

    Args:
        timeline: of `serve`, or of `execute` with its requests taken to arrive at the start.
        workload: lengths of the prompts.
        slo: level for every request; by default each request's own.
    """
    found = per_request(timeline, workload)
    duration_s = timeline.makespan_ns / NS_PER_S
    per_s = 1 / duration_s if duration_s else 0.0
    n_prompts = [workload.prompt_tokens(m.request) for m in found]
    n_loaded = sum(m.loaded_share * n for m, n in zip(found, n_prompts, strict=True))
    n_output = sum(len(m.token_ns) for m in found)
    return {
        "n_requests": len(workload.requests),
        "n_ended": len(found),
        "n_restarts": sum(m.n_attempts - 1 for m in found),
        "duration_s": duration_s,
        "prompt_tokens": sum(n_prompts),
        "output_tokens": n_output,
        "throughput_rps": len(found) * per_s,
        "output_tokens_per_s": n_output * per_s,
        "goodput_rps": goodput_rps(found, duration_s, slo),
        **statistics("ttft_ms", [m.ttft_ms for m in found]),
        **statistics("tpot_ms", [m.tpot_ms for m in found if m.tpot_ms is not None]),
        **statistics("itl_ms", [gap for m in found for gap in m.itl_ms]),
        **statistics("e2e_ms", [m.e2e_ms for m in found]),
        **statistics("queue_ms", [m.queue_ms for m in found]),
        "reuse_ratio": n_loaded / max(1, sum(n_prompts)),
        "bytes_by_tier": bytes_by_tier(timeline),
        "utilisation": utilisation(timeline),
    }
