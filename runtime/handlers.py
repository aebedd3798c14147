"""What each op kind does on the CPU. Each takes the session and the op; none decides anything."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.errors import StoreError
from ..core.ops import NOTHING, Op, Outcome
from ..kernels.reference import deviation, restore, top_indices
from .attention import Rows
from .chunk_store import ChunkCorrupt, ChunkStore
from .session import Session
from .transformer import Transformer


class Handlers:
    """Ops of one device. Streams call different kinds at the same time."""

    def __init__(self, transformer: Transformer, store: ChunkStore, request_bytes: int) -> None:
        self.transformer = transformer
        self.store = store
        self.request_bytes = request_bytes
        self.unreadable: list[StoreError] = []
        """Why reads of stored chunks failed, one each."""
        self.corrupt_keys: set[str] = set()
        """Chunks whose bytes are bad or gone, so that trying again cannot help."""

    @property
    def n_read_failures(self) -> int:
        """Reads of stored chunks that failed."""
        return len(self.unreadable)

    def load(self, session: Session, op: Op) -> Outcome:
        """Read the rows that are loaded, layer by layer, into staging; verified."""
        failed = []
        n_layers = self.transformer.spec.n_layers
        for ordinal in op.chunks:
            layers = [
                layer
                for layer in range(op.layer_start, op.layer_stop)
                if session.decision.n_loaded(ordinal, layer, n_layers)
            ]
            counts = [session.decision.n_loaded(ordinal, layer, n_layers) for layer in layers]
            key = session.decision.chunks[ordinal].key
            try:
                session.order(ordinal)
                rows = self.store.read(
                    key, layers[0], layers[-1] + 1, counts, self.request_bytes, op.tier
                )
            except StoreError as e:
                self.unreadable.append(e)
                if isinstance(e, ChunkCorrupt):
                    self.corrupt_keys.add(key)
                failed.append(ordinal)
                continue
            for layer in layers:
                session.staged[ordinal, layer] = rows
        if failed:
            session.failed = True
        return Outcome(failed_chunks=tuple(failed)) if failed else NOTHING

    def restore(self, session: Session, op: Op) -> Outcome:
        """Rotate staged K at its place in this prompt; scatter K and V."""
        cos, sin = self.transformer.rope_table(session.n_prompt)
        n_layers = self.transformer.spec.n_layers
        counts = [session.decision.n_loaded(c, op.layer_start, n_layers) for c in op.chunks]
        positions = torch.cat(
            [session.loaded_positions(c, n) for c, n in zip(op.chunks, counts, strict=True)]
        )
        for layer in range(op.layer_start, op.layer_stop):
            # The check layer's rows are still compared, on another stream.
            by_deviation = session.decision.selection == "deviation"
            keep = by_deviation and layer == session.decision.check_layer
            take = session.staged.__getitem__ if keep else session.staged.pop
            staged = [take((ordinal, layer)) for ordinal in op.chunks]
            # One call for all chunks: short calls would hold up the compute stream's Python.
            restore(
                torch.cat([rows.k(layer) for rows in staged]),
                torch.cat([rows.v(layer) for rows in staged]),
                positions,
                session.buffer.k[layer],
                session.buffer.v[layer],
                cos_table=cos,
                sin_table=sin,
            )
        return NOTHING

    def prefill(self, session: Session, op: Op) -> Outcome:
        """Pass the op's rows through its layers; K and V land in the buffer."""
        hidden, positions = session.enter(op, self.transformer.embed)
        if positions.numel():
            rows = Rows.of(session.buffer, 0, positions)
            hidden = self.transformer.run_layers(hidden, [rows], op.layer_start, op.layer_stop)
        session.hidden[op.piece] = (hidden, positions)
        return NOTHING

    def select(self, session: Session, op: Op) -> Outcome:
        """Compare fresh K with stored K at the check layer; keep the rows that deviate most.

        Both are taken before RoPE: a rotation does not change their distance.
        """
        layer = op.layer_start
        hidden, positions = session.hidden[0]
        fresh = self.transformer.project_k(hidden, layer)
        if positions.numel() != session.n_prompt:
            raise AssertionError(f"select sees {positions.numel()} of {session.n_prompt} rows")
        scores, places = [], []
        n_layers = self.transformer.spec.n_layers
        for ordinal in session.candidates():
            n_rows = session.decision.n_loaded(ordinal, layer, n_layers)
            at = session.loaded_positions(ordinal, n_rows)
            stored = session.staged[ordinal, layer].k(layer)
            scores.append(deviation(fresh[at], stored))
            places.append(at)
        chosen = torch.empty(0, dtype=torch.int64)
        if places:
            where = torch.cat(places)
            ascending = where.sort()
            score = torch.cat(scores)[ascending.indices]
            chosen = ascending.values[top_indices(score, session.decision.n_selected)]
        session.selected = chosen
        return Outcome(selected=tuple(chosen.tolist()))

    def head(self, session: Session, op: Op) -> Outcome:
        """Logits of the last row and the first token."""
        pieces = [session.hidden[piece][0] for piece in sorted(session.hidden)]
        session.hidden.clear()
        session.staged.clear()
        if session.keep_suffix_logits:
            suffix = torch.cat(pieces, dim=1)[:, -session.decision.n_suffix :]
            session.suffix_logits = self.transformer.logits(suffix)
        logits = self.transformer.logits(pieces[-1][:, -1:])
        return self._made([session], logits)

    def decode(self, sessions: Sequence[Session], op: Op) -> Outcome:
        """One token for each session of the batch."""
        ids = torch.tensor([s.new_tokens[-1] for s in sessions])
        rows = []
        for i, session in enumerate(sessions):
            at = session.n_prompt + len(session.new_tokens) - 1
            rows.append(Rows(session.buffer, i, i + 1, torch.tensor([at]), at + 1, is_run=True))
        hidden = self.transformer.run_layers(
            self.transformer.embed(ids), rows, 0, self.transformer.spec.n_layers
        )
        return self._made(sessions, self.transformer.logits(hidden))

    def _made(self, sessions: Sequence[Session], logits: Tensor) -> Outcome:
        tokens = logits.argmax(dim=-1).tolist()
        for session, token in zip(sessions, tokens, strict=True):
            session.new_tokens.append(token)
        ended = tuple(s.request_id for s in sessions if s.finished())
        return Outcome(token_ids=tuple(tokens), ended=ended)
