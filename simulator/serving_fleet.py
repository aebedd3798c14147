"""What is simulated on the level of requests: tiers, a replica, a policy, a fleet, a router."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field, model_validator

from ..core.plan import RatioRule
from ..core.record import Record
from ..core.workload import Slo

TierEviction = Literal["lru", "lfu", "cost", "belady"]
RouterName = Literal["round_robin", "least_load", "prefix_affinity", "chunk_affinity"]
ReuseName = Literal[
    "full_recompute", "prefix_cache", "full_reuse", "cacheblend", "epic", "cachetune"
]


class ServingLimits(Record):
    """What an engine's scheduler may do; fields and meaning are vLLM's.

    `n_blocks` counts what requests may use, per replica; None: KV memory never runs out.
    """

    max_num_seqs: int = Field(default=256, ge=1)
    max_num_batched_tokens: int = Field(default=8192, ge=1)
    n_blocks: int | None = Field(default=None, ge=1)
    block_size: int = Field(default=16, ge=1)
    prefix_caching: bool = True
    async_scheduling: bool = False
    """Plan a step while the one before runs: what a step frees is seen one step later."""
    steps: Literal["mixed", "pieces"] = "mixed"
    """`mixed`: prompt pieces and decodes in one step, as vLLM. `pieces`: in turn, as this project's
    engine; then the cost must be a `PieceCost`, whose plan holds policy and pieces, and prompts
    share nothing in GPU memory."""

    @model_validator(mode="after")
    def _check(self) -> ServingLimits:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                "max_num_batched_tokens must not be below max_num_seqs, got "
                f"{self.max_num_batched_tokens} < {self.max_num_seqs}: every sequence decodes"
            )
        return self


class TierSpec(Record):
    """Where chunks lie outside GPU memory; rates are of the whole tier, shared by its readers."""

    name: str
    capacity_bytes: int | None = Field(default=None, gt=0)
    read_bytes_per_s: float = Field(gt=0)
    write_bytes_per_s: float = Field(gt=0)
    latency_s: float = Field(default=0.0, ge=0)
    """Before the first byte of a request's load comes."""
    iops: float | None = Field(default=None, gt=0)
    """Reads per second; a chunk is one read per layer (`ReusePolicy.n_layers`)."""
    eviction: TierEviction = "lru"
    shared: bool = False
    """One store for all replicas, over a network; others belong to one replica each."""
    write_buffer_bytes: int | None = Field(default=None, gt=0)
    """Writes that may wait; beyond it new chunks are dropped, and counted. None: no limit."""


class ReplicaSpec(Record):
    """One engine: its limits, the tiers it reads from (fastest first), its link to the host."""

    limits: ServingLimits = ServingLimits()
    tiers: tuple[TierSpec, ...] = ()
    host_link_bytes_per_s: float | None = Field(default=None, gt=0)
    """Everything loaded passes it, whatever the tier; None: never the bottleneck."""
    host_link_duplex: float = Field(default=1.0, gt=0, le=1)
    """Share of that rate which is left to loads while chunks are written the other way."""
    gpu_bytes_per_s: float | None = Field(default=None, gt=0)
    """Bandwidth of its GPUs' memory. Decode steps, which it bounds, go without what lands there;
    steps with prompt pieces, bound by arithmetic, lose nothing. None: nor do decode steps."""
    loads_in_order: bool = False
    """Whether loads of a replica from one tier wait for each other, and its steps for loads, as on
    in-order streams; else loads share the tier's rate evenly and steps begin when they need not
    wait."""

    @model_validator(mode="after")
    def _check(self) -> ReplicaSpec:
        names = [t.name for t in self.tiers]
        if len(set(names)) != len(names):
            raise ValueError(f"tiers must have different names, got {', '.join(names)}")
        kinds = [t.shared for t in self.tiers]
        if kinds != sorted(kinds):
            raise ValueError("shared tiers come after a replica's own, got " + ", ".join(names))
        if self.gpu_bytes_per_s is not None and self.host_link_bytes_per_s is None:
            raise ValueError(
                "gpu_bytes_per_s needs host_link_bytes_per_s: what lands comes over it"
            )
        if self.gpu_bytes_per_s is not None and self.limits.steps == "pieces":
            raise ValueError("gpu_bytes_per_s is for mixed steps, pieces have costs of their own")
        return self


class ReusePolicy(Record):
    """Which tokens of a found chunk are recomputed, and what a token of KV costs to move."""

    name: ReuseName = "cachetune"
    kv_bytes_per_token: int = Field(gt=0)
    """All layers, K and V, in the stored format."""
    n_layers: int = Field(default=32, ge=1)
    """Loads and compute are pipelined over them; a chunk is read layer by layer."""
    recompute_ratio: dict[str, float] = Field(default={"*": 0.15})
    """By tier; "*" holds for the others."""
    load_exact: bool = True
    """Whether chunks that are exact already are loaded whole rather than computed."""
    rho: dict[str, float] = Field(default_factory=dict)
    """By tier: `RatioRule.rho`, of one replica that loads alone. Tiers without an entry are always
    loaded from."""
    epic_tokens: int = Field(default=16, ge=0)
    check_layer: int = Field(default=1, ge=0)
    """`cacheblend` computes the layers below it in full, to select by deviation."""
    select_s_per_token: float = Field(default=0.0, ge=0)
    """Selection on line, per prompt token of a request that loads something."""
    restore_s_per_token: float = Field(default=0.0, ge=0)
    """Dequantise, rotate and scatter, on the compute stream, per loaded token."""
    write_back: bool = True
    """Whether chunks that were computed are kept in the first tier (and in shared ones)."""

    @model_validator(mode="after")
    def _check(self) -> ReusePolicy:
        if any(not 0.0 <= r <= 1.0 for r in self.recompute_ratio.values()):
            raise ValueError(f"each ratio must lie in [0, 1], got {self.recompute_ratio}")
        if any(rho <= 0 for rho in self.rho.values()):
            raise ValueError(f"each rho must be above 0, got {self.rho}")
        return self

    def ratio(self, tier: str) -> float:
        """Share of a chunk in `tier` that is recomputed unless it is exact."""
        return self.recompute_ratio.get(tier, self.recompute_ratio.get("*", 0.0))

    def rules(self) -> tuple[RatioRule, ...]:
        """The same choices as a plan has them, for `core/policies.py`."""
        tiers = dict.fromkeys([*self.recompute_ratio, *self.rho])
        return tuple(
            RatioRule(
                tier=tier,
                ratios=(self.ratio(tier),),
                load_exact=self.load_exact,
                rho=self.rho.get(tier),
            )
            for tier in [*(t for t in tiers if t != "*"), "*"]
        )


class Fleet(Record):
    """Equal replicas behind one router, one policy, and the service levels asked for."""

    policy: ReusePolicy
    replica: ReplicaSpec = ReplicaSpec()
    n_replicas: int = Field(default=1, ge=1)
    router: RouterName = "least_load"
    slo: dict[str, Slo] = Field(default_factory=dict)
    """By class name of the table; "*" holds for the others."""
    priority: tuple[str, ...] = ()
    """Classes that are admitted first, in this order; within one, first come first served."""

    def with_classes(self, slo: Mapping[str, Slo], priority: Sequence[str]) -> Fleet:
        """The same with levels of some classes, and classes that are admitted first."""
        return self.replace(slo={**self.slo, **slo}, priority=tuple(priority))

    def slo_of(self, name: str) -> Slo | None:
        """The level of a class, None where nothing is asked."""
        return self.slo.get(name, self.slo.get("*"))
