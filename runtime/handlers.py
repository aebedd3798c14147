"""What each op kind does on one device. Each takes the session and the op; none decides anything.

A handler gives the op's outcome, or what gives it once the device has got there. On a GPU it only
queues work: nothing here reads a value back from the device before the op has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import StoreError
from ..core.layout import GROUP_TOKENS
from ..core.ops import NOTHING, Op, Outcome
from ..kernels.packing import Packed
from ..kernels.reference import top_indices
from .attention import Rows
from .chunk_store import ChunkCorrupt, ChunkStore
from .cuda_graphs import DecodeGraphs
from .layer_rows import LayerRows
from .session import Session
from .transformer import Transformer

Made = Outcome | Callable[[], Outcome]


class Handlers:
    """Ops of one device. Streams call different kinds at the same time."""

    def __init__(
        self,
        transformer: Transformer,
        store: ChunkStore,
        request_bytes: int,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self.transformer = transformer
        self.device = transformer.device
        self.store = store
        self.request_bytes = request_bytes
        self.graphs = graphs
        """Decode steps of requests whose KV lies in a pooled buffer, if there is one."""
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
                order = session.order(ordinal)
                rows = self.store.read(
                    key, layers[0], layers[-1] + 1, counts, self.request_bytes, op.tier, order
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

    def read_by(self, session: Session, op: Op) -> list[LayerRows]:
        """What a load has read, in host memory or on the device."""
        layers = range(op.layer_start, op.layer_stop)
        found = (session.staged.get((c, layer)) for c in op.chunks for layer in layers)
        return list({id(rows): rows for rows in found if rows is not None}.values())

    def copy_in(self, session: Session, op: Op) -> None:
        """Queue the copies of what a load has read to the device, where they stand for it.

        What was read must not change before they are done.
        """
        moved: dict[int, LayerRows] = {}
        for ordinal in op.chunks:
            for layer in range(op.layer_start, op.layer_stop):
                rows = session.staged.get((ordinal, layer))
                if rows is None:
                    continue
                if id(rows) not in moved:
                    moved[id(rows)] = rows.on(self.device)
                session.staged[ordinal, layer] = moved[id(rows)]

    def restore(self, session: Session, op: Op) -> Outcome:
        """Rotate staged K at its place in this prompt; scatter K and V."""
        spec = self.transformer.spec
        counts = [session.decision.n_loaded(c, op.layer_start, spec.n_layers) for c in op.chunks]
        places = [session.loaded_positions(c, n) for c, n in zip(op.chunks, counts, strict=True)]
        # Codes, and on a device values too, are put together by whole groups: what fills up the
        # last one of a chunk goes nowhere.
        by_groups = spec.is_packed or self.device.kind != "cpu"
        if by_groups:
            places = [F.pad(at, (0, -at.numel() % GROUP_TOKENS), value=-1) for at in places]
        positions = self.device.upload(torch.cat(places))
        for layer in range(op.layer_start, op.layer_stop):
            # The check layer's rows are still compared, on another stream.
            by_deviation = session.decision.selection == "deviation"
            keep = by_deviation and layer == session.decision.check_layer
            take = session.staged.__getitem__ if keep else session.staged.pop
            staged = [take((ordinal, layer)) for ordinal in op.chunks]
            for rows in staged:
                self.device.used_here(rows.elements)
            rope = self.transformer.rope_table(session.n_prompt, layer)
            # One call for all chunks: short calls would hold up the compute stream's Python.
            k: Tensor | Packed
            v: Tensor | Packed
            if by_groups:
                join = LayerRows.joined if spec.is_packed else LayerRows.joined_values
                k, v = join(staged, layer)
            else:
                kept = zip(*(rows.kept(layer) for rows in staged), strict=True)
                k, v = (torch.cat(part) for part in kept)
            out = (session.buffer.k[layer], session.buffer.v[layer], *rope)
            self.device.restore(k, v, positions, *out)
        return NOTHING

    def prefill(self, session: Session, op: Op) -> Outcome:
        """Pass the op's rows through its layers; K and V land in the buffer."""
        hidden, rows = session.enter(op, self.device, self.transformer.embed)
        if rows is not None:
            hidden = self.transformer.run_layers(hidden, [rows], op.layer_start, op.layer_stop)
        session.hidden[op.piece] = (hidden, rows)
        return NOTHING

    def prefill_all(self, sessions: Sequence[Session], op: Op) -> Outcome:
        """Pass the rows of several requests through the op's layers, packed into one batch."""
        entered: list[tuple[Session, Op, Rows]] = []
        hiddens, batch, n = [], [], 0
        for session, part in zip(sessions, op.parts, strict=True):
            if session.failed:
                continue
            hidden, rows = session.enter(part, self.device, self.transformer.embed)
            if rows is None:
                session.hidden[part.piece] = (hidden, None)
                continue
            entered.append((session, part, rows))
            hiddens.append(hidden)
            batch.append(rows.moved(n))
            n += rows.n
        if entered:
            hidden = torch.cat(hiddens, dim=1)
            hidden = self.transformer.run_layers(hidden, batch, op.layer_start, op.layer_stop)
            for (session, part, rows), at in zip(entered, batch, strict=True):
                session.hidden[part.piece] = (hidden[:, at.start : at.stop], rows)
        return NOTHING

    def select(self, session: Session, op: Op) -> Made:
        """Compare fresh K with stored K at the check layer; keep the rows that deviate most.

        Both are taken before RoPE: a rotation does not change their distance.
        """
        layer = op.layer_start
        hidden, rows = session.hidden[0]
        fresh = self.transformer.project_k(self.device.move(hidden), layer)
        n_rows = rows.n if rows is not None else 0
        if n_rows != session.n_prompt:
            raise AssertionError(f"select sees {n_rows} of {session.n_prompt} rows")
        scores, places = [], []
        n_layers = self.transformer.spec.n_layers
        for ordinal in session.candidates():
            count = session.decision.n_loaded(ordinal, layer, n_layers)
            at = self.device.upload(session.loaded_positions(ordinal, count))
            staged = session.staged[ordinal, layer]
            self.device.used_here(staged.elements)
            scores.append(self.device.deviation(fresh[at], staged.k(layer)))
            places.append(at)
        chosen = torch.empty(0, dtype=torch.int64)
        if places:
            where = torch.cat(places)
            ascending = where.sort()
            score = torch.cat(scores)[ascending.indices]
            chosen = ascending.values[top_indices(score, session.decision.n_selected)]
        else:
            chosen = self.device.upload(chosen)
        session.selected = chosen
        found = self.device.download(chosen)
        return lambda: Outcome(selected=tuple(found().tolist()))

    def head(self, session: Session, op: Op) -> Made:
        """Logits of the last row and the first token."""
        pieces = [session.hidden[piece][0] for piece in sorted(session.hidden)]
        session.hidden.clear()
        session.staged.clear()
        if session.keep_suffix_logits:
            whole = torch.cat([self.device.move(p) for p in pieces], dim=1)
            suffix = self.transformer.logits(whole[:, -session.decision.n_suffix :])
            kept = self.device.download(suffix)
        logits = self.transformer.logits(self.device.move(pieces[-1])[:, -1:])
        made = self._made([session], logits.argmax(dim=-1))

        def outcome() -> Outcome:
            if session.keep_suffix_logits:
                session.suffix_logits = kept()
            return made()

        return outcome

    def decode(self, sessions: Sequence[Session], op: Op) -> Made:
        """One token for each session of the batch; on a stage before the last, its layers."""
        last = self.transformer.spec.n_layers
        if self.graphs is not None and self.graphs.takes(sessions, op):
            return self._made(sessions, self.graphs.step(sessions))
        rows = []
        for i, session in enumerate(sessions):
            at = session.n_prompt + session.n_begun - 1
            host = torch.tensor([at])
            here = self.device.upload(host)
            rows.append(Rows(session.buffer, i, i + 1, here, at + 1, is_run=True, host=host))
        if op.layer_start == 0:
            hidden = self.transformer.embed(self.newest(sessions))
        else:
            hidden = torch.cat([self.device.move(s.passed()) for s in sessions], dim=1)
        hidden = self.transformer.run_layers(hidden, rows, op.layer_start, op.layer_stop)
        if op.layer_stop < last:
            for i, session in enumerate(sessions):
                session.pass_on(hidden[:, i : i + 1])
            return NOTHING
        return self._made(sessions, self.transformer.logits(hidden).argmax(dim=-1))

    def newest(self, sessions: Sequence[Session]) -> Tensor:
        """int64 `[n]`: the last token of each session."""
        if all(s.last_token is None for s in sessions):
            return self.device.upload(torch.tensor([s.new_tokens[-1] for s in sessions]))
        return torch.cat([self.device.move(s.last_token) for s in sessions])  # type: ignore[arg-type]

    def _made(self, sessions: Sequence[Session], tokens: Tensor) -> Callable[[], Outcome]:
        """Take note of tokens, int64 `[n]`, that the device makes now."""
        found = self.device.download(tokens)
        for i, session in enumerate(sessions):
            session.n_begun += 1
            if self.device.kind != "cpu":
                session.last_token = tokens[i : i + 1]

        def outcome() -> Outcome:
            made = found().tolist()
            for session, token in zip(sessions, made, strict=True):
                session.new_tokens.append(token)
            ended = tuple(s.request_id for s in sessions if s.finished())
            return Outcome(token_ids=tuple(made), ended=ended)

        return outcome
