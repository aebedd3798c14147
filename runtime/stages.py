"""`Stages`: a model cut into layer ranges, each with its device, weights, KV and transformer.

One stage is the usual case. With more, hidden states go from device to device, and each stage
restores the KV of its own layers; the ops say on which device they are (`Op.device`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.errors import CapacityError
from ..core.plan import ReusePlan
from .attention import Rows
from .cuda_graphs import DecodeGraphs
from .device import Device
from .encoded_kv import EncodedKv, EncodedPart
from .kv_buffer import KvBuffer, KvPool, Place
from .kv_slab import SlabPool
from .loaded_model import LoadedModel
from .transformer import ModelParts, Transformer


class Stages:
    """All devices of one runner, in the order of their layers.

    Raises:
        PlanError: more stages than layers.
        CapacityError: weights or KV do not fit a device.
    """

    def __init__(
        self, loaded: LoadedModel, devices: Sequence[Device], kv_capacity_tokens: int
    ) -> None:
        n, n_layers = len(devices), loaded.spec.n_layers
        plan = ReusePlan(pipeline_stages=n)
        plan.check_stages(n_layers)
        edges = [plan.stage_start(s, n_layers) for s in range(n + 1)]
        self.loaded = loaded
        self.spec = loaded.spec
        self.devices = list(devices)
        self.ranges = list(zip(edges, edges[1:], strict=False))
        self.graphs: DecodeGraphs | None = None
        try:
            parts = [place(loaded, self.devices, s, *self.ranges[s]) for s in range(n)]
            self.transformers = [
                Transformer(loaded, device, part)
                for device, part in zip(self.devices, parts, strict=True)
            ]
            self.pool = self._pool(kv_capacity_tokens)
        except torch.OutOfMemoryError as e:
            raise CapacityError(
                "weights and KV must fit the devices",
                values=f"{', '.join(d.name for d in self.devices)}: {str(e).splitlines()[0]}",
                remedy="lower the KV capacity, or use more stages",
            ) from None

    @property
    def encoder(self) -> Transformer | Stages:
        """What encodes chunks."""
        return self.transformers[0] if len(self.transformers) == 1 else self

    @property
    def places(self) -> list[Place]:
        """Layers, and the device that holds them."""
        return [
            (stop - start, device)
            for (start, stop), device in zip(self.ranges, self.devices, strict=True)
        ]

    @property
    def device(self) -> Device:
        """Where prompts enter."""
        return self.devices[0]

    def device_of(self, layer: int) -> Device:
        """Where a layer's K and V are."""
        return next(
            d for d, (_, stop) in zip(self.devices, self.ranges, strict=True) if layer < stop
        )

    @property
    def rows_by_layer(self) -> list[int]:
        """Rows that passed through each layer since the last reset."""
        counts = [t.rows_by_layer for t in self.transformers]
        return [sum(of_layer) for of_layer in zip(*counts, strict=True)]

    @property
    def projected_rows(self) -> int:
        """Rows that only a check layer projected."""
        return sum(t.projected_rows for t in self.transformers)

    def reset_counts(self) -> None:
        """Begin counting rows anew."""
        for transformer in self.transformers:
            transformer.reset_counts()

    def release(self) -> None:
        """Let go of the KV, so that another cut has room; not to be used after."""
        self.graphs = None
        self.__dict__.pop("pool", None)

    def rope_tables(self, n_positions: int) -> None:
        """Have every stage's table long enough, so that no op has to build it."""
        for transformer in self.transformers:
            transformer.rope_table(n_positions)

    def rope_table(self, n_positions: int, layer: int = 0) -> tuple[Tensor, Tensor]:
        """See `Transformer`; the first stage's."""
        return self.transformers[0].rope_table(n_positions, layer)

    def encode(self, token_ids: Tensor, behind: Tensor | None = None) -> EncodedKv:
        """See `Transformer`."""
        ids = token_ids if behind is None else torch.cat([behind, token_ids])
        _, encoded = self.encode_at(ids, torch.arange(ids.numel()))
        return encoded.tokens(ids.numel() - token_ids.numel(), ids.numel())

    def encode_at(self, token_ids: Tensor, positions: Tensor) -> tuple[KvBuffer, EncodedKv]:
        """See `Transformer`."""
        n_slots = int(positions[-1]) + 1
        buffer = KvBuffer(self.spec, n_slots, self.places)
        if n_slots > token_ids.numel():
            for tensor in (*buffer.k, *buffer.v):
                tensor.zero_()
        hidden = self.transformers[0].embed(self.device.upload(token_ids))
        parts: list[EncodedPart] = []
        for transformer, (start, stop) in zip(self.transformers, self.ranges, strict=True):
            device = transformer.device
            rows = Rows.of(buffer, 0, positions, device)
            hidden, k, v = transformer.encode_layers(device.move(hidden), rows, start, stop)
            parts.append(EncodedPart(device, k, v))
        return buffer, EncodedKv(tuple(parts))

    def _pool(self, kv_capacity_tokens: int) -> KvPool | SlabPool:
        if self.device.pooled_decode:
            pool = SlabPool(self.spec, kv_capacity_tokens, self.places)
            if len(self.devices) == 1:
                self.graphs = DecodeGraphs(self.transformers[0], pool.slab)
            return pool
        places = None if len(self.devices) == 1 else self.places
        return KvPool(self.spec, kv_capacity_tokens, places)


def place(
    loaded: LoadedModel, devices: Sequence[Device], stage: int, start: int, stop: int
) -> ModelParts:
    """Put a stage's layers on its device; copies there of what other stages need as well."""
    here = devices[stage].torch
    model: Any = loaded.hf
    if all(p.device == here for p in model.parameters()):
        return ModelParts.of(loaded)
    for layer in loaded.layers[start:stop]:
        layer.to(here)
    inner = model.model
    tied = model.lm_head.weight is inner.embed_tokens.weight
    if stage == 0:
        inner.embed_tokens.to(here)
    norm, lm_head = inner.norm, model.lm_head
    if stage == len(devices) - 1:
        # Tied weights are needed at both ends of the pipeline.
        lm_head = copy.deepcopy(lm_head) if tied and stage else lm_head
        norm, lm_head = norm.to(here), lm_head.to(here)
    rope = copy.deepcopy(loaded.rope).to(here)
    return ModelParts(loaded.layers, inner.embed_tokens, rope, norm, lm_head)
