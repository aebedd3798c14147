"""`ProfileStepCost`: a calibrated `HardwareProfile` as what the serving simulator needs.

A step of the runtime is its ops in a row, as `core/lowering.py` makes them, each with its dispatch
gap: prefill by layer group and a head for each prompt piece, one op for all decodes. Interference
between streams and noise are not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import NamedTuple

from ..core.chunk_index import ChunkEntry
from ..core.hardware import HardwareProfile
from ..core.lowering import lower
from ..core.ops import COMPUTE, Op, OpKind
from ..core.pairs import Run, scored_pairs
from ..core.plan import ReusePlan
from ..core.policies import decide
from ..core.units import NS_PER_S
from .cost import CostModel, LoadParts, features

Shape = tuple[tuple[int, str, str], ...]
"""Of a prompt: (tokens, tier or "" where nothing is kept, kind of the entry) of each chunk."""


class GroupWork(NamedTuple):
    """Ops of one layer group of a piece, nanoseconds; -1 where there is no such op."""

    loads: tuple[tuple[str, LoadParts], ...]
    """(stream, parts)."""
    select_ns: int
    restore_ns: int
    prefill_ns: int


class PieceWork(NamedTuple):
    """One piece of a prompt."""

    n_rows: int
    """Most rows that pass through a layer."""
    groups: tuple[GroupWork, ...]
    head_ns: int


class ProfileStepCost:
    """`StepCost` and `PieceCost` of the profile's machine and model under a plan.

    Raises:
        ProfileError: the profile lacks a coefficient.
    """

    def __init__(self, profile: HardwareProfile, plan: ReusePlan | None = None) -> None:
        self.plan = plan or ReusePlan()
        self.model = profile.model
        self.cost = CostModel(profile)
        self.gap_ns = self.cost.dispatch_gap_ns
        self._gap_s = self.gap_ns / NS_PER_S
        self._value = {name: c.value for name, c in profile.coefficients.items()}
        self._pieces: dict[tuple[Shape, int], tuple[PieceWork, ...]] = {}

    def step_s(
        self,
        pieces: Sequence[tuple[int, int]],
        n_decode: int,
        kv_decode_tokens: int,
        kv_decode_max: int | None = None,
    ) -> float:
        """One step; see `StepCost`."""
        seconds = sum([self._piece_s(*piece) for piece in pieces])
        if n_decode:
            seconds += self._decode_s(n_decode, kv_decode_tokens)
        return seconds

    def decode_run_s(self, n_decode: int, kv_decode_tokens: int, n_steps: int) -> float:
        """`n_steps` decode steps in a row: linear in the context, so an arithmetic series."""
        if n_steps <= 0 or n_decode <= 0:
            return 0.0
        first = self._decode_s(n_decode, kv_decode_tokens)
        last = self._decode_s(n_decode, kv_decode_tokens + (n_steps - 1) * n_decode)
        return n_steps * (first + last) / 2

    def pieces_of(self, shape: Shape, n_suffix: int) -> tuple[PieceWork, ...]:
        """Pieces of a prompt by the plan's policy, as its ops would be; alike prompts once."""
        found = self._pieces.get((shape, n_suffix))
        if found is None:
            entries = [
                ChunkEntry("", "", n, 0, tier, kind=kind) if tier else None  # type: ignore[arg-type]
                for n, tier, kind in shape
            ]
            decision = decide(self.plan, entries, [n for n, _, _ in shape], n_suffix)
            ids = count()
            pieces = lower(0, decision, self.plan, self.model, ids.__next__)
            found = self._pieces[shape, n_suffix] = tuple(self._work(ops) for ops in pieces)
        return found

    def wake_ns(self, kind: OpKind) -> int:
        """What an op takes longer on a stream that was idle."""
        return self.cost.wake_ns(self._op(kind, 0, 0))

    def _work(self, ops: Sequence[Op]) -> PieceWork:
        groups = []
        loads: list[tuple[str, LoadParts]] = []
        select = restore = head = -1
        n_rows = 0
        for op in ops:
            if op.kind == "load":
                loads.append((op.stream, self.cost.load_ns(op)))
                continue
            ns = self.cost.duration_ns(op)
            if op.kind == "select":
                select = ns
            elif op.kind == "restore":
                restore = ns
            elif op.kind == "head":
                head = ns
            else:
                n_rows = max(n_rows, op.n_tokens)
                groups.append(GroupWork(tuple(loads), select, restore, ns))
                loads, select, restore = [], -1, -1
        return PieceWork(n_rows, tuple(groups), head)

    def _piece_s(self, n_query: int, n_context: int) -> float:
        run = Run(0, n_context, n_query, n_query, 0, n_query)
        n_layers, size = self.model.n_layers, self.plan.layer_group
        n_whole, rest = divmod(n_layers, size)
        seconds = self._seconds(self._op("head", 0, 1)) + self._gap_s
        pairs, scored = run.pairs, scored_pairs([run])
        for layers, times in ((size, n_whole), (rest, 1)):
            if layers and times:
                op = self._op("prefill", layers, n_query, pairs, scored)
                seconds += times * (self._seconds(op) + self._gap_s)
        return seconds

    def _decode_s(self, n_decode: int, kv_tokens: int) -> float:
        op = self._op("decode", self.model.n_layers, n_decode, kv_tokens + n_decode)
        return self._seconds(op) + self._gap_s

    def _seconds(self, op: Op) -> float:
        return sum([self._value[name] * x for name, x in features(op, self.model).items()])

    def _op(
        self, kind: OpKind, n_layers: int, n_tokens: int, n_pairs: int = 0, n_scored: int = 0
    ) -> Op:
        return Op(0, kind, COMPUTE, (0,), 0, n_layers, n_tokens, n_pairs, n_scored)
