"""Plans that the search must not lose to: they are enqueued before anything is sampled.

Roofline balance: r0 = t_i / (t_c + t_i) makes computing r tokens as long as loading the rest
(CacheTune 2605.24022, section 4.3).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.chunk_index import ChunkIndex
from ..core.engine import schedule_of
from ..core.hardware import HardwareProfile
from ..core.layout import chunk_bytes
from ..core.plan import ReusePlan
from ..core.workload import Workload
from ..simulator.cost import CostModel
from .space import Bounds, Params, params_with

PAPER_RATIO = 0.15
EPIC_TOKENS = 16


@dataclass(frozen=True)
class Baseline:
    """A named point of the search space."""

    name: str
    params: Params


@dataclass(frozen=True)
class TokenTimes:
    """Seconds per prompt token, over all layers, each alone on the machine."""

    compute_s: float
    """t_c: recompute at the workload's length."""
    transfer_s: float
    """t_i: load from the tier."""

    @property
    def rho(self) -> float:
        """t_i / t_c."""
        return self.transfer_s / self.compute_s

    @property
    def ratio(self) -> float:
        """The roofline balance r0."""
        return roofline_ratio(self.compute_s, self.transfer_s)


def roofline_ratio(compute_s: float, transfer_s: float) -> float:
    """t_i / (t_c + t_i), from seconds per token.

    >>> roofline_ratio(3.0, 1.0)
    0.25
    """
    return transfer_s / (compute_s + transfer_s)


def token_times(profile: HardwareProfile, workload: Workload, tier: str) -> TokenTimes:
    """t_c and t_i of a workload by the profile's cost model.

    t_c is the mean over requests of the prompt's compute by all-layer ops over its tokens; t_i
    is the tier's rate for whole blobs, with one read latency per layer, over the chunks' tokens.

    Raises:
        ProfileError: no such tier, or a coefficient is missing.
    """
    cost = CostModel(profile)
    model = profile.model
    plan = ReusePlan(policy="full_recompute", layer_group=model.n_layers)
    nothing = ChunkIndex()
    seconds = []
    for request in workload.requests:
        _, ops = schedule_of(workload, request, model, plan, nothing)
        alone_ns = sum(cost.alone_ns(op) for op in ops)
        seconds.append(alone_ns / 1e9 / workload.prompt_tokens(request))
    place = profile.tier(tier)
    rate = min(place.link_bytes_per_s, place.worker_bytes_per_s)
    lengths = [c.n_tokens for c in workload.contents.values()]
    moved_s = sum(
        chunk_bytes(model, n) / rate + model.n_layers * place.read_latency_s for n in lengths
    )
    transfer_s = moved_s / sum(lengths) if lengths else 0.0
    return TokenTimes(sum(seconds) / len(seconds), transfer_s)


def baselines(bounds: Bounds, profile: HardwareProfile, workload: Workload) -> list[Baseline]:
    """Known plans inside `bounds`, with the default stream schedule.

    Recompute in one op per prompt is among them: the fastest baseline there is without reuse.
    """
    whole = profile.model.n_layers
    wanted: list[tuple[str, Params]] = [
        ("full_recompute", {"policy": "full_recompute", "layer_group": whole}),
        ("prefix_cache", {"policy": "prefix_cache"}),
        ("full_reuse", {"policy": "full_reuse"}),
        ("cachetune_0.15", {"policy": "cachetune", "ratio": PAPER_RATIO}),
        ("cacheblend_0.15", {"policy": "cacheblend", "ratio": PAPER_RATIO}),
        ("epic_16", {"policy": "epic", "epic_tokens": EPIC_TOKENS}),
    ]
    out = [
        Baseline(name, params_with(bounds, **changes))
        for name, changes in wanted
        if changes["policy"] in bounds.policies
    ]
    if "cachetune" in bounds.policies:
        roofline = params_with(bounds, policy="cachetune")
        for tier in bounds.tiers:
            ratio = token_times(profile, workload, tier).ratio
            roofline[f"ratio.{tier}"] = max(bounds.ratio_min, ratio)
        out.append(Baseline("roofline_r0", roofline))
    return out
