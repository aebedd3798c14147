"""`Timeline`: all spans of a run. Metrics, invariants, fidelity and traces read only this."""

from __future__ import annotations

from dataclasses import dataclass

from .ops import Span
from .workload import Request


@dataclass(frozen=True, slots=True)
class HostWait:
    """A thread of the host waited for a device, on the timeline's clock."""

    device: int
    why: str
    start_ns: int
    end_ns: int
    stream: str = ""
    """Whose end it was, if one stream's."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """Spans in the order they ended, on one clock that read `start_ns` at the beginning."""

    spans: tuple[Span, ...]
    start_ns: int
    requests: tuple[Request, ...]
    label: str = ""
    waits: tuple[HostWait, ...] = ()
    """All of the run, in the order they ended; none where ops run on the host itself."""

    @property
    def end_ns(self) -> int:
        """When the last span ended."""
        return max((s.end_ns for s in self.spans), default=self.start_ns)

    @property
    def makespan_ns(self) -> int:
        """From the start to the last end."""
        return self.end_ns - self.start_ns

    def by_stream(self) -> dict[str, list[Span]]:
        """Spans of each stream in submission order."""
        streams: dict[str, list[Span]] = {}
        for span in sorted(self.spans, key=lambda s: s.seq):
            streams.setdefault(f"{span.op.device}:{span.op.stream}", []).append(span)
        return streams
