"""Tiers of a replay before and after it: `CacheSnapshot` documents in and out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..core.request_table import RequestTable
    from ..simulator.serving_fleet import Fleet
    from ..simulator.serving_result import ServingResult


def read_warm(
    path: Path, table: RequestTable, fleet: Fleet
) -> tuple[RequestTable, dict[str, list[Any]]]:
    """(the table, chunks added that no request of it has; tier -> chunks of each replica).

    Chunks that nobody asks for take room until they are evicted.

    Raises:
        CacheTuneError: not a snapshot, of another machine, too large, or of other bytes per token.
    """
    import numpy as np

    from ..core.cache_snapshot import CacheSnapshot
    from ..core.errors import WorkloadError

    _check_names(table, fleet)
    found = CacheSnapshot.read(path)
    tiers = {t.name: t for t in fleet.replica.tiers}
    endless = 1 << 62
    found.check_fits({name: t.capacity_bytes or endless for name, t in tiers.items()})
    per_token = fleet.policy.kv_bytes_per_token
    chunks = found.chunks_in(table)
    n_known = len(table.chunk_tokens)
    extra: dict[int, int] = {}
    for tier, numbers in chunks.items():
        sizes = found.tiers[tier].n_bytes
        for number, n_bytes in zip(numbers.tolist(), sizes, strict=True):
            if number >= n_known:
                extra[number] = max(1, round(n_bytes / per_token))
            elif n_bytes != int(table.chunk_tokens[number]) * per_token:
                raise WorkloadError(
                    f"a chunk has as many bytes in {path} as here",
                    values=f"'{table.chunk_name(number)}': {n_bytes}, here "
                    f"{int(table.chunk_tokens[number])} tokens of {per_token}",
                    remedy="make the snapshot with the same model and format",
                )
    more = [extra[n] for n in sorted(extra)]
    lengths = np.append(table.chunk_tokens, np.array(more, np.int32)).astype(np.int32)
    names = table.chunk_names
    if names is not None:
        names += tuple(f"#{i}" for i in range(len(more)))
    warm = {
        tier: [numbers] * (1 if tiers[tier].shared else fleet.n_replicas)
        for tier, numbers in chunks.items()
    }
    return replace(table, chunk_tokens=lengths, chunk_names=names), warm


def write_kept(path: Path, result: ServingResult) -> None:
    """What the tiers of the only replica hold at the end.

    Raises:
        CacheTuneError: the tiers' keys are no chunks of the trace.
    """
    from ..core.cache_snapshot import CacheSnapshot, TierContents

    table, per_token = result.table, result.fleet.policy.kv_bytes_per_token
    _check_names(table, result.fleet)
    tiers = {
        tier: TierContents(
            keys=tuple(table.chunk_name(int(n)) for n in numbers),
            n_bytes=tuple((table.chunk_tokens[numbers].astype(int) * per_token).tolist()),
        )
        for tier, (numbers,) in result.snapshot.items()
    }
    kept = {k: v for k, v in table.provenance.items() if k in ("file", "sha256", "format")}
    CacheSnapshot(tiers=tiers, provenance=kept).write(path)


def check_one_replica(path: Path | None, n_replicas: int) -> None:
    """Refuse to write one snapshot of several replicas."""
    from ..core.errors import CacheTuneError

    if path is not None and n_replicas > 1:
        raise CacheTuneError(
            "a snapshot is of one replica",
            values=f"--replicas {n_replicas}",
            remedy="leave out --snapshot-out, or replay one replica",
        )


def _check_names(table: RequestTable, fleet: Fleet) -> None:
    """A snapshot names chunks; tiers must keep just these."""
    from ..core.errors import WorkloadError

    by_chain = fleet.policy.name == "prefix_cache" and not table.chained
    if not fleet.replica.tiers or by_chain or len(table.tenants) > 1:
        raise WorkloadError(
            "a snapshot is of tiers that keep a trace's chunks by their names",
            values=f"{len(fleet.replica.tiers)} tiers, {len(table.tenants)} tenants, policy "
            f"{fleet.policy.name} on {'prefix' if table.chained else 'content'} ids",
            remedy="leave the snapshot out, or use a policy that reuses chunks for one tenant",
        )
