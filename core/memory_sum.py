"""KV capacity of a GPU as an itemised sum, or as an engine was seen to have it.

Per GPU: what PyTorch sees of the memory, less what the engine leaves free, the weights' share, the
largest live activations, the CUDA context and graphs; the rest is KV. Each item has its source.
Measured block counts (`catalogue_data/blocks.json`) replace the sum where the setting is the same.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Literal

from pydantic import Field

from .catalogue import FOLDER, Catalogue, Figure, GpuRow
from .errors import CapacityError
from .model_spec import ModelSpec
from .record import Record
from .units import GIB

WEIGHT_BITS = {"bfloat16": 16, "fp8": 8, "int4": 4}
KV_BITS = {"bfloat16": 16, "fp8": 8}
"""Of the cache in GPU memory, as engines attend over it; stored chunks may be packed further."""

DRIVER_SHARE = 0.015
"""Of a data sheet's memory that PyTorch does not see; 1.0 to 2.0 % on H100, 4090, 3090, A100-40."""
LOGIT_BYTES = 26
"""Per row and word while sampling: what is left of the RTX 4090 row of blocks.json on vLLM 0.19."""
CONTEXT_BYTES = int(0.35 * GIB)
"""CUDA context and libraries: vllm-project/vllm#10517; 0.16 to 0.43 GiB in other logs."""
GRAPH_BYTES = int(0.73 * GIB)
"""86 CUDA graphs: vllm-project/vllm#39559; counted by vLLM since 0.21."""
NCCL_BYTES = 358612992
"""Buffers of a tensor-parallel group: aiconfigurator systems/*.yaml @095f58a, nccl_mem. Stages of a
pipeline talk in a group of their own, assumed to have as much; nobody was seen to measure it."""


class EngineMemory(Record):
    """The settings of an engine that decide what is left for KV."""

    utilization: float = Field(default=0.9, gt=0, le=1)
    max_num_batched_tokens: int = Field(default=8192, ge=1)
    max_num_seqs: int = Field(default=256, ge=1)
    weights: Literal["bfloat16", "fp8", "int4"] = "bfloat16"
    kv: Literal["bfloat16", "fp8"] = "bfloat16"
    graphs: bool = True
    block_tokens: int = Field(default=16, ge=1)


class MemoryItem(Record):
    """One line of the sum, bytes per GPU; negative items take away."""

    what: str
    n_bytes: int
    kind: str
    source: str


class MemorySum(Record):
    """Where the memory of one GPU goes, and the KV blocks of the whole group."""

    items: tuple[MemoryItem, ...]
    kv_bytes: int
    """Per GPU: what is left."""
    n_blocks: int
    block_tokens: int
    measured: str = ""
    """Source of the block count where an engine was seen to have it."""

    @property
    def kv_tokens(self) -> int:
        """Tokens that the group holds at once."""
        return self.n_blocks * self.block_tokens


class MeasuredBlocks(Record):
    """A block count from an engine's own log."""

    gpu: str
    model: str
    n_gpus: int
    engine: str
    total_bytes: int | None
    utilization: float
    max_num_batched_tokens: int
    max_num_seqs: int
    block_tokens: int
    n_blocks: int
    source: str


@cache
def measured_blocks() -> tuple[MeasuredBlocks, ...]:
    """Shipped counts."""
    data = json.loads(FOLDER.joinpath("blocks.json").read_text(encoding="utf-8"))
    return tuple(MeasuredBlocks.model_validate(row) for row in data["blocks"])


def memory_sum(
    model: ModelSpec,
    gpu: GpuRow,
    n_gpus: int = 1,
    engine: EngineMemory | None = None,
    *,
    staged: bool = False,
) -> MemorySum:
    """What a group of `n_gpus` has for KV; `n_blocks` is 0 or less where nothing is left.

    Args:
        staged: whether the group is a stage of a pipeline, which `model` is what it holds of.
    """
    engine = engine or EngineMemory()
    items = _items(model, gpu.memory_bytes, n_gpus, engine, staged)
    kv_bytes = sum(item.n_bytes for item in items)
    n_blocks = kv_bytes // _block_bytes(model, n_gpus, engine)
    for row in () if staged else measured_blocks():
        if _same(row, model, gpu, n_gpus, engine):
            return MemorySum(
                items=items,
                kv_bytes=kv_bytes,
                n_blocks=row.n_blocks,
                block_tokens=row.block_tokens,
                measured=f"{row.engine}, {row.source}",
            )
    return MemorySum(
        items=items, kv_bytes=kv_bytes, n_blocks=n_blocks, block_tokens=engine.block_tokens
    )


def check_fits(
    model: ModelSpec,
    gpu: GpuRow,
    n_gpus: int,
    engine: EngineMemory,
    catalogue: Catalogue,
    min_tokens: int = 1,
    *,
    staged: bool = False,
) -> MemorySum:
    """The sum, where it holds at least `min_tokens` (the longest request).

    Raises:
        CapacityError: by how much it does not, and what would.
    """
    found = memory_sum(model, gpu, n_gpus, engine, staged=staged)
    if found.kv_tokens >= min_tokens:
        return found
    need = -(-min_tokens // engine.block_tokens) * _block_bytes(model, n_gpus, engine)
    what = "the model must fit in GPU memory" if found.kv_bytes <= 0 else "a request must fit"
    raise CapacityError(
        f"{what} with KV for {min_tokens} tokens",
        values=f"{model.name} in {engine.weights} on {n_gpus} x {gpu.name}, "
        f"{(need - found.kv_bytes) / GIB:.1f} GiB short per GPU",
        remedy=_what_fits(model, gpu, n_gpus, engine, catalogue, min_tokens, staged),
    )


def _items(
    model: ModelSpec, memory: Figure, n_gpus: int, engine: EngineMemory, staged: bool
) -> tuple[MemoryItem, ...]:
    total = int(memory.value)
    items = [MemoryItem(what="memory", n_bytes=total, kind=memory.kind, source=memory.source)]
    if memory.kind == "spec":
        hidden = -int(DRIVER_SHARE * total)
        where = "1.5 % of the data sheet, from four GPUs whose own figure is known"
        items.append(MemoryItem(what="driver", n_bytes=hidden, kind="assumed", source=where))
        total += hidden
    free = int(total * engine.utilization) - total
    weights = -model.n_params * WEIGHT_BITS[engine.weights] // 8 // n_gpus
    activations, logits = _live_bytes(model, n_gpus, engine)
    bits = WEIGHT_BITS[engine.weights]
    rows = f"{engine.max_num_batched_tokens} rows, 3 x hidden + 3 x intermediate, 2 B"
    if logits > activations:
        rows = f"{engine.max_num_seqs} rows of logits, {LOGIT_BYTES} B a word"
    setting = f"gpu_memory_utilization {engine.utilization:g}"
    items += [
        MemoryItem(what="left free", n_bytes=free, kind="setting", source=setting),
        MemoryItem(
            what="weights",
            n_bytes=weights,
            kind="spec",
            source=f"{model.n_params / 1e9:.2f} G weights x {bits} bit / {n_gpus} GPUs",
        ),
        MemoryItem(
            what="activations",
            n_bytes=-max(activations, logits),
            kind="derived",
            source=rows,
        ),
        MemoryItem(
            what="CUDA context",
            n_bytes=-CONTEXT_BYTES,
            kind="measured",
            source="vllm-project/vllm#10517",
        ),
    ]
    if engine.graphs:
        where = "vllm-project/vllm#39559, 86 graphs"
        items.append(
            MemoryItem(what="CUDA graphs", n_bytes=-GRAPH_BYTES, kind="measured", source=where)
        )
    n_groups = (n_gpus > 1) + staged
    if n_groups:
        where = "aiconfigurator systems/*.yaml @095f58a, nccl_mem"
        where += "; of stages assumed the same" if staged else ""
        n_bytes = -NCCL_BYTES * n_groups
        items.append(MemoryItem(what="NCCL buffers", n_bytes=n_bytes, kind="assumed", source=where))
    return tuple(items)


def _live_bytes(model: ModelSpec, n_gpus: int, engine: EngineMemory) -> tuple[int, int]:
    """(largest live tensors of a layer, of sampling), bytes per GPU."""
    row = 3 * model.hidden_size + 3 * (model.intermediate_size // n_gpus)
    layer = 2 * engine.max_num_batched_tokens * row
    rows = min(engine.max_num_seqs, engine.max_num_batched_tokens)
    return layer, rows * model.vocab_size * LOGIT_BYTES


def _block_bytes(model: ModelSpec, n_gpus: int, engine: EngineMemory) -> int:
    """Of one GPU; heads are copied where there are fewer than GPUs."""
    heads = max(1, model.n_kv_heads // n_gpus)
    token = model.n_layers * 2 * heads * model.head_dim * KV_BITS[engine.kv] // 8
    return engine.block_tokens * token


def _same(
    row: MeasuredBlocks, model: ModelSpec, gpu: GpuRow, n_gpus: int, engine: EngineMemory
) -> bool:
    mine = (gpu.name, model.name, n_gpus, engine.utilization, engine.max_num_batched_tokens)
    theirs = (row.gpu, row.model, row.n_gpus, row.utilization, row.max_num_batched_tokens)
    plain = (engine.weights, engine.kv, engine.max_num_seqs, engine.block_tokens)
    return mine == theirs and plain == ("bfloat16", "bfloat16", row.max_num_seqs, row.block_tokens)


def _what_fits(
    model: ModelSpec,
    gpu: GpuRow,
    n_gpus: int,
    engine: EngineMemory,
    catalogue: Catalogue,
    min_tokens: int,
    staged: bool,
) -> str:
    def fits(row: GpuRow, n: int, e: EngineMemory) -> bool:
        divides = model.n_heads % n == 0 and model.intermediate_size % n == 0
        return divides and memory_sum(model, row, n, e, staged=staged).kv_tokens >= min_tokens

    found = []
    for weights in ("fp8", "int4"):
        smaller = WEIGHT_BITS[weights] < WEIGHT_BITS[engine.weights]
        if smaller and fits(gpu, n_gpus, engine.replace(weights=weights)):
            found.append(f"{weights} weights")
            break
    more = next((n for n in (2, 4, 8) if n > n_gpus and fits(gpu, n, engine)), None)
    if more:
        found.append(f"{more} x {gpu.name}")
    others = sorted(catalogue.gpus.values(), key=lambda r: r.memory_bytes.value)
    larger = [r.name for r in others if r.name != gpu.name and fits(r, n_gpus, engine)]
    if larger:
        found.append(f"{n_gpus} x {', '.join(larger[:3])}")
    return f"would fit: {'; '.join(found)}" if found else "nothing in the catalogue would fit"
