"""`Lives`: spans of watched requests, for a Chrome trace of one request's life."""

from __future__ import annotations

from collections.abc import Collection

from ..core.ops import COMPUTE, Op, OpKind, Span, io_stream
from .serving_links import Flow
from .serving_step import Step


class Lives:
    """Spans by watched row. Decode steps are one span, from the first token to the last."""

    def __init__(self, watch: Collection[int], n_layers: int) -> None:
        self.spans: dict[int, list[Span]] = {row: [] for row in watch}
        self._n_layers = n_layers
        self._n = 0

    def loaded(self, flow: Flow, tier: str) -> None:
        """A flow has ended."""
        job = flow.owner
        if job.row in self.spans:
            end_ns = flow.end_ns + flow.latency_ns
            op = self._op(
                "load", io_stream(tier, 0), job.row, 0, job.replica.index, flow.n_bytes, tier
            )
            self._add(job.row, op, job.arrival_ns, flow.start_ns, end_ns)

    def stepped(self, step: Step, now_ns: int) -> None:
        """A step with prompt pieces has ended."""
        for job, rows in step.pieces:
            if job.row in self.spans:
                op = self._op("prefill", COMPUTE, job.row, rows, step.replica.index)
                self._add(job.row, op, job.arrival_ns, step.start_ns, now_ns)

    def ended(self, row: int, n_output: int, first_ns: int, end_ns: int, replica: int) -> None:
        """The last token is made."""
        if row in self.spans and n_output > 1:
            op = self._op("decode", COMPUTE, row, n_output - 1, replica)
            self._add(row, op, first_ns, first_ns, end_ns)

    def _op(
        self,
        kind: OpKind,
        stream: str,
        row: int,
        n_tokens: int,
        replica: int,
        n_bytes: int = 0,
        tier: str = "",
    ) -> Op:
        self._n += 1
        return Op(
            op_id=self._n,
            kind=kind,
            stream=stream,
            request_ids=(row,),
            layer_start=0,
            layer_stop=self._n_layers,
            n_tokens=n_tokens,
            n_bytes=n_bytes,
            tier=tier,
            device=replica,
        )

    def _add(self, row: int, op: Op, submit_ns: int, start_ns: int, end_ns: int) -> None:
        self.spans[row].append(Span(op, op.op_id, submit_ns, start_ns, end_ns))
