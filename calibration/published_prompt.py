"""One published machine and one prompt on it, through the project's lowering and executor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import count

from ..core.decision import ChunkFate, ReuseDecision
from ..core.executor import execute
from ..core.lowering import lower
from ..core.ops import Op, Schedule
from ..core.plan import ReusePlan
from ..simulator.executor import SimExecutor
from .published_models import model_of
from .published_profile import profile_of

MODEL = "Mistral-7B"
SUFFIX_TOKENS = 32
N_CHUNKS = 6
TRANSFERRED_FROM = 2
"""Layer 0 is computed for all tokens and layer 1 projects all: K and V of both are fresh."""
PLAN = ReusePlan(layer_group=1, look_ahead=1, prefill_chunk_tokens=1 << 20)


@dataclass(frozen=True)
class Machine:
    """Tiers and overheads of one platform; rates in bytes/s, overheads in seconds."""

    gpu: str
    tiers: tuple[tuple[str, float], ...]
    blend_s: float = 0.0
    select_s: float = 0.0

    def ttft_s(self, decision: ReuseDecision, blends: bool, first_transferred: int = 0) -> float:
        """TTFT of one prompt, by lowering and simulation; layers below the first load nothing."""
        extra = {"head.op": self.blend_s} if blends else {}
        if decision.selection == "deviation":
            extra["select.op"] = self.select_s
        profile = profile_of(MODEL, self.gpu, dict(self.tiers), extra)
        ids = count()
        pieces = lower(0, decision, PLAN, profile.model, lambda: next(ids))
        schedule = _from_layer([op for piece in pieces for op in piece], first_transferred)
        return execute(schedule, SimExecutor(profile)).makespan_ns / 1e9

    def full_recompute_s(self, n_tokens: int) -> float:
        """Everything computed."""
        return self.ttft_s(_decision([_computed(n) for n in _chunks(n_tokens)]), False)

    def prefix_cache_s(self, n_tokens: int, tier: str, n_hit: int) -> float:
        """The first `n_hit` tokens loaded, the rest computed."""
        hit = ChunkFate(0, n_hit, tier, "prefix", True, (0,))
        return self.ttft_s(_decision([hit, _computed(n_tokens - n_hit)]), False)

    def cachetune_s(self, n_tokens: int, tier: str, ratio: float) -> float:
        """`ratio` of each chunk recomputed, all of it in the first layer."""
        n_layers = model_of(MODEL).n_layers
        fates = [
            ChunkFate(0, n, tier, "chunk", False, (n, *(int(ratio * n),) * (n_layers - 1)))
            for n in _chunks(n_tokens)
        ]
        project_s = n_tokens * profile_of(MODEL, self.gpu, {}).coefficients["select.row"].value
        decision = _decision(fates, n_layers)
        return self.ttft_s(decision, True, TRANSFERRED_FROM) + project_s

    def cacheblend_s(self, n_tokens: int, tier: str, ratio: float) -> float:
        """All loaded from layer 1 on, where `ratio` of the tokens are selected."""
        fates = [ChunkFate(0, n, tier, "chunk", False, (0,)) for n in _chunks(n_tokens)]
        placed = _decision(fates).chunks
        selected = sum(int(ratio * f.n_tokens) for f in placed)
        decision = ReuseDecision(placed, SUFFIX_TOKENS, 1, "deviation", 1, selected)
        return self.ttft_s(decision, True)


def _from_layer(ops: list[Op], first: int) -> Schedule:
    """The ops without loads and restores of layers below `first`."""
    gone = {o.op_id for o in ops if o.kind in ("load", "restore") and o.layer_start < first}
    return Schedule.of(
        replace(o, deps=tuple(d for d in o.deps if d not in gone))
        for o in ops
        if o.op_id not in gone
    )


def _chunks(n_tokens: int) -> list[int]:
    return [n_tokens * (i + 1) // N_CHUNKS - n_tokens * i // N_CHUNKS for i in range(N_CHUNKS)]


def _computed(n_tokens: int) -> ChunkFate:
    return ChunkFate(0, n_tokens, "", "", False, (n_tokens,))


def _decision(fates: list[ChunkFate], n_bands: int = 1) -> ReuseDecision:
    """The fates one behind the other."""
    placed, offset = [], 0
    for f in fates:
        placed.append(ChunkFate(offset, f.n_tokens, f.tier, f.key, f.exact, f.n_recompute))
        offset += f.n_tokens
    return ReuseDecision(tuple(placed), SUFFIX_TOKENS, n_bands)
