"""The path of a hit before anything is read: lookup, decision, ops, session. Measured."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

from ..core.block_pool import BlockPool
from ..core.chunk_index import ChunkEntry, ChunkIndex, content_id_of
from ..core.engine import Engine
from ..core.layout import chunk_bytes
from ..core.model_spec import ModelSpec
from ..core.plan import ReusePlan
from ..core.rng import rng
from ..core.workload import Content, Request, Workload
from .session import token_tensor


@dataclass(frozen=True)
class HotPath:
    """Milliseconds from the lookup to the moment the first op can be submitted."""

    n_chunks: int
    n_ops: int
    median_ms: float
    worst_ms: float
    n_repeats: int


def hit_workload(model: ModelSpec, n_chunks: int, chunk_tokens: int) -> tuple[Workload, ChunkIndex]:
    """One request of `n_chunks` chunks, and an index that holds them all in DRAM."""
    draw = rng(0, "hot_path")
    index, contents = ChunkIndex(), {}
    for _ in range(n_chunks):
        ids = tuple(int(t) for t in draw.integers(0, model.vocab_size, chunk_tokens))
        name = content_id_of(ids)
        contents[name] = Content(n_tokens=chunk_tokens, token_ids=ids)
        n_bytes = chunk_bytes(model, chunk_tokens)
        index.add(ChunkEntry(name, name, chunk_tokens, n_bytes, "dram"))
    request = Request(
        request_id=0, arrival_ns=0, chunks=tuple(contents), suffix_tokens=16,
        suffix_ids=tuple(range(16)), max_output_tokens=1, output_tokens=1,
    )  # fmt: skip
    return Workload(name="hot path", contents=contents, requests=(request,)), index


def hot_path(
    model: ModelSpec,
    plan: ReusePlan,
    *,
    n_chunks: int = 64,
    chunk_tokens: int = 256,
    n_repeats: int = 50,
) -> HotPath:
    """Time `Engine.on_arrival` of one prompt whose chunks are all kept, and making its tensor of
    token ids, which the executor needs for the first op. The first time is a warm-up.

    The model gives shapes only; nothing is computed or read.
    """
    workload, index = hit_workload(model, n_chunks, chunk_tokens)
    request = workload.requests[0]
    n_blocks = workload.prompt_tokens(request) // 16 + 2
    times_ms, n_ops = [], 0
    for _ in range(n_repeats + 1):
        engine = Engine(workload, model, plan, index, BlockPool(n_blocks))
        start_ns = time.perf_counter_ns()
        n_ops = len(engine.on_arrival(request, start_ns))
        parts = [workload.contents[c].token_ids or () for c in request.chunks]
        token_tensor([*parts, request.suffix_ids or ()])
        times_ms.append((time.perf_counter_ns() - start_ns) / 1e6)
    timed = times_ms[1:]
    return HotPath(n_chunks, n_ops, median(timed), max(timed), n_repeats)
