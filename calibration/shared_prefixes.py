"""Which prompts of a bundle begin alike: vLLM serves their common blocks from its prefix cache.

Bundles hold no prompts. For known workloads the prefixes in common are kept, for others they are
read from the file that was sent, known by its SHA-256.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

from ..core.errors import WorkloadError
from ..core.record import parse_json

BLOCK_TOKENS = 16
"""Of vLLM, unless it is told otherwise."""
DATA = Path(__file__).parent / "bundle_data"


def block_names(
    dataset_hash: str, n_prompt: list[int], workloads: Path | None
) -> list[tuple[int, ...]] | None:
    """Names of the whole blocks of each prompt, equal for equal prefixes; None: not known.

    Args:
        dataset_hash: SHA-256 of the file of prompts.
        n_prompt: tokens of each.
        workloads: a folder that may hold that file.

    Raises:
        WorkloadError: the file cannot be read, or lacks prompts.
    """
    if workloads is not None and (found := _workload(workloads, dataset_hash)) is not None:
        return _read_names(found, len(n_prompt))
    shared = _shared().get(dataset_hash)
    if shared is None:
        return None
    earlier = {r: (source, n) for r, source, n in shared}
    names: list[tuple[int, ...]] = []
    fresh = 0
    for i, tokens in enumerate(n_prompt):
        source, n = earlier.get(i, (0, 0))
        kept = names[source][:n] if n else ()
        own = tokens // BLOCK_TOKENS - len(kept)
        names.append((*kept, *range(fresh, fresh + own)))
        fresh += own
    return names


def _workload(folder: Path, sha256: str) -> Path | None:
    for path in sorted(folder.glob("*.jsonl")):
        if hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
            return path
    return None


def _read_names(path: Path, n_requests: int) -> list[tuple[int, ...]]:
    """Names of the whole blocks of each prompt in `path`: equal prefixes get equal names."""
    known: dict[tuple[int, tuple[int, ...]], int] = {}
    names: list[tuple[int, ...]] = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            tokens = tuple(parse_json(line.decode("utf-8", "replace"))["input_tok_ids"])
        except (ValueError, KeyError, TypeError):
            raise WorkloadError(
                f"{path} line {number} must hold input_tok_ids",
                remedy="give the file as it was sent",
            ) from None
        chain: list[int] = []
        for i in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
            key = (chain[-1] if chain else -1, tokens[i : i + BLOCK_TOKENS])
            chain.append(known.setdefault(key, len(known)))
        names.append(tuple(chain))
    if len(names) < n_requests:
        raise WorkloadError(
            f"{path} must hold every request of the bundle",
            values=f"{len(names)} of {n_requests}",
            remedy="give the whole file",
        )
    return names[:n_requests]


@cache
def _shared() -> dict[str, list[list[int]]]:
    return dict(json.loads((DATA / "shared_prefixes.json").read_text(encoding="utf-8")))
