"""`Transformer`: drives the library's decoder layers for any rows, any layers, any order.

An op is "layers a..b for these tokens", so our loop calls the layers itself. Rows that pass
through each layer are counted here: tests compare the count with what the policy named.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .attention import Packed, Rows, Scatter, packed
from .device import CPU, Device
from .encoded_kv import EncodedKv, EncodedPart
from .kv_buffer import KvBuffer
from .layer_rope import Angles, LayerRope
from .loaded_model import LoadedModel


@dataclass(frozen=True)
class ModelParts:
    """The library's modules that are driven; on a stage, copies of what it does not own alone."""

    layers: list[nn.Module]
    embed: Callable[[Tensor], Tensor]
    rope: LayerRope
    norm: Callable[[Tensor], Tensor]
    lm_head: Callable[[Tensor], Tensor]

    @staticmethod
    def of(loaded: LoadedModel) -> ModelParts:
        """The model's own."""
        model = loaded.hf.model
        return ModelParts(
            loaded.layers, model.embed_tokens, loaded.rope, model.norm, loaded.hf.lm_head
        )


def _cache_argument(layer: nn.Module) -> str:
    """What a decoder layer calls its KV cache; the name changed within transformers 5."""
    names = inspect.signature(layer.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


class Transformer:
    """The compute of one device. Not re-entrant: the compute stream's worker owns it.

    `parts` are the weights on that device; by default the model's own.
    """

    def __init__(
        self, loaded: LoadedModel, device: Device = CPU, parts: ModelParts | None = None
    ) -> None:
        self.loaded = loaded
        self.spec = loaded.spec
        self.device = device
        self.parts = parts or ModelParts.of(loaded)
        self.rows_by_layer = [0] * self.spec.n_layers
        """Rows that passed through each layer since the last reset."""
        self.projected_rows = 0
        """Rows that only a check layer projected."""
        self._layers = self.parts.layers
        self._cache = {_cache_argument(self._layers[0]): Scatter()}
        self._n_rope = 0
        self._ropes: list[tuple[Tensor, Tensor]] = []
        """Tables of `_n_rope` positions, one for each set of frequencies."""
        self._outgrown: list[tuple[Tensor, Tensor]] = []
        """Shorter tables, which another stream may still read; together no longer than the last."""
        self._rope_of: Tensor | None = None
        """Positions whose angles `_rope_here` holds, for each set of frequencies."""
        self._rope_here: list[Angles] = []

    def reset_counts(self) -> None:
        """Begin counting rows anew."""
        self.rows_by_layer = [0] * self.spec.n_layers
        self.projected_rows = 0

    def rope_table(self, n_positions: int, layer: int = 0) -> tuple[Tensor, Tensor]:
        """The model's own cos and sin of a layer, fp32 `[>= n_positions, R/2]`, a column per
        rotated pair."""
        if self._n_rope < n_positions:
            n = max(n_positions, 2 * self._n_rope)
            like = self.device.empty((1,), torch.float32)
            grown = []
            for cos, sin in self.parts.rope.angles(like, self.device.upload(torch.arange(n))[None]):
                half = cos.shape[-1] // 2
                grown.append((cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()))
            self.device.synchronise("rope table")  # whichever stream reads it
            self._outgrown += self._ropes
            self._ropes, self._n_rope = grown, n
        return self._ropes[self.parts.rope.of_layer[layer]]

    def embed(self, token_ids: Tensor) -> Tensor:
        """`[n]` ids to `[1, n, hidden]`."""
        hidden: Tensor = self.parts.embed(token_ids[None])
        return hidden

    def run_layers(self, hidden: Tensor, rows: Sequence[Packed], start: int, stop: int) -> Tensor:
        """Pass packed rows `[1, n, hidden]` through layers [start, stop)."""
        positions = rows[0].positions if len(rows) == 1 else torch.cat([r.positions for r in rows])
        if self._rope_of is not positions:  # the ops of a prompt share rows from group to group
            self._rope_here = self.parts.rope.angles(hidden, positions[None])
            self._rope_of = positions
        with packed(rows, self.device):
            for layer in range(start, stop):
                hidden = self._layers[layer](
                    hidden,
                    attention_mask=None,
                    position_embeddings=self._rope_here[self.parts.rope.of_layer[layer]],
                    position_ids=positions[None],
                    use_cache=True,
                    **self._cache,
                )
                self.rows_by_layer[layer] += positions.numel()
        return hidden

    def project_k(self, hidden: Tensor, layer: int) -> Tensor:
        """K before RoPE, `[n, HK, D]`, of all rows at the entry of `layer`."""
        module = self._layers[layer]
        normed = module.input_layernorm(hidden)  # type: ignore[operator]
        k: Tensor = module.self_attn.k_proj(normed)  # type: ignore[union-attr,operator]
        k = k.view(-1, self.spec.n_kv_heads, self.spec.head_dim)
        norm = getattr(module.self_attn, "k_norm", None)
        self.projected_rows += k.shape[0]
        return norm(k) if norm is not None else k

    def logits(self, hidden: Tensor) -> Tensor:
        """`[1, n, hidden]` to fp32 `[n, vocab]`."""
        out: Tensor = self.parts.lm_head(self.parts.norm(hidden))
        return out[0].float()

    def encode(self, token_ids: Tensor, behind: Tensor | None = None) -> EncodedKv:
        """K before RoPE and V of a chunk.

        Args:
            token_ids: `[N]`, the chunk.
            behind: `[M]`, text that stands before it; None encodes it alone.
        """
        ids = token_ids if behind is None else torch.cat([behind, token_ids])
        _, encoded = self.encode_at(ids, torch.arange(ids.numel()))
        return encoded.tokens(ids.numel() - token_ids.numel(), ids.numel())

    def device_of(self, layer: int) -> Device:
        """Where a layer's K and V are."""
        return self.device

    def encode_at(self, token_ids: Tensor, positions: Tensor) -> tuple[KvBuffer, EncodedKv]:
        """Prefill `[N]` tokens at ascending positions, seeing only each other.

        Returns the buffer with rotated K, and K before RoPE and V. Rows are not counted: this is
        preparation, not a request.
        """
        n_layers, n_slots = self.spec.n_layers, int(positions[-1]) + 1
        places = None if self.device is CPU else [(n_layers, self.device)]
        buffer = KvBuffer(self.spec, n_slots, places)
        if n_slots > token_ids.numel():
            for tensor in (*buffer.k, *buffer.v):
                tensor.zero_()
        rows = Rows.of(buffer, 0, positions, self.device)
        hidden = self.embed(self.device.upload(token_ids))
        _, k, v = self.encode_layers(hidden, rows, 0, n_layers)
        return buffer, EncodedKv((EncodedPart(self.device, k, v),))

    def encode_layers(
        self, hidden: Tensor, rows: Rows, start: int, stop: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states after layers [start, stop), and their K before RoPE and V."""
        counts = list(self.rows_by_layer)
        try:
            with self._catching(start, stop) as (k_parts, v_parts):
                hidden = self.run_layers(hidden, [rows], start, stop)
        finally:
            self.rows_by_layer = counts
        shape = (stop - start, rows.n, self.spec.n_kv_heads, self.spec.head_dim)
        return hidden, torch.stack(k_parts).view(shape), torch.stack(v_parts).view(shape)

    @contextmanager
    def _catching(self, start: int, stop: int) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Collect K before RoPE and V of layers [start, stop) that this thread runs.

        Hooks are there only meanwhile: those left on the modules would slow every request and
        keep this object alive as long as the model.
        """
        k: list[Tensor] = []
        v: list[Tensor] = []
        owner = threading.get_ident()

        def keep(to: list[Tensor]) -> Callable[[object, object, Tensor], None]:
            def hook(_: object, __: object, output: Tensor) -> None:
                if threading.get_ident() == owner:
                    to.append(output.detach().reshape(-1).clone())

            return hook

        handles = []
        for layer in self._layers[start:stop]:
            attention: Any = layer.self_attn
            source = getattr(attention, "k_norm", None) or attention.k_proj
            handles.append(source.register_forward_hook(keep(k)))
            handles.append(attention.v_proj.register_forward_hook(keep(v)))
        try:
            yield k, v
        finally:
            for handle in handles:
                handle.remove()
