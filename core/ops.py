"""`Op`, `Outcome`, `Span`, `Schedule`: planned work, what it found, one execution, a DAG of it.

Ops carry sizes and ids, never tensors. Floor 0 makes them; executors carry them out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from .errors import InvariantViolation

OpKind = Literal["load", "restore", "select", "prefill", "head", "decode"]

QUERY_BLOCK = 64
"""Queries that attention takes at a time."""

COMPUTE = "compute"
RESTORE = "restore"


def io_stream(tier: str, worker: int) -> str:
    """Stream of the I/O worker number `worker` of a tier."""
    return f"io.{tier}.{worker}"


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows [start, stop) of the sorted recomputed tokens of one part of a prompt.

    `part` is the chunk's ordinal in the prompt; the suffix has the ordinal after the last chunk.
    """

    part: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Op:
    """One unit of work on one in-order stream.

    Kinds: `load` (a tier's bytes into staging), `restore` (rotate and scatter staged K and V),
    `select` (project all tokens at the check layer, choose which to recompute), `prefill` (rows
    through layers), `head` (final norm, logits, first token), `decode` (one step of a batch).
    """

    op_id: int
    kind: OpKind
    stream: str
    request_ids: tuple[int, ...]
    layer_start: int
    layer_stop: int
    n_tokens: int = 0
    """Rows that pass through the layers; for load and restore, tokens moved (per layer)."""
    n_pairs: int = 0
    """Visible (query, key) pairs per layer."""
    n_scored: int = 0
    """Pairs that are scored: queries go in blocks, each over the keys up to its last one."""
    n_bytes: int = 0
    n_reads: int = 0
    """I/O requests of a load; (chunk, layer) pieces of a restore."""
    tier: str = ""
    chunks: tuple[int, ...] = ()
    """Ordinals of the chunks a load or restore touches."""
    segments: tuple[Segment, ...] = ()
    """Rows of a prefill."""
    piece: int = 0
    """Which piece of the prompt a prefill computes."""
    deps: tuple[int, ...] = ()
    attempt: int = 0
    device: int = 0
    """Pipeline stage that carries it out, on streams of its own."""
    parts: tuple[Op, ...] = ()
    """Of a prefill of several requests at once: the op of each; its sizes are their sums."""
    passes_on: bool = False
    """A decode step on a stage before the last: it makes no token."""

    @property
    def members(self) -> tuple[Op, ...]:
        """The ops of single requests that this is."""
        return self.parts or (self,)

    @property
    def n_layers(self) -> int:
        """Layers the op covers."""
        return self.layer_stop - self.layer_start


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished op found out. Empty for most ops."""

    failed_chunks: tuple[int, ...] = ()
    """Ordinals whose stored bytes could not be read or did not verify."""
    selected: tuple[int, ...] = ()
    """Prompt positions chosen by a `select` op."""
    token_ids: tuple[int, ...] = ()
    """Tokens made by a `head` or `decode` op, in the order of `request_ids`."""
    ended: tuple[int, ...] = ()
    """Requests whose output ended early, by an end-of-text token."""


NOTHING = Outcome()


@dataclass(frozen=True, slots=True)
class Span:
    """One execution of an op, integer nanoseconds on the executor's clock."""

    op: Op
    seq: int
    """Place in submission order, counted by the executor over all streams."""
    submit_ns: int
    start_ns: int
    end_ns: int
    outcome: Outcome = NOTHING

    @property
    def duration_ns(self) -> int:
        """Time from start to end."""
        return self.end_ns - self.start_ns


@dataclass(frozen=True, slots=True)
class Schedule:
    """A fixed DAG of ops in submission order; deps point backwards."""

    ops: tuple[Op, ...]
    label: str = ""

    @staticmethod
    def of(ops: Iterable[Op], label: str = "") -> Schedule:
        """A checked schedule.

        Raises:
            InvariantViolation: a repeated id, or a dependency that is not submitted before.
        """
        seen: set[int] = set()
        ordered = tuple(ops)
        for op in ordered:
            if op.op_id in seen:
                raise InvariantViolation(f"op ids are unique, but {op.op_id} comes twice")
            missing = [d for d in op.deps if d not in seen]
            if missing:
                raise InvariantViolation(
                    f"deps are submitted before, but op {op.op_id} waits for {missing}"
                )
            seen.add(op.op_id)
        return Schedule(ordered, label)
