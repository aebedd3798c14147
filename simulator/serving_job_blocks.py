"""`JobBlocks`: what requests hold of an engine's KV memory, under a name and of their own.

A request that was preempted may find its own blocks again, as long as nobody took them.
"""

from __future__ import annotations

from bisect import bisect_right
from operator import sub

from .serving_blocks import KvBlocks
from .serving_jobs import Job


class JobBlocks(KvBlocks):
    """`KvBlocks` by request; `size` tokens to a block."""

    __slots__ = ("caching", "size")

    def __init__(self, n_blocks: int | None, size: int, caching: bool) -> None:
        super().__init__(n_blocks)
        self.size = size
        self.caching = caching

    def count(self, n_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-n_tokens // self.size)

    def enter(self, job: Job) -> int | None:
        """Take hold of what is cached of a prompt; the chunks it found, None if all of it would
        not fit beside them."""
        if job.need_least > self.n_free and job.key_missing not in self.size_of:
            return None  # as when it was tried last
        size = self.size
        n_hit = n_kept = 0
        if self.caching:
            n_hit = self.prefix(job.keys)
            while n_hit and job.ends[n_hit - 1] >= job.n_tokens:  # the last token is computed
                n_hit -= 1
            if job.n_kept and n_hit == len(job.keys):
                n_kept = min(job.n_kept, self.size_of.get(job.private_key, 0))
                n_kept = min(n_kept, (job.n_tokens - 1) // size - self._n_shared(job, n_hit))
        shared = self._n_shared(job, n_hit)
        held = job.keys[:n_hit]
        need = self.count(job.n_tokens) - shared
        if need + self.n_idle(held) > self.n_free:
            job.need_least = need
            job.key_missing = job.keys[n_hit] if n_hit < len(job.keys) else -1
            return None
        self.touch(held)
        job.held = held
        job.n_private = self.reclaim(job.private_key, n_kept) if n_kept else 0
        job.n_kept = job.need_least = 0
        job.position = (shared + n_kept) * size
        return n_hit

    def grow_to(self, job: Job, n_tokens: int) -> bool:
        """Blocks for its first `n_tokens`; False when there are too few."""
        need = self.count(n_tokens) - self._n_shared(job, len(job.held)) - job.n_private
        if need > self.n_free:
            return False
        if need > 0:
            self.take(need)
            job.n_private += need
        return True

    def name_of(self, job: Job) -> None:
        """Chunks whose KV is complete may be shared from now on."""
        done = job.position
        if job.runs is not None:
            done = 0 if job.rows_left else job.n_tokens
        at, stop = len(job.held), bisect_right(job.ends, done, 0, job.n_nameable)
        if at < stop:
            size = self.size
            edges = [end // size for end in job.ends[max(0, at - 1) : stop]]
            if not at:
                edges.insert(0, 0)
            job.n_private -= edges[-1] - edges[0]
            sizes = [*map(sub, edges[1:], edges)]
            job.held += self.name(job.keys[at:stop], sizes)

    def leave(self, job: Job) -> None:
        """It has ended; what it had under a name stays cached."""
        self.give_back(job.held, job.n_private, self.new_key())

    def pause(self, job: Job, context: int) -> None:
        """It was preempted with KV of `context` tokens, to start over."""
        job.private_key = self.new_key()
        self.give_back(job.held, job.n_private, job.private_key)
        job.n_kept = 0
        if len(job.held) == len(job.keys) == job.n_nameable:
            job.n_kept = context // self.size - self._n_shared(job, len(job.held))
        job.held = []
        job.n_private = 0

    def _n_shared(self, job: Job, n_chunks: int) -> int:
        """Whole blocks in the first chunks of its prompt."""
        return job.ends[n_chunks - 1] // self.size if n_chunks else 0
