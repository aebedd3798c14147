"""`CacheSnapshot`: what the tiers hold when a simulation or a server begins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from .errors import CapacityError, WorkloadError
from .record import Document, Record
from .request_table import RequestTable


class TierContents(Record):
    """Chunks of one tier, the longest unused first: keys as trace files name them, and bytes."""

    keys: tuple[str, ...]
    n_bytes: tuple[int, ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.keys) != len(self.n_bytes):
            raise ValueError(
                f"each key has its bytes, got {len(self.keys)} keys and {len(self.n_bytes)} bytes"
            )
        if len(set(self.keys)) != len(self.keys):
            twice = next(k for k, n in Counter(self.keys).items() if n > 1)
            raise ValueError(f"a tier holds a chunk once, got '{twice}' twice")
        if any(n < 1 for n in self.n_bytes):
            raise ValueError(f"a chunk has at least 1 byte, got {min(self.n_bytes)}")
        return self

    def total_bytes(self) -> int:
        """Of all chunks."""
        return sum(self.n_bytes)


class CacheSnapshot(Document):
    """Tier -> contents. The same chunk may lie in several tiers."""

    document: ClassVar[str] = "cache_snapshot"
    version: ClassVar[int] = 1
    error: ClassVar[type[WorkloadError]] = WorkloadError

    tiers: dict[str, TierContents] = Field(min_length=1)
    provenance: dict[str, str] = Field(default_factory=dict)

    def check_fits(self, capacities: Mapping[str, int]) -> None:
        """Refuse contents that the tiers of a machine cannot hold.

        Args:
            capacities: bytes per tier.

        Raises:
            WorkloadError: a tier that the machine lacks.
            CapacityError: by how much a tier is too small.
        """
        for tier, contents in self.tiers.items():
            if tier not in capacities:
                raise WorkloadError(
                    "a snapshot names tiers of the machine",
                    values=f"'{tier}', which is none of {', '.join(capacities) or 'nothing'}",
                    remedy="rename it, or leave it out",
                )
            excess = contents.total_bytes() - capacities[tier]
            if excess > 0:
                raise CapacityError(
                    f"the snapshot fits into the tier '{tier}'",
                    values=f"{contents.total_bytes()} bytes, {excess} more than it has",
                    remedy="take fewer requests into the snapshot, or make the tier larger",
                )

    def chunks_in(self, table: RequestTable) -> dict[str, NDArray[np.int64]]:
        """Chunk numbers of each tier, oldest first; chunks that `table` lacks count on from its
        last, because they take room all the same."""
        names = table.chunk_names or tuple(map(str, range(len(table.chunk_tokens))))
        known = {name: number for number, name in enumerate(names)}
        return {
            tier: np.array([known.setdefault(key, len(known)) for key in c.keys], np.int64)
            for tier, c in self.tiers.items()
        }
