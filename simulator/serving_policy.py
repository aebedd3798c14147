"""Fates of a prompt's tokens, on the level of requests: which rows are computed, what is loaded.

The rules are those of `core/policies.py` with one band and one ratio per tier; rows that are
recomputed are taken as evenly spread over their chunk, as `core/lowering.py` takes them.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..core.policies import Backlog, n_recomputed, room
from .serving_fleet import ReusePolicy, TierSpec
from .serving_jobs import Job, Run
from .serving_tiers import ChunkTiers


class Fates:
    """A policy over the tiers of a fleet, compiled."""

    __slots__ = ("_counts", "_ratios", "_rhos", "chained", "loads_exact", "policy", "tokens_of")

    def __init__(
        self,
        policy: ReusePolicy,
        tiers: Sequence[TierSpec],
        chained: bool,
        tokens_of: Sequence[int],
    ) -> None:
        self.policy = policy
        self.chained = chained or policy.name == "prefix_cache"
        """Whether what a tier holds is exact wherever it is found."""
        self.tokens_of = tokens_of
        self.loads_exact = policy.load_exact
        self._ratios = [policy.ratio(t.name) for t in tiers]
        self._rhos = [policy.rho.get(t.name, 0.0) for t in tiers]
        self._counts: dict[tuple[int, int], int] = {}

    def decide(
        self, job: Job, n_hit: int, keys: Sequence[int], found: list[int], rooms: dict[int, float]
    ) -> dict[int, list[int]]:
        """Set the rows that `job` computes behind its first `n_hit` chunks (in GPU memory).

        Args:
            keys, found: of the other chunks; the tier each lies in, -1 for none. What is not
                loaded, as that would take longer, is taken out of `found`.
            rooms: by tier: tokens that may be loaded from it; as `rooms_of` has it.

        Returns:
            By tier: [chunks loaded, tokens loaded, tokens of those chunks that are recomputed].
        """
        tokens_of, chained, exact_again = self.tokens_of, self.chained, not self.loads_exact
        at = job.ends[n_hit - 1] if n_hit else 0
        runs: list[Run] = []
        loads: dict[int, list[int]] = {}
        new: list[int] = []
        dense = at - job.position  # rows right before `at` that are computed in one run
        for ordinal, (key, tier) in enumerate(zip(keys, found, strict=True), n_hit):
            n = tokens_of[key]
            if tier < 0:
                new.append(key)
                dense += n
            else:
                is_exact = chained or not ordinal
                again = exact_again * n if is_exact else self._n_again(tier, n)
                if again < n and tier in rooms:
                    if n - again <= rooms[tier]:
                        rooms[tier] -= n - again
                    else:
                        again = n
                        found[ordinal - n_hit] = -1
                        job.unloaded.setdefault(tier, []).append(key)
                        new.append(key)
                if again >= n:
                    dense += n
                else:
                    if dense:
                        runs.append((dense, at - dense, 1.0))
                        dense = 0
                    if again:
                        runs.append((again, at, n / again))
                    if not chained and ordinal:
                        job.n_nameable = min(job.n_nameable, ordinal)
                    load = loads.get(tier)
                    if load is None:
                        loads[tier] = [1, n - again, again]
                    else:
                        load[0] += 1
                        load[1] += n - again
                        load[2] += again
            at += n
        job.new_keys = new
        if loads:
            dense += job.n_tokens - at
            if dense:
                runs.append((dense, job.n_tokens - dense, 1.0))
            if not runs:  # everything is there; the last token is computed for its logits
                runs = [(1, job.n_tokens - 1, 1.0)]
                load = loads[found[-1]]
                load[1] -= 1
                load[2] += 1
            runs.reverse()
            job.runs = runs
            job.rows_left = sum([run[0] for run in runs])
        return loads

    def rooms_of(
        self, job: Job, n_hit: int, keys: Sequence[int], found: Sequence[int], tiers: ChunkTiers
    ) -> dict[int, float]:
        """Tokens that may be loaded from each tier that has something, where that is limited."""
        slow = {at for at in {*found} if at >= 0 and self._rhos[at] > 1}
        if not slow:
            return {}
        n_rows = job.rows_left
        for ordinal, (key, at) in enumerate(zip(keys, found, strict=True), n_hit):
            if at >= 0 and at not in slow:
                n_rows -= self.tokens_of[key] - self._n_computed(ordinal, key, at)
        replica, per_token = job.replica, self.policy.kv_bytes_per_token
        n_ahead = replica.outstanding - replica.queued
        backlog = Backlog(n_ahead, replica.n_waiting - 1, replica.queued)  # itself still waits
        rooms = {}
        for at in slow:
            n_loading = tiers.tiers[at].link.n_bytes // per_token
            rooms[at] = room(self._rhos[at], n_rows, replica.budget, n_loading, backlog)
        return rooms

    def _n_computed(self, ordinal: int, key: int, tier: int) -> int:
        """Tokens of a chunk in `tier` that are computed all the same."""
        n = self.tokens_of[key]
        if self.chained or not ordinal:
            return 0 if self.loads_exact else n
        return self._n_again(tier, n)

    def _n_again(self, tier: int, n: int) -> int:
        """Tokens of a found chunk that are computed again, where it is not exact."""
        key = tier, n
        count = self._counts.get(key)
        if count is None:
            count = self._counts[key] = self._count(tier, n)
        return count

    def _count(self, tier: int, n: int) -> int:
        name = self.policy.name
        if self._ratios[tier] >= 1:
            return n
        if name == "epic":
            return min(self.policy.epic_tokens, n)
        if name == "cachetune":
            return n_recomputed(self._ratios[tier], n)
        if name == "cacheblend":
            share = min(1.0, self.policy.check_layer / self.policy.n_layers)
            return min(n, n_recomputed(self._ratios[tier] * (1 - share) + share, n))
        return 0


def take_rows(job: Job, n: int) -> tuple[int, int]:
    """The next `n` rows of a job as one piece: (rows, tokens before it).

    A piece that is spread sees as many (query, key) pairs as one with that many tokens before it.
    """
    job.rows_left -= n
    runs = job.runs
    if runs is None:
        at = job.position
        job.position = at + n
        return n, at
    pairs = 0.0
    left = n
    while left:
        rows, start, spacing = runs.pop()
        if rows > left:
            runs.append((rows - left, start + round(left * spacing), spacing))
            rows = left
        pairs += rows * (start + rows * spacing / 2)
        left -= rows
    return n, max(0, round(pairs / n - n / 2))


def peek_rows(job: Job, n: int) -> tuple[int, int]:
    """What `take_rows` would return, and nothing is taken."""
    rows_left, position, runs = job.rows_left, job.position, job.runs
    if runs is not None:
        job.runs = runs.copy()
    piece = take_rows(job, n)
    job.rows_left, job.position, job.runs = rows_left, position, runs
    return piece
