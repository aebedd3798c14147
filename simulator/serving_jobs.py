"""`Job`: one request on its way through the fleet; `JobFeed`: jobs made from a table's columns."""

from __future__ import annotations

from collections import deque
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..core.request_table import RequestTable

if TYPE_CHECKING:
    from .profile_step_cost import PieceWork, Shape
    from .serving_links import Flow
    from .serving_replica import Replica

Run = tuple[int, int, float]
"""(rows, first position, spacing): rows of a prompt that are computed, evenly spread."""


class Job:
    """State of one request. Tokens are counted as vLLM does: `computed` have their KV."""

    __slots__ = (
        "arrival_ns", "content_keys", "emitted", "end_step", "ends", "extra_s", "first_bytes_ns",
        "floor_ns", "flows", "held", "is_loading", "join_context", "join_step", "key_missing",
        "keys", "load_end_ns", "load_id", "n_kept", "n_nameable", "n_output", "n_private",
        "n_prompt", "n_tokens", "need_least", "new_keys", "order", "parts", "phase", "position",
        "private_key", "rank", "ready_ns", "replica", "row", "rows_left", "runs", "shape",
        "slack_ns", "tail_ns", "unloaded",
    )  # fmt: skip

    def __init__(self, row: int, arrival_ns: int, n_prompt: int, n_output: int, rank: int) -> None:
        self.row = row
        self.arrival_ns = arrival_ns
        self.n_prompt = n_prompt
        self.n_output = n_output
        self.rank = rank
        """Priority, 0 first."""
        self.emitted = 0
        """Output tokens made before it last joined the decodes, that one included."""
        self.n_tokens = n_prompt
        """Tokens whose KV it needs before it decodes."""
        self.keys: list[int] = []
        """Chunks of the prompt by chain: what GPU memory shares."""
        self.content_keys: list[int] = []
        """The same chunks as tiers know them."""
        self.ends: list[int] = []
        """Where each chunk ends in the prompt."""
        self.held: list[int] = []
        """Named extents of GPU memory it uses, in order of the prompt."""
        self.n_private = 0
        """Blocks it has beside them (while it decodes: when it joined)."""
        self.private_key = 0
        self.n_kept = 0
        """After a preemption: blocks under that key that it could use again."""
        self.need_least = 0
        """Where it waits for memory: blocks it needs at least while `key_missing` is not cached."""
        self.key_missing = -1
        self.n_nameable = 0
        """Chunks whose KV is exact, hence may be shared once it is there."""
        self.new_keys: list[int] = []
        """Chunks that are loaded from no tier."""
        self.unloaded: dict[int, list[int]] = {}
        """Those of them that a tier holds, by tier: loading would take longer than computing."""
        self.position = 0
        """Tokens before the next row, while its rows are one dense run."""
        self.rows_left = n_prompt
        self.runs: list[Run] | None = None
        """Rows left, last run first; None: dense from `position`."""
        self.order = 0
        """Place among the admitted."""
        self.join_step = self.join_context = self.phase = 0
        self.end_step = -1
        self.is_loading = False
        self.load_id = 0
        """Counts loads begun: an event of an older one is void."""
        self.flows: list[Flow] = []
        self.load_end_ns = 0
        self.floor_ns = 0
        """With loads in order: `load_end_ns` is not before it."""
        self.slack_ns = 0
        """How long before the end of its loads its first piece may begin."""
        self.tail_ns = 0
        """Compute of the last layer, which nothing hides."""
        self.extra_s = 0.0
        """Selection and restore, on the compute stream, with the first piece."""
        self.first_bytes_ns = self.ready_ns = -1
        """When the first layer's bytes are there; when its first piece may begin."""
        self.replica: Replica
        self.shape: Shape = ()
        self.parts: list[PieceWork] = []
        """With `steps="pieces"`: what is kept of its chunks, and its pieces left."""


class JobFeed:
    """Columns of a table as the simulation reads them; chunks are salted by tenant.

    A prompt's chunks have two kinds of keys: chains, by which GPU memory shares whole prefixes, and
    what tiers keep them by, the content. They are one if the table's ids are chained already. With
    `by_chain` tiers keep chains too (`prefix_cache`).

    Attributes:
        tokens_of, bytes_of: of the keys that tiers use.
        names: what a snapshot calls each key: chunk id times number of tenants plus tenant, or the
            number of a chain in the order of the table.
    """

    def __init__(
        self,
        table: RequestTable,
        ranks: list[int],
        *,
        by_chain: bool,
        needs_chains: bool,
        needs_starts: bool,
        kv_bytes_per_token: int,
    ) -> None:
        self.table = table
        self.ranks = ranks
        self._bytes_per_token = kv_bytes_per_token
        n_tenants = len(table.tenants)
        self._keys: NDArray[Any] = table.chunk_ids
        lengths = table.chunk_tokens
        self.names = np.arange(len(lengths), dtype=np.int64)
        if n_tenants > 1:
            salted = self._keys.astype(np.int64) * n_tenants
            salted += np.repeat(table.tenant, np.diff(table.chunk_start))
            self.names, keys = np.unique(salted, return_inverse=True)
            self._keys = keys.astype(np.int32)
            lengths = lengths[self.names // n_tenants]
        self._lengths = _shared(lengths, 1)
        self._by_chain = by_chain and not table.chained
        self._chain_of: dict[tuple[int, int], int] = {}
        self._needs_chains = (by_chain or needs_chains) and not table.chained
        self.tokens_of: list[int] = [] if self._by_chain else self._lengths
        self.first_start: dict[int, int] = {}
        """Where each key stood when it was met first; only with `needs_starts`."""
        self._needs_starts = needs_starts
        self.bytes_of = [] if self._by_chain else _shared(lengths, kv_bytes_per_token)
        # One entry of a view costs a third of one of an array.
        self._starts, self._key_view = table.chunk_start.data, self._keys.data
        self._prompts = table.prompt_tokens.data
        self._outputs = table.output_tokens.data
        self._classes = table.slo_class.data
        if self._by_chain:  # all at once, so that keys do not depend on what comes when
            for row in range(len(table)):
                self.job(row, 0)
            self.names = np.arange(len(self.tokens_of), dtype=np.int64)

    def job(self, row: int, arrival_ns: int) -> Job:
        """The request of one row."""
        start, stop = self._starts[row], self._starts[row + 1]
        rank = self.ranks[self._classes[row]] if len(self.ranks) > 1 else 0
        job = Job(row, arrival_ns, self._prompts[row], self._outputs[row], rank)
        if stop > start:
            keys = job.keys = job.content_keys = self._key_view[start:stop].tolist()
            lengths = [*map(self._lengths.__getitem__, keys)]
            job.ends = [*accumulate(lengths)]
            if self._needs_chains:
                job.keys = self._chained(keys, lengths)
                if self._by_chain:
                    job.content_keys = job.keys
            if self._needs_starts:
                deque(map(self.first_start.setdefault, job.content_keys, [0, *job.ends]), 0)
        return job

    def _chained(self, keys: list[int], lengths: list[int]) -> list[int]:
        known = self._chain_of
        chain, found = -1, []
        for key, n in zip(keys, lengths, strict=True):
            new = len(known)
            chain = known.setdefault((chain, key), new)
            if chain == new and self._by_chain:
                self.tokens_of.append(n)
                self.bytes_of.append(n * self._bytes_per_token)
            found.append(chain)
        return found


def _shared(values: NDArray[Any], times: int) -> list[int]:
    """`values` times a number, equal ones as one object: a tenth of the memory, closer together."""
    found: list[int]
    if values.max(initial=0) > len(values):
        known: dict[int, int] = {}
        found = (values.astype(np.int64) * times).tolist()
        return [*map(known.setdefault, found, found)]
    found = (np.arange(values.max(initial=0) + 1) * times).astype(object)[values].tolist()
    return found
