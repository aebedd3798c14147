"""`Flow`: what one request loads from one tier; links share their rate evenly, as fluid.

A flow passes its tier's link and its replica's host link, and moves at the smaller of its shares.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .serving_jobs import Job


class Flow:
    """One load under way. Work is the time it takes on an idle link, nanoseconds."""

    __slots__ = ("end_ns", "latency_ns", "left", "links", "n_bytes", "owner", "owner_load", "rate",
                 "since_ns", "start_ns", "tier", "version", "works")  # fmt: skip

    def __init__(
        self,
        owner: Job,
        owner_load: int,
        tier: int,
        n_bytes: int,
        links: tuple[Link, ...],
        works: tuple[float, ...],
        latency_ns: int,
    ) -> None:
        self.owner = owner
        self.owner_load = owner_load
        self.tier = tier
        self.n_bytes = n_bytes
        self.links = links
        self.works = works
        self.latency_ns = latency_ns
        self.left = 1.0
        """Share that has not moved yet, as of `since_ns`; `rate` of it moves per nanosecond."""
        self.rate = 0.0
        self.start_ns = self.since_ns = self.end_ns = 0
        self.version = 0
        """Counts changes of rate: an end that was set for an older one is void."""


def beside(alone_ns: float, lost: float, until_ns: float) -> float:
    """Time of what takes `alone_ns` when it loses a share of its speed for the first `until_ns`."""
    if until_ns <= 0:
        return alone_ns
    return min(alone_ns / (1 - lost), alone_ns + until_ns * lost)


OnChange = Callable[[Flow], None]


class Link:
    """A rate that flows share."""

    __slots__ = ("flows", "n_bytes")

    def __init__(self) -> None:
        self.flows: dict[Flow, None] = {}
        self.n_bytes = 0
        """Of loads that were begun and have not ended."""


def join(flow: Flow, now_ns: int, changed: OnChange) -> None:
    """Start moving; `changed` is told of every flow whose end is another now."""
    flow.start_ns = flow.since_ns = now_ns
    for link in flow.links:
        link.flows[flow] = None
    _retime(flow, now_ns, changed)


def leave(flow: Flow, now_ns: int, changed: OnChange) -> None:
    """All of it has moved; what shared a link with it goes faster."""
    flow.left = 0.0
    for link in flow.links:
        del link.flows[flow]
    _retime(flow, now_ns, changed)


def _retime(cause: Flow, now_ns: int, changed: OnChange) -> None:
    first, *others = cause.links
    near = first.flows
    if others and others[0].flows.keys() != near.keys():
        near = {**near, **others[0].flows}
    for flow in near:
        longest = 0.0
        for link, work in zip(flow.links, flow.works, strict=True):
            longest = max(longest, len(link.flows) * work)
        rate = 1.0 / longest if longest > 0.0 else 1.0
        if rate != flow.rate:
            flow.left -= flow.rate * (now_ns - flow.since_ns)
            flow.since_ns = now_ns
            flow.rate = rate
            flow.end_ns = now_ns + max(0, round(flow.left / rate))
            flow.version += 1
            changed(flow)
