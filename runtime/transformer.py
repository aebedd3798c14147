"""`Transformer`: drives the library's decoder layers for any rows, any layers, any order.

An op is "layers a..b for these tokens", so our loop calls the layers itself. Rows that pass
through each layer are counted here: tests compare the count with what the policy named.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .attention import Rows, Scatter, packed
from .kv_buffer import KvBuffer
from .loaded_model import LoadedModel


class Transformer:
    """The compute of one device. Not re-entrant: the compute stream's worker owns it."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.spec = loaded.spec
        self.rows_by_layer = [0] * self.spec.n_layers
        """Rows that passed through each layer since the last reset."""
        self.projected_rows = 0
        """Rows that only a check layer projected."""
        self._layers = loaded.layers
        self._scatter = Scatter()
        self._rope = (torch.empty(0, 1), torch.empty(0, 1))
        self._rope_of: Tensor | None = None
        """Positions whose cos and sin `_rope_here` holds, `[1, n, D]` each."""
        self._rope_here = self._rope

    def reset_counts(self) -> None:
        """Begin counting rows anew."""
        self.rows_by_layer = [0] * self.spec.n_layers
        self.projected_rows = 0

    def rope_table(self, n_positions: int) -> tuple[Tensor, Tensor]:
        """The model's own cos and sin, fp32 `[>= n_positions, R/2]`, a column per rotated pair."""
        if self._rope[0].shape[0] < n_positions:
            n = max(n_positions, 2 * self._rope[0].shape[0])
            like = torch.empty(1, dtype=torch.float32)
            cos, sin = self.loaded.hf.model.rotary_emb(like, torch.arange(n)[None])
            half = cos.shape[-1] // 2
            self._rope = (cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())
        return self._rope

    def embed(self, token_ids: Tensor) -> Tensor:
        """`[n]` ids to `[1, n, hidden]`."""
        hidden: Tensor = self.loaded.hf.model.embed_tokens(token_ids[None])
        return hidden

    def run_layers(self, hidden: Tensor, rows: Sequence[Rows], start: int, stop: int) -> Tensor:
        """Pass packed rows `[1, n, hidden]` through layers [start, stop)."""
        positions = rows[0].positions if len(rows) == 1 else torch.cat([r.positions for r in rows])
        if self._rope_of is not positions:  # the ops of a prompt share rows from group to group
            self._rope_here = self.loaded.hf.model.rotary_emb(hidden, positions[None])
            self._rope_of = positions
        rope = self._rope_here
        with packed(rows):
            for layer in range(start, stop):
                hidden = self._layers[layer](
                    hidden,
                    attention_mask=None,
                    position_embeddings=rope,
                    position_ids=positions[None],
                    past_key_values=self._scatter,
                    use_cache=True,
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
        model = self.loaded.hf
        out: Tensor = model.lm_head(model.model.norm(hidden))
        return out[0].float()

    def encode(self, token_ids: Tensor, behind: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """K before RoPE and V of a chunk, `[L, N, HK, D]` each.

        Args:
            token_ids: `[N]`, the chunk.
            behind: `[M]`, text that stands before it; None encodes it alone.
        """
        ids = token_ids if behind is None else torch.cat([behind, token_ids])
        _, k, v = self.encode_at(ids, torch.arange(ids.numel()))
        skip = ids.numel() - token_ids.numel()
        return k[:, skip:].contiguous(), v[:, skip:].contiguous()

    def encode_at(self, token_ids: Tensor, positions: Tensor) -> tuple[KvBuffer, Tensor, Tensor]:
        """Prefill `[N]` tokens at ascending positions, seeing only each other.

        Returns the buffer with rotated K, and K before RoPE and V, `[L, N, HK, D]` each. Rows are
        not counted: this is preparation, not a request.
        """
        n = token_ids.numel()
        n_slots = int(positions[-1]) + 1
        buffer = KvBuffer(self.spec, n_slots)
        if n_slots > n:
            buffer.k.zero_()
            buffer.v.zero_()
        rows = Rows.of(buffer, 0, positions)
        counts = list(self.rows_by_layer)
        try:
            with self._catching() as (k_parts, v_parts):
                self.run_layers(self.embed(token_ids), [rows], 0, self.spec.n_layers)
        finally:
            self.rows_by_layer = counts
        shape = (self.spec.n_layers, n, self.spec.n_kv_heads, self.spec.head_dim)
        return buffer, torch.stack(k_parts).view(shape), torch.stack(v_parts).view(shape)

    @contextmanager
    def _catching(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Collect K before RoPE and V of every layer that this thread runs.

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
        for layer in self._layers:
            attention: Any = layer.self_attn
            source = getattr(attention, "k_norm", None) or attention.k_proj
            handles.append(source.register_forward_hook(keep(k)))
            handles.append(attention.v_proj.register_forward_hook(keep(v)))
        try:
            yield k, v
        finally:
            for handle in handles:
                handle.remove()
