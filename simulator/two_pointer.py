"""Two pointers over the tokens of a prompt: compute from the front, load from the back (Cake).

Before each step of compute a look at what has been loaded: the step takes only tokens that have
not, and if none are left, loading stops. Source: Cake (ICML'25, arXiv:2410.03065); also the token
axis of CacheFlow v1. The rule has two forms, which agree to the nanosecond: `meeting` from
durations, and `run_two_pointers` from ops, on any executor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ..core.errors import WorkloadError
from ..core.executor import Executor
from ..core.ops import Op, Span
from ..core.timeline import Timeline


class Meeting(NamedTuple):
    """Where the pointers meet."""

    end_ns: int
    """When every token is computed or loaded."""
    n_steps: int
    n_computed: int
    """Tokens computed from the front; the rest came from the back."""


def meeting(
    n_tokens: int,
    step_tokens: int,
    step_ns: Callable[[int, int], int],
    load_tokens: Sequence[int],
    load_ns: Sequence[int],
) -> Meeting:
    """Where the two pointers meet when neither slows the other.

    Args:
        n_tokens: length of the prompt.
        step_tokens: most tokens of a step.
        step_ns: duration of the step that computes `n` tokens behind `offset` of them.
        load_tokens: tokens of each load, the *last* tokens of the prompt first.
        load_ns: duration of each load.

    Raises:
        WorkloadError: the loads do not cover the prompt, or a step is empty.
    """
    _check(n_tokens, step_tokens, load_tokens)
    if len(load_ns) != len(load_tokens):
        raise WorkloadError("each load must have a duration", values=f"{len(load_ns)} durations")
    loaded_at = np.cumsum(np.asarray(load_ns, dtype=np.int64))
    loaded = np.concatenate([[0], np.cumsum(np.asarray(load_tokens, dtype=np.int64))])
    now = computed = n_steps = 0
    while True:
        resident = int(loaded[np.searchsorted(loaded_at, now, side="right")]) if now else 0
        missing = n_tokens - resident - computed
        if missing <= 0:
            return Meeting(now, n_steps, computed)
        n = min(step_tokens, missing)
        now += step_ns(computed, n)
        computed += n
        n_steps += 1


def run_two_pointers(
    executor: Executor,
    n_tokens: int,
    step_tokens: int,
    step_op: Callable[[int, int], Op],
    loads: Sequence[Op],
) -> Timeline:
    """The same rule driven on an executor, which may let the two slow each other.

    Args:
        executor: simulated or real, idle.
        n_tokens: length of the prompt.
        step_tokens: most tokens of a step.
        step_op: the op that computes `n` tokens behind `offset` of them; a new id each time.
        loads: ops that load, the *last* tokens first, on one stream; `n_tokens` are the load's.

    Returns:
        All spans; the pointers met when the last step of compute ended. A load under way by then
        runs out.

    Raises:
        WorkloadError: the loads do not cover the prompt, or a step is empty.
    """
    _check(n_tokens, step_tokens, [op.n_tokens for op in loads])
    start_ns = executor.now_ns()
    to_load = {op.op_id for op in loads}
    left = list(reversed(loads))
    computed, resident, under_way = min(step_tokens, n_tokens), 0, 2
    step = step_op(0, computed)
    executor.submit([step, left.pop()])
    spans: list[Span] = []
    missing = n_tokens - computed
    while under_way:
        done = executor.wait(None)
        spans += done
        under_way -= len(done)
        following: list[Op] = []
        loaded = [s for s in done if s.op.op_id in to_load]
        resident += sum(s.op.n_tokens for s in loaded)
        if any(s.op.op_id == step.op_id for s in done):
            missing = n_tokens - resident - computed
            if missing > 0:
                n = min(step_tokens, missing)
                step = step_op(computed, n)
                computed += n
                following.append(step)
        if loaded and left and missing > 0:
            following.append(left.pop())
        executor.submit(following)
        under_way += len(following)
    return Timeline(spans=tuple(spans), start_ns=start_ns, requests=(), label="two pointers")


def cut(n_tokens: int, size: int) -> list[int]:
    """Pieces of at most `size` tokens, whole ones first."""
    return [min(size, n_tokens - start) for start in range(0, n_tokens, size)]


def _check(n_tokens: int, step_tokens: int, load_tokens: Sequence[int]) -> None:
    if step_tokens < 1 or n_tokens < 1:
        raise WorkloadError(
            "a prompt and its steps must have at least one token",
            values=f"{n_tokens} tokens in steps of {step_tokens}",
        )
    if sum(load_tokens) != n_tokens or min(load_tokens) < 1:
        raise WorkloadError(
            "the loads must cover the prompt",
            values=f"{sum(load_tokens)} of {n_tokens} tokens",
            remedy="cut the prompt into loads",
        )
