"""Arithmetic of the chunk store's layout: the simulator charges it, the store follows it.

A chunk file is a header, then one blob per layer, each 4-KiB aligned. A blob is a run of row
groups: K then V of 32 tokens in stored order, then a checksum. Tokens lie in rank order, least
critical first, so for every recompute ratio the tokens to load are one contiguous prefix. A packed
group holds, of K and then of V, the codes, fp16 scales and fp16 zeros: for K one of each per
channel, for V one per token and 32 channels (KIVI, arXiv 2402.02750).
"""

from __future__ import annotations

from .model_spec import PACKED_BITS, ModelSpec
from .units import ceil_div, round_up

GROUP_TOKENS = 32
ALIGN_BYTES = 4096
CHECKSUM_BYTES = 8
SCALE_BYTES = 2
SCALE_CHANNELS = 32
"""Channels of V that share a scale."""


def packed_parts(model: ModelSpec) -> tuple[int, int, int, int, int, int]:
    """Bytes of a packed group's codes, scales and zeros, of K and then of V."""
    width = model.n_kv_heads * model.head_dim
    codes = GROUP_TOKENS * width * PACKED_BITS[model.stored] // 8
    of_v = SCALE_BYTES * GROUP_TOKENS * model.n_kv_heads * ceil_div(model.head_dim, SCALE_CHANNELS)
    return codes, SCALE_BYTES * width, SCALE_BYTES * width, codes, of_v, of_v


def group_bytes(model: ModelSpec) -> int:
    """Bytes of one row group: K and V of 32 tokens in one layer, and the checksum."""
    if model.is_packed:
        return sum(packed_parts(model)) + CHECKSUM_BYTES
    values = 2 * GROUP_TOKENS * model.n_kv_heads * model.head_dim
    return values * model.stored_value_bytes + CHECKSUM_BYTES


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
