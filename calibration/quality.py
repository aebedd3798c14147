"""Answers of every policy and ratio, on the real runtime: what a `QualityProfile` is made of.

An answer is the largest logit at its position of the suffix. Every policy answers the same
contexts. Cut-offs and neighbours of the selectors are those of `core/selectors.py`, fixed before
any evaluation; `spread_high_pass` sees texts of a library, never the evaluated prompt.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, get_args

from ..core.chunk_index import ChunkIndex, content_id_of
from ..core.errors import InvariantViolation
from ..core.plan import PolicyName, RatioRule, ReusePlan, SelectorName
from ..core.policies import n_recomputed, order_of
from ..core.workload import Content, Request, Workload
from .oracles import DEPENDENT_FIRST, ORACLE_DEVIATION, ingest_oracles
from .task_file import TaskRecord, Tokens

if TYPE_CHECKING:
    from ..runtime.loaded_model import LoadedModel
    from ..runtime.runner import Runner

RATIOS = (0.05, 0.10, 0.15, 0.25, 0.35, 0.50)
SELECTORS: tuple[SelectorName, ...] = ("random", "low_pass", "high_pass", "spread_high_pass")
ORACLES = (ORACLE_DEVIATION, DEPENDENT_FIRST)
TIER = "dram"


@dataclass(frozen=True)
class Arm:
    """One policy at one budget. `selector` names a stored order, '' where none matters."""

    policy: PolicyName
    selector: str
    ratio: float

    @property
    def order(self) -> str:
        """The stored order that is read."""
        return self.selector or order_of(ReusePlan(policy=self.policy))

    def plan(self, record: TaskRecord) -> ReusePlan:
        """The plan for one context; an oracle's order is in the index, not in the plan."""
        n_context = sum(map(len, record.chunks))
        known = self.selector in get_args(SelectorName)
        return ReusePlan.model_validate(
            {
                "policy": self.policy,
                "selector": self.selector if known else "low_pass",
                "rules": (RatioRule(ratios=(self.ratio,)),),
                "epic_tokens": n_recomputed(self.ratio, round(n_context / len(record.chunks))),
                # One piece: the logits of the whole suffix are those of the last piece.
                "prefill_chunk_tokens": max(16, n_context + len(record.suffix)),
            }
        )


class Tally(NamedTuple):
    """Right answers and answers asked, of one arm in one context."""

    arm: Arm
    share: float
    """Tokens computed over tokens not exact already, at the last layer; counted, not assumed."""
    counts: tuple[int, int, int, int, int, int]
    """Right and asked: cross-chunk, local, all (with those that carry no such label)."""
    ttft_ms: float = 0.0
    """Of this very run; not kept in the log."""


def all_arms(ratios: Sequence[float] = RATIOS) -> list[Arm]:
    """Policies, selectors and references at every ratio, full recompute first."""
    arms = [Arm("full_recompute", "", 1.0), Arm("full_reuse", "", 0.0)]
    for selector in (*SELECTORS, *ORACLES):
        arms += [Arm("cachetune", selector, r) for r in ratios]
    arms += [Arm("epic", "chunk_start", r) for r in ratios]
    return arms + [Arm("cacheblend", "", r) for r in ratios]


def evaluate(
    loaded: LoadedModel,
    tasks: dict[str, list[TaskRecord]],
    library: Callable[[str, int], Sequence[Tokens]],
    *,
    seed: int = 0,
    ratios: Sequence[float] = RATIOS,
    done: Callable[[str, int], bool] = lambda task, i: False,
) -> Iterator[tuple[str, int, list[Tally]]]:
    """Ask every context with every arm; yields (task, context, tallies) as they come.

    Args:
        library: texts for `spread_high_pass`, of (task, context); with fewer than two, the
            selector is left out for that context.
        seed: of the random selector and of the draw of neighbours.
        done: contexts to skip.
    """
    from ..runtime.runner import Runner
    from ..runtime.tiers import TierConfig

    arms = all_arms(ratios)
    todo = [(t, i) for t, records in tasks.items() for i in range(len(records)) if not done(t, i)]
    if not todo:
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        Runner(loaded, folder, [TierConfig(TIER, "dram")], seed=seed) as runner,
    ):
        for task, i in todo:
            yield task, i, _context(runner, tasks[task][i], library(task, i), arms)


def _context(
    runner: Runner, record: TaskRecord, library: Sequence[Tokens], arms: Sequence[Arm]
) -> list[Tally]:
    workload = workload_of(record)
    orders = ingest_record(runner, record, library)
    indexes = {order: runner.store.index(order) for order in orders}
    tallies = [
        ask(runner, workload, record, arm, indexes[arm.order])
        for arm in arms
        if arm.order in indexes
    ]
    for order in orders:
        for entry in indexes[order].lookup(workload.requests[0].chunks):
            if entry is not None:
                runner.store.discard(entry.key)
    return tallies


def ingest_record(runner: Runner, record: TaskRecord, library: Sequence[Tokens]) -> list[str]:
    """Every chunk in every order, once per context; the names of the orders."""
    orders: list[SelectorName] = [s for s in SELECTORS if s != "spread_high_pass"]
    orders.append("chunk_start")
    if len(library) >= 2:
        orders.append("spread_high_pass")
    for chunk in record.chunks:
        for order in orders:
            runner.ingestor.ingest(chunk, selector=order, tier=TIER, neighbours=library)
    return [*orders, *ingest_oracles(runner, record, TIER)]


def workload_of(record: TaskRecord) -> Workload:
    """One request: the record's chunks, then its questions."""
    ids = [content_id_of(chunk) for chunk in record.chunks]
    request = Request(
        request_id=0,
        arrival_ns=0,
        chunks=tuple(ids),
        suffix_tokens=len(record.suffix),
        suffix_ids=record.suffix,
        max_output_tokens=1,
        output_tokens=1,
    )
    contents = {
        name: Content(n_tokens=len(chunk), token_ids=chunk)
        for name, chunk in zip(ids, record.chunks, strict=True)
    }
    return Workload(name=record.task, contents=contents, requests=(request,))


def ask(
    runner: Runner, workload: Workload, record: TaskRecord, arm: Arm, index: ChunkIndex
) -> Tally:
    """One prompt under one arm: its answers counted, its TTFT measured."""
    request = workload.requests[0]
    result = runner.execute(workload, request, arm.plan(record), index, keep_suffix_logits=True)
    if result.n_read_failures:
        raise InvariantViolation(f"{arm}: {result.n_read_failures} chunks could not be read")
    guesses = result.suffix_logits[0][list(record.answer_positions)].argmax(dim=-1).tolist()
    right = [g == a for g, a in zip(guesses, record.answers, strict=True)]
    counts = []
    for wanted in (True, False):
        of_kind = [r for r, c in zip(right, record.cross_chunk or (), strict=False) if c == wanted]
        counts += [sum(of_kind), len(of_kind)]
    n_reusable = sum(map(len, record.chunks[1:]))
    n_first = 0 if arm.policy == "full_recompute" else len(record.chunks[0])
    kept = result.n_reused_tokens[0] - n_first
    cross_right, n_cross, local_right, n_local = counts
    return Tally(
        arm,
        1 - kept / n_reusable,
        (cross_right, n_cross, local_right, n_local, sum(right), len(right)),
        result.timeline.makespan_ns / 1e6,
    )
