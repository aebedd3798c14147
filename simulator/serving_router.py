"""`Router`: which replica gets a request.

`round_robin` takes turns; `least_load` takes the one with the fewest prompt tokens still to compute
(ties: fewest requests, then in turn). The two with affinity weigh what a replica has been sent
before: they minimise tokens to compute there, this prompt's misses included. `prefix_affinity`
counts chunks from the start of the prompt, `chunk_affinity` wherever they stand. They know what
they sent, not what was evicted since.
"""

from __future__ import annotations

from collections.abc import Sequence

from .serving_fleet import RouterName
from .serving_jobs import Job
from .serving_replica import Replica


class Router:
    """One per fleet."""

    def __init__(
        self, name: RouterName, replicas: Sequence[Replica], tokens_of: Sequence[int]
    ) -> None:
        self.name = name
        self.replicas = list(replicas)
        self.tokens_of = tokens_of
        self._turn = -1
        self._sent: dict[int, int] = {}
        """Per chunk, a bit for each replica that was sent it."""

    def choose(self, job: Job) -> Replica:
        """The replica that serves `job`."""
        replicas = self.replicas
        n = len(replicas)
        if n == 1:
            return replicas[0]
        self._turn = (self._turn + 1) % n
        if self.name == "round_robin":
            return replicas[self._turn]
        matched = [0] * n if self.name == "least_load" else self._matched(job)
        best, best_cost = replicas[self._turn], (1 << 62, 0)
        for k in range(n):
            i = (self._turn + k) % n
            replica = replicas[i]
            cost = replica.outstanding - matched[i], replica.n_inside
            if cost < best_cost:
                best, best_cost = replica, cost
        if self.name != "least_load":
            self._remember(job, best.index)
        return best

    def _matched(self, job: Job) -> list[int]:
        """Tokens of the prompt that each replica was sent before."""
        by_mask: dict[int, int] = {}
        sent, tokens_of = self._sent, self.tokens_of
        prefix = self.name == "prefix_affinity"
        mask = -1
        for key, content in zip(job.keys, job.content_keys, strict=True):
            if prefix:
                mask &= sent.get(key, 0)
                if not mask:
                    break
            else:
                mask = sent.get(content, 0)
                if not mask:
                    continue
            by_mask[mask] = by_mask.get(mask, 0) + tokens_of[content]
        found = [0] * len(self.replicas)
        for mask, tokens in by_mask.items():
            i = 0
            while mask:
                if mask & 1:
                    found[i] += tokens
                mask >>= 1
                i += 1
        return found

    def _remember(self, job: Job, index: int) -> None:
        bit = 1 << index
        sent = self._sent
        for key in job.keys if self.name == "prefix_affinity" else job.content_keys:
            sent[key] = sent.get(key, 0) | bit
