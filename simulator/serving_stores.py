"""`Stores`: the tiers of all replicas, and what an admitted prompt finds there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..core.step_cost import StepCost
from .profile_step_cost import Shape
from .serving_eviction import order_of
from .serving_fleet import Fleet, TierSpec
from .serving_jobs import Job, JobFeed
from .serving_policy import Fates
from .serving_tiers import ChunkTiers, TierState
from .serving_worth import Worth

Snapshot = Mapping[str, Sequence[Any]]
"""Names of chunks by tier and replica (once if shared), coldest first."""


class Stores:
    """One `ChunkTiers` per replica; those that are shared are the same in all."""

    def __init__(self, fleet: Fleet, feed: JobFeed, cost: StepCost) -> None:
        specs = fleet.replica.tiers
        self._feed = feed
        self._specs = specs
        policy = fleet.policy
        if fleet.replica.limits.steps == "pieces":  # the cost's plan decides how much is loaded
            policy = policy.replace(rho={})
        self._fates = Fates(policy, specs, feed.table.chained, feed.tokens_of)
        self._reuses = bool(specs) and fleet.policy.name != "full_recompute"
        self._by_prefix = fleet.policy.name == "prefix_cache"
        self._worth = Worth(feed, cost)
        shared = [self._tier(t) for t in specs if t.shared]
        sizes = feed.bytes_of, max(feed.bytes_of, default=0)
        self.tiers = [
            ChunkTiers([self._tier(t) for t in specs if not t.shared], shared, *sizes)
            for _ in range(fleet.n_replicas)
        ]

    def _tier(self, spec: TierSpec) -> TierState:
        return TierState(spec, order_of(spec.eviction, self._worth.values, self._worth.next_use))

    def decide(
        self, replica: int, job: Job, n_hit: int, now_ns: int
    ) -> tuple[list[int], dict[int, list[int]]]:
        """The fates of a prompt's tokens behind `n_hit` chunks in GPU memory.

        Returns:
            The tier of each chunk, -1 for those in GPU memory or nowhere; loads as `Fates.decide`.
        """
        nowhere = [-1] * len(job.content_keys)
        job.unloaded = {}
        if not self._reuses or n_hit >= len(nowhere):
            return nowhere, {}
        self._worth.row = job.row
        tiers = self.tiers[replica]
        tiers.settle(now_ns)
        keys = job.content_keys[n_hit:]
        found = tiers.find(keys)
        if self._by_prefix and -1 in found:
            stop = found.index(-1)
            found[stop:] = [-1] * (len(found) - stop)
        loads: dict[int, list[int]] = {}
        if max(found) < 0:
            job.new_keys = keys
        else:
            rooms = self._fates.rooms_of(job, n_hit, keys, found, tiers)
            loads = self._fates.decide(job, n_hit, keys, found, rooms)
            for at, there in job.unloaded.items():
                tiers.tiers[at].order.touch(there)
            if loads:
                tiers.use(keys, found, now_ns)
        return nowhere[:n_hit] + found, loads

    def shape(self, job: Job, found: Sequence[int]) -> Shape:
        """Chunks of a prompt as the policies see them."""
        tokens_of = self._feed.tokens_of
        kind = "prefix" if self._fates.chained else "isolated"
        return tuple(
            (tokens_of[key], self._specs[at].name if at >= 0 else "", kind)
            for key, at in zip(job.content_keys, found, strict=True)
        )

    def fill(self, snapshot: Snapshot) -> None:
        """Contents from before the run."""
        key_of = {name: key for key, name in enumerate(self._feed.names.tolist())}
        for i, spec in enumerate(self._specs):
            for replica, names in enumerate(snapshot.get(spec.name, ())):
                keys = [key_of[name] for name in names if name in key_of]
                self.tiers[min(replica, len(self.tiers) - 1)].fill(i, keys)

    def check(self, end_ns: int) -> None:
        """Writes are done by `end_ns`; tiers hold what they should (INV-4).

        Raises:
            InvariantViolation: both sides.
        """
        for tiers in self.tiers:
            tiers.settle(end_ns)
            tiers.check()
        for tier in self.tiers[0].tiers[len(self.tiers[0].own) :]:
            tier.check(self._feed.bytes_of)
