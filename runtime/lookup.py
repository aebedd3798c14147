"""The kept chunks that given prompts may use, found by their keys: the time is that of the prompts,
however much a store holds."""

from __future__ import annotations

from collections.abc import Iterable

from ..core.chunk_index import chain_id, chunk_key
from ..core.workload import Request
from .chunk_store import ChunkStore
from .prefetch import LiveIndex


def index_for(store: ChunkStore, order_name: str, requests: Iterable[Request]) -> LiveIndex:
    """What a policy may use of the chunks of these requests: those encoded alone, and those behind
    just what stands before them in the prompt.

    `ChunkStore.index` lists all that a tenant has, for what is not known yet.
    """
    wanted: dict[str, str] = {}
    for request in requests:
        chain = ""
        for content_id in request.chunks:
            chain = chain_id(chain, content_id)
            for behind in ("", chain):
                key = chunk_key(
                    content_id, model=store.fingerprint, order=order_name,
                    dtype=store.model.stored_dtype, tenant=request.tenant, chain=behind,
                )  # fmt: skip
                wanted[key] = request.tenant
    index = LiveIndex()
    for entry in store.entries(wanted):
        index.add(entry, wanted[entry.key])
    return index
