"""What an op costs: features of its sizes times the coefficients of a `HardwareProfile`.

Calibration fits the same features, so their names are the contract. Each is `kind.feature`, and
its coefficient is in seconds per unit of the feature. A load also pays its tier: a latency per
read, then its bytes on a link that loads share (simulator/resources.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ..core.errors import ProfileError
from ..core.hardware import HardwareProfile
from ..core.model_spec import ModelSpec
from ..core.ops import Op, OpKind
from ..core.units import NS_PER_S, s_to_ns

SMALL_ROWS = 64
"""Rows up to which a prefill is bound by reading the weights; they have their own slope."""

DISPATCH_GAP = "dispatch.gap"
"""Coefficient: seconds from an op being ready (stream free, dependencies done) to its start."""

WAKE_AFTER_NS = 1_000_000
"""A stream that was idle for this long has to wake: its thread sleeps, its data left the caches."""

FEATURES: dict[OpKind, tuple[str, ...]] = {
    "load": ("load.op",),
    "restore": ("restore.op", "restore.layer", "restore.piece", "restore.byte"),
    "select": ("select.op", "select.chunk", "select.row"),
    "prefill": (
        "prefill.op",
        "prefill.layer",
        "prefill.sparse_layer",
        "prefill.small_flop",
        "prefill.flop",
        "prefill.attention_flop",
        "prefill.causal_flop",
    ),
    "head": ("head.op",),
    "decode": (
        "decode.op",
        "decode.layer",
        "decode.batched_layer",
        "decode.row_layer",
        "decode.attention_flop",
    ),
}
"""Feature names by op kind, in the order of `feature_values`."""

COEFFICIENTS = (*(name for names in FEATURES.values() for name in names), DISPATCH_GAP)
"""Every coefficient that a complete profile holds."""


def wake_coefficient(kind: OpKind) -> str:
    """Name of the optional coefficient, in seconds, of an op that starts on an idle stream."""
    return f"{kind}.wake"


class LoadParts(NamedTuple):
    """A load's cost: a fixed time, then bytes on the tier's shared link."""

    fixed_ns: int
    """Overhead of the op and the latency of its reads; no bandwidth is used."""
    n_bytes: int
    alone_ns: int
    """Time of the bytes on an otherwise idle link."""


def features(op: Op, model: ModelSpec) -> dict[str, float]:
    """Sizes of `op` that its duration is linear in, by name; zero rows leave the op's overhead.

    Every name of the op's kind is there, zero or not; the unit is what the name counts.
    """
    return dict(zip(FEATURES[op.kind], _VALUES[op.kind](op, model), strict=True))


class CostModel:
    """Durations of ops on the machine and model of one profile."""

    def __init__(self, profile: HardwareProfile) -> None:
        self.profile = profile
        self.model = profile.model
        self._by_kind: dict[OpKind, tuple[float, ...]] = {}

    @property
    def dispatch_gap_ns(self) -> int:
        """Time from an op being ready to its start.

        Raises:
            ProfileError: the profile lacks `dispatch.gap`.
        """
        return s_to_ns(self._coefficient(DISPATCH_GAP))

    def wake_ns(self, op: Op) -> int:
        """What `op` takes longer on a stream that was idle; 0 where the profile does not say."""
        found = self.profile.coefficients.get(wake_coefficient(op.kind))
        return s_to_ns(found.value) if found is not None else 0

    def duration_ns(self, op: Op) -> int:
        """Time an op that is not a load takes, alone or not.

        Raises:
            ProfileError: a coefficient of its kind is missing.
        """
        seconds = 0.0
        for factor, value in zip(
            self._coefficients(op.kind), _VALUES[op.kind](op, self.model), strict=True
        ):
            seconds += factor * value
        return s_to_ns(seconds)

    def load_ns(self, op: Op) -> LoadParts:
        """Parts of a load: what is fixed, and what shares the link.

        Raises:
            ProfileError: a coefficient or the op's tier is missing.
        """
        tier = self.profile.tier(op.tier)
        (overhead_s,) = self._coefficients("load")
        rate = min(tier.worker_bytes_per_s, tier.link_bytes_per_s)
        return LoadParts(
            fixed_ns=s_to_ns(overhead_s + op.n_reads * tier.read_latency_s),
            n_bytes=op.n_bytes,
            alone_ns=round(op.n_bytes * NS_PER_S / rate),
        )

    def alone_ns(self, op: Op) -> int:
        """Time `op` takes with no other load on its link, the dispatch gap left out."""
        if op.kind != "load":
            return self.duration_ns(op)
        parts = self.load_ns(op)
        return parts.fixed_ns + parts.alone_ns

    def _coefficients(self, kind: OpKind) -> tuple[float, ...]:
        found = self._by_kind.get(kind)
        if found is None:
            found = tuple(self._coefficient(name) for name in FEATURES[kind])
            self._by_kind[kind] = found
        return found

    def _coefficient(self, name: str) -> float:
        found = self.profile.coefficients.get(name)
        if found is None:
            known = ", ".join(sorted(self.profile.coefficients)) or "none"
            raise ProfileError(
                f"the profile must hold the coefficient '{name}'",
                values=f"profile {self.profile.name!r} with {known}",
                remedy="calibrate again, or add the coefficient to the profile",
            )
        return found.value


def _load(op: Op, model: ModelSpec) -> tuple[float, ...]:
    return (1.0,)


def _restore(op: Op, model: ModelSpec) -> tuple[float, ...]:
    if not op.n_tokens:
        return (1.0, 0.0, 0.0, 0.0)
    layers = op.layer_stop - op.layer_start
    return (1.0, float(layers), float(op.n_reads), float(op.n_bytes))


def _select(op: Op, model: ModelSpec) -> tuple[float, ...]:
    return (1.0, float(len(op.chunks)), float(op.n_tokens))


def _prefill(op: Op, model: ModelSpec) -> tuple[float, ...]:
    rows, layers = op.n_tokens, op.layer_stop - op.layer_start
    if not rows:
        return (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    small = min(rows, SMALL_ROWS)
    attention = float(model.attention_flops(op.n_scored, layers))
    # A whole prompt from position 0 needs no positions: no plan, no mask, a faster causal kernel.
    causal = op.n_pairs == rows * (rows + 1) // 2
    return (
        1.0,
        float(layers),
        0.0 if causal else float(layers),
        float(model.linear_flops(small, layers)),
        float(model.linear_flops(rows - small, layers)),
        0.0 if causal else attention,
        attention if causal else 0.0,
    )


def _head(op: Op, model: ModelSpec) -> tuple[float, ...]:
    return (1.0,)


def _decode(op: Op, model: ModelSpec) -> tuple[float, ...]:
    rows, layers = op.n_tokens, op.layer_stop - op.layer_start
    if not rows:
        return (1.0, 0.0, 0.0, 0.0, 0.0)
    return (
        1.0,
        float(layers),
        # One row is a matrix times a vector; several take another kernel.
        float(layers) if rows > 1 else 0.0,
        float(rows * layers),
        float(model.attention_flops(op.n_pairs, layers)),
    )


_VALUES: dict[OpKind, Callable[[Op, ModelSpec], tuple[float, ...]]] = {
    "load": _load,
    "restore": _restore,
    "select": _select,
    "prefill": _prefill,
    "head": _head,
    "decode": _decode,
}
