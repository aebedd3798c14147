"""`Runner`: runs workloads and fixed schedules for real. Calibration, tuning and `LLM` use it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from ..core.block_pool import BlockPool
from ..core.chunk_index import ChunkIndex, content_id_of
from ..core.decision import ReuseDecision
from ..core.engine import Engine, batch_schedule_of
from ..core.errors import StoreError, WorkloadError
from ..core.executor import execute, serve
from ..core.ops import COMPUTE, RESTORE, Schedule, io_stream
from ..core.plan import ReusePlan
from ..core.policies import order_of
from ..core.timeline import Timeline
from ..core.workload import Request, Workload
from .chunk_store import ChunkStore
from .cuda_executor import CudaExecutor
from .device import Device, open_device, stage_devices
from .device_chunks import DeviceMemory
from .executor import CpuExecutor, SessionSource, WorkerExecutor
from .handlers import Handlers
from .ingest import Ingestor
from .kv_buffer import KvPool
from .kv_slab import SlabPool
from .loaded_model import LoadedModel
from .prefetch import LiveIndex, PrefetchCounters, Prefetcher
from .session import Session, token_tensor
from .stages import Stages
from .tiers import HostMemory, TierConfig
from .write_back import WriteBack

Decisions = Mapping[int, ReuseDecision]
"""By request id."""


def asked_by_tenant(workload: Workload) -> list[tuple[str, str]]:
    """(tenant, content id), each once; contents that nobody asks for are the nameless tenant's."""
    asked = dict.fromkeys((r.tenant, c) for r in workload.requests for c in r.chunks)
    known = {content_id for _, content_id in asked}
    return [*asked, *(("", c) for c in workload.contents if c not in known)]


def tenants_of(workload: Workload) -> list[str]:
    """Tenants with a request, each once."""
    return list(dict.fromkeys(r.tenant for r in workload.requests))


@dataclass
class RunResult:
    """What a run left: its timeline, and per request the tokens made."""

    timeline: Timeline
    token_ids: dict[int, list[int]] = field(default_factory=dict)
    suffix_logits: dict[int, torch.Tensor] = field(default_factory=dict)
    n_reused_tokens: dict[int, int] = field(default_factory=dict)
    """Tokens loaded rather than computed, at the last layer."""
    n_fallbacks: int = 0
    n_read_failures: int = 0
    prefetched: PrefetchCounters = field(default_factory=PrefetchCounters)


class Runner:
    """One model, one store, one device, or several as pipeline stages.

    Args:
        tiers: may be rate limited to act as slower ones.
        write_back_bytes: `prepare(only_missing=True)` leaves writing to a queue that long.
        device: where the model runs: a name as `open_device` takes it, or one that is open.
        pipeline_stages: devices that share the layers at first; a plan may ask for others.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        store_dir: str | Path,
        tiers: Sequence[TierConfig],
        *,
        kv_capacity_tokens: int = 1 << 17,
        compute_threads: int = 1,
        seed: int = 0,
        write_back_bytes: int | None = None,
        device: str | Device = "cpu",
        pipeline_stages: int = 1,
    ) -> None:
        torch.set_num_threads(compute_threads)
        self.device = open_device(device) if isinstance(device, str) else device
        self.loaded = loaded
        self.spec = loaded.spec
        self.compute_threads = compute_threads
        self.kv_capacity_tokens = kv_capacity_tokens
        self.stages = self._cut(stage_devices(self.device, pipeline_stages))
        self.transformer = self.stages.encoder
        memory = None
        if self.device.kind != "cpu":
            memory = HostMemory(self.device.host_pages, self.device.lasting_pages)
        self.store = ChunkStore(
            Path(store_dir), self.spec, loaded.fingerprint, tiers, memory,
            DeviceMemory(lambda: self.stages.places),
        )  # fmt: skip
        self.write_back = WriteBack(write_back_bytes) if write_back_bytes else None
        self.ingestor = Ingestor(self.transformer, self.store, seed=seed)

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def use_stages(self, n: int) -> None:
        """Cut the model into `n` stages, if it is not; what ran before has ended.

        Raises:
            PlanError, DeviceError, CapacityError: too many for the layers or the devices; the
                model stays cut as it was.
        """
        before = self.stages.devices
        if len(before) == n:
            return
        ReusePlan(pipeline_stages=n).check_stages(self.spec.n_layers)
        devices = stage_devices(self.device, n)
        if self.write_back is not None:
            self.write_back.flush()  # or it would put chunks where the layers were
        self.store.forget_devices()
        self.stages.release()
        try:
            self.stages = self._cut(devices)
        except BaseException as e:
            e.__traceback__ = e.__context__ = None  # their frames hold what was allocated already
            self.stages = self._cut(before)
            raise
        finally:
            self.transformer = self.ingestor.transformer = self.stages.encoder

    @property
    def _pool(self) -> KvPool | SlabPool:
        return self.stages.pool

    def _cut(self, devices: Sequence[Device]) -> Stages:
        for device in devices:
            _ = device.copy_from_bytes  # measured beside no KV, and not within the first request
        return Stages(self.loaded, devices, self.kv_capacity_tokens)

    @property
    def n_kv_blocks(self) -> int:
        """KV capacity in blocks of 16 tokens, the pool's default."""
        return self.kv_capacity_tokens // 16

    def close(self) -> None:
        """Write what is queued, close the store, let go of KV before garbage is collected."""
        if self.write_back is not None:
            self.write_back.close()
        self.store.close()
        self.stages.release()

    def prepare(
        self, workload: Workload, plan: ReusePlan, tier: str, *, only_missing: bool = False
    ) -> None:
        """Have every content of `workload` in `tier`, in the order `plan` needs.

        With `only_missing`, chunks that are kept stay in the tier they are in, and those larger
        than `tier` are left out.
        """
        order = order_of(plan)
        texts = [c.token_ids for c in workload.contents.values() if c.token_ids is not None]
        for tenant, content_id in asked_by_tenant(workload):
            content = workload.contents[content_id]
            entry = self.ingestor.kept(content_id, order, tenant)
            if entry is not None and (only_missing or self.store.place_if_sound(entry.key, tier)):
                continue
            if only_missing and not self.ingestor.fits(content.n_tokens, tier):
                continue  # the others are kept all the same
            if content.token_ids is None:
                raise WorkloadError(
                    "a workload that is run for real needs token ids",
                    values=f"content '{content_id}' has none",
                    remedy="add token_ids to the table of contents, or simulate it",
                )
            if content_id_of(content.token_ids) != content_id:
                raise WorkloadError(
                    "a content that is run for real must be named by the hash of its tokens",
                    values=f"content '{content_id}'",
                    remedy="rename contents with Workload.by_content()",
                )
            ingest: Callable[..., object] = self.ingestor.ingest
            if only_missing and self.write_back is not None:
                ingest = partial(self.ingestor.ingest_behind, self.write_back)
            ingest(content.token_ids, selector=order, tier=tier, neighbours=texts, tenant=tenant)

    def index(
        self, plan: ReusePlan, tier: str | None = None, tenants: Iterable[str] = ("",)
    ) -> LiveIndex:
        """What a policy may use of these tenants' chunks; all in `tier` if one is given."""
        index = LiveIndex()
        for tenant in tenants:
            self.store.index(order_of(plan), tenant, tier, into=index)
        return index

    def schedule(
        self, workload: Workload, request: Request, plan: ReusePlan, index: ChunkIndex
    ) -> tuple[Decisions, Schedule]:
        """The fixed DAG of one request."""
        return self.batch_schedule(workload.replace(requests=(request,)), plan, index)

    def batch_schedule(
        self, workload: Workload, plan: ReusePlan, index: ChunkIndex, n_decode: int = 0
    ) -> tuple[Decisions, Schedule]:
        """The fixed DAG of all requests at once, then `n_decode` steps of the batch."""
        decisions, ops = batch_schedule_of(workload, self.spec, plan, index, n_decode)
        return decisions, Schedule.of(ops, label=f"{plan.policy}/{workload.name}")

    def execute(
        self,
        workload: Workload,
        request: Request,
        plan: ReusePlan,
        index: ChunkIndex,
        *,
        keep_suffix_logits: bool = False,
    ) -> RunResult:
        """Run one request's fixed DAG (prompt and first token)."""
        decisions, schedule = self.schedule(workload, request, plan, index)
        return self.execute_schedule(
            workload, plan, decisions, schedule, keep_suffix_logits=keep_suffix_logits
        )

    def execute_schedule(
        self,
        workload: Workload,
        plan: ReusePlan,
        decisions: Decisions,
        schedule: Schedule,
        *,
        keep_suffix_logits: bool = False,
    ) -> RunResult:
        """Run a given DAG, whole or a part of one (loads alone, compute alone).

        Raises:
            StoreError: a chunk that the DAG loads cannot be read.
        """
        requests = {r.request_id: r for r in workload.requests}
        result = RunResult(Timeline((), 0, ()))

        def source(request_id: int, attempt: int) -> Session:
            return self._session(
                workload,
                requests[request_id],
                attempt,
                decisions[request_id],
                keep_suffix_logits=keep_suffix_logits,
            )

        handlers = self._handlers(plan)
        self._capture(
            max((len(o.request_ids) for o in schedule.ops if o.kind == "decode"), default=0)
        )
        with self._executor(handlers, source, result) as executor:
            executor.warm({op.stream for op in schedule.ops})
            result.timeline = replace(execute(schedule, executor), waits=executor.host_waits())
            for session in executor.open_sessions():
                self._collect(result, session)
        self._drop_corrupt(handlers)
        for found in handlers:
            if found.unreadable:
                # A fixed DAG cannot fall back, so its times would be of ops that did nothing.
                raise found.unreadable[0]
        return result

    def serve(
        self,
        workload: Workload,
        plan: ReusePlan,
        index: ChunkIndex,
        *,
        stop_token: int | Sequence[int] | None = None,
        prefetch: str | None = None,
    ) -> RunResult:
        """Serve a workload in the closed loop of the engine.

        A chunk that cannot be read is computed instead; one that is corrupt leaves the store.
        With `prefetch`, chunks of a request that waits move to that tier (prefetch.py).

        Raises:
            WorkloadError: a request does not fit the model's context, or lacks token ids.
            CapacityError: a request is larger than the KV capacity.
        """
        workload.check_fits(self.spec)
        stop_tokens = frozenset([stop_token] if isinstance(stop_token, int) else stop_token or ())
        blocks = BlockPool(self.n_kv_blocks)
        prefetcher = self._prefetcher(index, prefetch)
        on_wait = prefetcher.on_wait if prefetcher is not None else None
        engine = Engine(workload, self.spec, plan, index, blocks, on_wait)
        requests = {r.request_id: r for r in workload.requests}
        result = RunResult(Timeline((), 0, ()))

        def source(request_id: int, attempt: int) -> Session:
            decision = engine.decision_of(request_id)
            return self._session(
                workload, requests[request_id], attempt, decision, stop_tokens=stop_tokens
            )

        handlers = self._handlers(plan)
        self._capture(min(plan.max_num_seqs, len(workload.requests)))
        with prefetcher or nullcontext(), self._executor(handlers, source, result) as executor:
            executor.warm(self._streams(plan))
            timeline = serve(workload, engine, executor)
            result.timeline = replace(timeline, waits=executor.host_waits())
        self._drop_corrupt(handlers)
        result.n_fallbacks = engine.n_fallbacks
        result.n_read_failures = sum(found.n_read_failures for found in handlers)
        if prefetcher is not None:
            result.prefetched = prefetcher.counters
        return result

    def _capture(self, most: int) -> None:
        """Have decode steps of up to `most` requests ready to be replayed, where that is done."""
        if most and self.stages.graphs is not None:
            self.stages.graphs.prepare(most)

    def _prefetcher(self, index: ChunkIndex, tier: str | None) -> Prefetcher | None:
        if tier is None:
            return None
        if not isinstance(index, LiveIndex):
            raise StoreError(
                "prefetching needs an index that can learn of moves",
                values=type(index).__name__,
                remedy="serve with Runner.index(...)",
            )
        return Prefetcher(self.store, index, tier)

    def _streams(self, plan: ReusePlan) -> list[str]:
        """Streams that ops under `plan` may name."""
        workers = range(plan.n_io_workers)
        return [COMPUTE, RESTORE, *(io_stream(t, w) for t in self.store.tiers for w in workers)]

    def _drop_corrupt(self, handlers: Sequence[Handlers]) -> None:
        """Forget chunks whose bytes are bad, so that they can be ingested again."""
        for key in {key for found in handlers for key in found.corrupt_keys}:
            self.store.discard(key)

    def _handlers(self, plan: ReusePlan) -> list[Handlers]:
        """One for each stage of the plan."""
        self.use_stages(plan.pipeline_stages)
        stages = self.stages
        return [
            Handlers(transformer, self.store, plan.request_bytes, stages.graphs)
            for transformer in stages.transformers
        ]

    def _executor(
        self, handlers: Sequence[Handlers], source: SessionSource, result: RunResult
    ) -> WorkerExecutor:
        made = CpuExecutor if self.device.kind == "cpu" else CudaExecutor
        on_end = partial(self._collect, result)
        return made(handlers, source, on_end, lambda s: self._pool.give_back(s.buffer))

    def _collect(self, result: RunResult, session: Session) -> None:
        request_id = session.request_id
        result.token_ids[request_id] = list(session.new_tokens)
        last = self.spec.n_layers - 1
        result.n_reused_tokens[request_id] = session.n_prompt - session.decision.n_computed(
            last, self.spec.n_layers
        )
        if session.suffix_logits is not None:
            result.suffix_logits[session.request_id] = session.suffix_logits

    def _session(
        self,
        workload: Workload,
        request: Request,
        attempt: int,
        decision: ReuseDecision,
        *,
        stop_tokens: frozenset[int] = frozenset(),
        keep_suffix_logits: bool = False,
    ) -> Session:
        ids = [workload.contents[c].token_ids for c in request.chunks]
        if request.suffix_ids is None or any(i is None for i in ids):
            raise WorkloadError(
                "a workload that is run for real needs token ids",
                values=f"request {request.request_id} lacks some",
                remedy="add token_ids and suffix_ids, or simulate it",
            )
        token_ids = token_tensor([*(chunk for chunk in ids if chunk), request.suffix_ids])
        if self.device.kind != "cpu":  # a table that grew within an op would hold up its stream
            self.stages.rope_tables(len(token_ids))
        buffer = self._pool.take(len(token_ids) + request.max_output_tokens)
        return Session(
            request.request_id, attempt, token_ids, decision, self.store.order, buffer,
            request.output_tokens, self.spec.n_layers, stop_tokens=stop_tokens,
            keep_suffix_logits=keep_suffix_logits,
        )  # fmt: skip
