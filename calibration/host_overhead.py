"""Host overhead of runs: which others say what one run's engine costs per step beside its kernels.

A run is predicted by others of its engine version, never by itself: by those of its GPU where there
are any, as the overhead is the host's, and of as many engines, as a group agrees on every step.
Runs that were fitted before are kept.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from statistics import mean
from typing import NamedTuple

from .bundles import Bundle
from .shared_prefixes import DATA


class HostOverhead(NamedTuple):
    """What one run says. Below zero its operator tables are slower than the run."""

    engine: str
    gpu: str
    bundle: str
    started_at: str
    n_engines: int
    overhead_ms: float

    @staticmethod
    def of(bundle: Bundle, overhead_s: float) -> HostOverhead:
        """That of a bundle."""
        run = (bundle.engine, bundle.gpu, bundle.name, bundle.started_at, bundle.n_engines)
        return HostOverhead(*run, overhead_s * 1e3)

    def is_of(self, bundle: Bundle) -> bool:
        """Whether it was fitted on this very run."""
        if self.started_at and bundle.started_at:
            return self.started_at == bundle.started_at
        return self.bundle == bundle.name


@cache
def kept() -> tuple[HostOverhead, ...]:
    """Runs that were fitted before (`bundle_data/README.md`)."""
    rows = json.loads((DATA / "host_overheads.json").read_text(encoding="utf-8"))
    return tuple(HostOverhead(**row) for row in rows)


def evidence_for(bundle: Bundle, others: Sequence[HostOverhead]) -> list[HostOverhead]:
    """Those of `others` that a run's overhead is taken from; empty: its engine is not known."""
    found = [o for o in others if o.engine == bundle.engine and not o.is_of(bundle)]
    found = [o for o in found if o.gpu == bundle.gpu] or found
    return [o for o in found if o.n_engines == bundle.n_engines] or found


def overhead_s(evidence: Sequence[HostOverhead]) -> float:
    """Their mean, those below zero included; not below zero itself."""
    return max(0.0, mean(o.overhead_ms for o in evidence) * 1e-3)
