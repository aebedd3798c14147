"""Arithmetic of the chunk store's layout: the simulator charges it, the store follows it.

A chunk file is a header, then one blob per layer, each 4-KiB aligned. A blob is a run of row
groups: K then V of 32 tokens in stored order, then a checksum. Tokens lie in rank order, least
critical first, so for every recompute ratio the tokens to load are one contiguous prefix.
"""

from __future__ import annotations

from .model_spec import ModelSpec
from .units import ceil_div, round_up

GROUP_TOKENS = 32
ALIGN_BYTES = 4096
CHECKSUM_BYTES = 8


def group_bytes(model: ModelSpec) -> int:
    """Bytes of one row group: K and V of 32 tokens in one layer, and the checksum."""
    return GROUP_TOKENS * model.kv_bytes_per_token_layer + CHECKSUM_BYTES


def blob_bytes(model: ModelSpec, n_tokens: int) -> int:
    """Bytes of one layer's blob, padded to the alignment."""
    return read_bytes(model, n_tokens)


def read_bytes(model: ModelSpec, n_rows: int) -> int:
    """Bytes read to get the first `n_rows` of a blob: whole groups, whole sectors."""
    return round_up(ceil_div(n_rows, GROUP_TOKENS) * group_bytes(model), ALIGN_BYTES)


def n_reads(n_bytes: int, request_bytes: int) -> int:
    """I/O requests needed for one contiguous run."""
    return ceil_div(n_bytes, request_bytes)


def chunk_bytes(model: ModelSpec, n_tokens: int) -> int:
    """Bytes of all blobs of a chunk, the header left out."""
    return model.n_layers * blob_bytes(model, n_tokens)
