"""Time of a step of a mixture of experts, from operator tables: one engine, or several in lockstep.

Engines of a data-parallel group share the experts of every layer: each engine runs attention for
its own requests, then the rows of all are gathered by all, each multiplies them by its experts, and
the parts are summed and scattered back (vLLM, expert parallelism: all-gather and reduce-scatter).
Tables: casys-kaist/LLMServingSim, profiler/perf (MIT).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .step_profile import ALONE, Collective, Curve, Step, StepProfile


class Routing(NamedTuple):
    """Of a model whose rows each go to `n_used` of `n_experts`."""

    n_experts: int
    n_used: int

    def activated(self, n_rows: int, n_engines: int) -> float:
        """Experts of one engine that some of `n_rows` go to, were all chosen alike often."""
        missed = (1 - self.n_used / self.n_experts) ** n_rows
        return self.n_experts / n_engines * (1 - missed)


@dataclass(frozen=True)
class ExpertTable:
    """Microseconds of one layer's experts: by rows, over the number of experts they go to."""

    rows: tuple[int, ...]
    us: tuple[Curve, ...]

    def at(self, n_rows: float, activated: float) -> float:
        """Linear between rows; the slope of the last stretch beyond them."""
        if len(self.rows) == 1:
            return self.us[0].at(activated)
        i = min(max(bisect_right(self.rows, n_rows) - 1, 0), len(self.rows) - 2)
        share = max((n_rows - self.rows[i]) / (self.rows[i + 1] - self.rows[i]), 0.0)
        low, high = (self.us[j].at(activated) for j in (i, i + 1))
        return low + share * (high - low)


@dataclass(kw_only=True)
class ExpertProfile(StepProfile):
    """`StepProfile` of a model with experts; `steps_s` takes one `Step` of each engine.

    Args:
        dispatch: gathering rows and what the router said of them, by the rows of all engines.
        combine: summing and scattering them back, by the same.
    """

    routing: Routing
    experts: ExpertTable
    dispatch: Collective = ALONE
    combine: Collective = ALONE

    def steps_s(self, steps: Sequence[Step]) -> float:
        """Seconds of a step that all engines take together; an idle one takes a row along."""
        if not any(s.n_tokens for s in steps):
            return 0.0
        tokens = [max(s.n_tokens, 1) for s in steps]
        padded = [self.padded(n) for n in tokens]
        if self.capture_sizes and max(tokens) <= self.capture_sizes[-1]:
            padded = [max(padded)] * len(steps)  # one graph, of one size, on all of them
        n_rows = sum(padded)
        each = list(zip(steps, padded, strict=True))
        layer_us = (
            max(self.layer_us(step, n) for step, n in each)
            + self.dispatch.at(n_rows)
            + self.experts.at(n_rows / len(steps), self.routing.activated(sum(tokens), len(steps)))
            + self.combine.at(n_rows)
        )
        once_us = max(self.once_a_step_us(step, n) for step, n in each)
        return (self.n_layers * layer_us + once_us) * 1e-6 + self.overhead_s
