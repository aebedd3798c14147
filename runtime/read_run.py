"""`ReadRun`: one read under way, request by request, verified as it comes."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.layout import GROUP_TOKENS
from .chunk_file import ChunkCorrupt, Geometry, first_bad_group, layer_seed
from .rate_limit import RateLimiter
from .tiers import Source


class ReadRun:
    """One read under way: fetches layers request by request and verifies them as they come.

    On a limited tier verifying falls into the time of the slot, as on a medium that is slow.
    """

    __slots__ = (
        "_blob_bytes", "_key", "_limiter", "_out", "_request_bytes", "_seed", "_shape", "_slot_s",
        "_source", "n_requests",
    )  # fmt: skip

    def __init__(
        self,
        key: str,
        shape: Geometry,
        blob_bytes: int,
        seed: int,
        source: Source,
        limiter: RateLimiter | None,
        out: memoryview,
        request_bytes: int,
    ) -> None:
        self._key = key
        self._shape = shape
        self._blob_bytes = blob_bytes
        self._seed = seed
        self._source = source
        self._limiter = limiter
        self._out = out
        self._request_bytes = request_bytes
        self._slot_s: float | None = None
        self.n_requests = 0

    def finish(self) -> None:
        """Wait for the end of the last request's slot."""
        if self._limiter is not None and self._slot_s is not None:
            self._limiter.wait(self._slot_s)

    def announce(self, layer_start: int, n_groups: Sequence[int]) -> None:
        """Tell the source of every request to come: these groups of the layers from one on."""
        ranges = []
        for layer, count in enumerate(n_groups, layer_start):
            n_bytes = self._shape.read_bytes(count * GROUP_TOKENS)
            at_byte = layer * self._blob_bytes
            for start in range(0, n_bytes, self._request_bytes):
                size = min(self._request_bytes, n_bytes - start)
                ranges.append((at_byte + start, size))
        self._source.announce(ranges)

    def read_layer(self, layer: int, at_byte: int, n_groups: int) -> None:
        """Bring the first groups of a layer to `at_byte` of the buffer.

        Raises:
            ChunkCorrupt: not all of them match.
        """
        shape, limiter = self._shape, self._limiter
        n_bytes = shape.read_bytes(n_groups * GROUP_TOKENS)
        seed, n_good, slot_s = layer_seed(self._seed, layer), 0, 0.0
        for start in range(0, n_bytes, self._request_bytes):
            stop = min(start + self._request_bytes, n_bytes)
            if limiter is not None:
                slot_s = limiter.reserve(stop - start, self._slot_s)
            part = self._out[at_byte + start : at_byte + stop]
            n_read = self._source.read_into(part, layer * self._blob_bytes + start)
            self.n_requests += 1
            if n_read < stop - start:
                raise ChunkCorrupt(self._key, "the file is cut off", layer)
            ready = min(stop // shape.group_bytes, n_groups)
            bad = first_bad_group(self._out, at_byte, range(n_good, ready), shape.group_bytes, seed)
            if bad is not None:
                raise ChunkCorrupt(self._key, f"checksum of row group {bad}", layer, bad)
            n_good = ready
            if limiter is not None:
                limiter.pace(slot_s)
                self._slot_s = slot_s
