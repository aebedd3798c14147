"""Small synthetic models, profiles, workloads and indexes: round numbers, made for hand checks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pytest
from cachetune.core.chunk_index import ChunkEntry, ChunkIndex, chain_id
from cachetune.core.hardware import Coefficient, Device, HardwareProfile, Provenance, Tier
from cachetune.core.layout import chunk_bytes
from cachetune.core.model_spec import ModelSpec
from cachetune.core.ops import Op, Span
from cachetune.core.timeline import Timeline
from cachetune.core.workload import Content, Request, Workload

NS = 1e-9
"""Coefficients are whole nanoseconds, so that every duration is exact."""

COEFFICIENTS_S = {
    "load.op": 10 * NS,
    "restore.op": 5 * NS,
    "restore.layer": 0.0,
    "restore.piece": 1 * NS,
    "restore.byte": 0.0,
    "select.op": 7 * NS,
    "select.chunk": 0.0,
    "select.row": 1 * NS,
    "prefill.op": 100 * NS,
    "prefill.layer": 10 * NS,
    "prefill.sparse_layer": 0.0,
    "prefill.small_flop": 0.0,
    "prefill.flop": 0.0,
    "prefill.attention_flop": 0.0,
    "prefill.causal_flop": 0.0,
    "head.op": 50 * NS,
    "decode.op": 20 * NS,
    "decode.layer": 0.0,
    "decode.batched_layer": 0.0,
    "decode.row_layer": 1 * NS,
    "decode.attention_flop": 0.0,
    "dispatch.gap": 0.0,
}


def needs_interpreter() -> None:
    """Skip where Triton cannot interpret a kernel that loops."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    version = tuple(map(int, np.__version__.split(".")[:2]))
    if triton.__version__.startswith("3.6.") and version >= (2, 4):
        pytest.skip("Triton 3.6 interprets nothing with numpy 2.4 or later")


def make_model(**changes: Any) -> ModelSpec:
    """Four layers; K and V of a token in a layer are 64 bytes."""
    fields: dict[str, Any] = dict(
        name="tiny",
        family="llama",
        n_layers=4,
        hidden_size=16,
        intermediate_size=32,
        n_heads=4,
        n_kv_heads=2,
        head_dim=4,
        vocab_size=64,
        max_position=4096,
        dtype="float32",
    )
    return ModelSpec(**{**fields, **changes})


def make_tier(link: float = 1e9, worker: float | None = None, latency_s: float = 0.0) -> Tier:
    """A DRAM tier; 1e9 bytes per second are one byte per nanosecond."""
    return Tier(
        medium="dram",
        link_bytes_per_s=link,
        worker_bytes_per_s=link if worker is None else worker,
        read_latency_s=latency_s,
    )


def make_profile(
    *,
    model: ModelSpec | None = None,
    tiers: Mapping[str, Tier] | None = None,
    coefficients_s: Mapping[str, float] | None = None,
) -> HardwareProfile:
    """A profile with the tiers `dram` (1 B/ns) and `disk` (0.25 B/ns, 100 ns a read)."""
    model = model or make_model()
    values = {**COEFFICIENTS_S, **(coefficients_s or {})}
    return HardwareProfile(
        name="synthetic",
        device=Device(
            name="synthetic", kind="cpu", n_cores=1, memory_bytes=1 << 30, compute_threads=1
        ),
        model=model,
        model_fingerprint=model.fingerprint(),
        tiers=dict(tiers or {"dram": make_tier(), "disk": make_tier(0.25e9, latency_s=100 * NS)}),
        coefficients={
            name: Coefficient(value=v, unit="s", low=v, high=v, source="assumed")
            for name, v in values.items()
        },
        fits={},
        provenance=Provenance(command="tests", commit="", machine="", versions={}, date="", seed=0),
    )


def make_workload(
    prompts: Iterable[Iterable[str]] = (("a", "b"),),
    *,
    chunk_tokens: int | Mapping[str, int] = 64,
    suffix_tokens: int = 8,
    output_tokens: int = 3,
    gap_ns: int = 1000,
    name: str = "tiny",
) -> Workload:
    """One request per prompt, `gap_ns` apart."""
    prompts = [tuple(p) for p in prompts]
    names = sorted({c for p in prompts for c in p})
    lengths = {c: chunk_tokens for c in names} if isinstance(chunk_tokens, int) else chunk_tokens
    requests = tuple(
        Request(
            request_id=i,
            arrival_ns=i * gap_ns,
            chunks=chunks,
            suffix_tokens=suffix_tokens,
            max_output_tokens=output_tokens,
            output_tokens=output_tokens,
        )
        for i, chunks in enumerate(prompts)
    )
    contents = {c: Content(n_tokens=lengths[c]) for c in names}
    return Workload(name=name, contents=contents, requests=requests)


def make_entry(
    content_id: str,
    n_tokens: int = 64,
    *,
    tier: str = "dram",
    chain: Iterable[str] | None = None,
    model: ModelSpec | None = None,
) -> ChunkEntry:
    """An entry called `content_id`; with `chain`, the exact one behind those contents."""
    link = ""
    for before in [*(chain or ()), content_id]:
        link = chain_id(link, before)
    is_prefix = chain is not None
    return ChunkEntry(
        key=f"{content_id}@{link}" if is_prefix else content_id,
        content_id=content_id,
        n_tokens=n_tokens,
        n_bytes=chunk_bytes(model or make_model(), n_tokens),
        tier=tier,
        kind="prefix" if is_prefix else "isolated",
        chain=link if is_prefix else "",
    )


def make_index(
    workload: Workload, *, tier: str = "dram", model: ModelSpec | None = None
) -> ChunkIndex:
    """Every content of `workload`, isolated, in one tier without limit."""
    index = ChunkIndex()
    for content_id in sorted(workload.contents):
        n_tokens = workload.contents[content_id].n_tokens
        index.add(make_entry(content_id, n_tokens, tier=tier, model=model))
    return index


def make_op(op_id: int, kind: str = "head", stream: str = "compute", **fields: Any) -> Op:
    """An op of request 0 with all layers of nothing."""
    values: dict[str, Any] = dict(request_ids=(0,), layer_start=0, layer_stop=0)
    return Op(op_id=op_id, kind=kind, stream=stream, **{**values, **fields})  # type: ignore[arg-type]


def timetable(spans: Iterable[Span] | Timeline) -> list[tuple[int, int, int]]:
    """(op id, start, end) in the order of ending."""
    found = spans.spans if isinstance(spans, Timeline) else spans
    return [(s.op.op_id, s.start_ns, s.end_ns) for s in found]
