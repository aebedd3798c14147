"""`LLM(model, plan=...).generate(prompts)`: the user's door, in the shape people know."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any, Literal

from torch import nn

from ..core.chunk_index import content_id_of
from ..core.errors import CacheTuneError, PlanError, StoreError, WorkloadError
from ..core.metrics import per_request
from ..core.model_spec import Stored
from ..core.plan import ReusePlan, TunedPlan
from ..core.policies import order_of
from ..core.workload import Content, Request, Workload
from .device import open_device
from .loaded_model import LoadedModel, load_model
from .lookup import index_for
from .machine import device_here
from .rope_gate import check_rope
from .runner import Runner, RunResult
from .tiers import TierConfig

log = logging.getLogger(__name__)

Text = str | Sequence[int]


@dataclass(frozen=True)
class Prompt:
    """Reusable chunks in order, then a suffix that is always computed.

    Each part is text (the `LLM` needs a tokenizer then) or token ids. Chunks are shared by the
    prompts of one tenant only.
    """

    chunks: Sequence[Text]
    suffix: Text
    max_tokens: int = 16
    tenant: str = ""


@dataclass(frozen=True)
class Completion:
    """What came of one prompt."""

    token_ids: list[int]
    text: str | None
    ttft_ms: float
    n_prompt_tokens: int
    n_reused_tokens: int


class LLM:
    """A model with a chunk store behind it.

    Args:
        model: Hugging Face folder, a shape's name, a module, or a `LoadedModel`.
        plan: a `ReusePlan`, a `TunedPlan` or the path of one; None reuses by default knobs.
        store_dir: where chunks are kept; None keeps them for the life of this object.
        tier: where newly ingested chunks go, by name.
        tiers: the tiers there are; DRAM and a local file tier by default.
        tokenizer: anything with `encode(text)` and `decode(ids)`.
        ingest: when chunks that were not found are stored: after the answers, or never.
        allow_mismatch: load a plan that was tuned for another machine or model.
        write_back_bytes: size of the queue of chunks that are written after `generate` returns;
            what does not fit is dropped. None writes them before.
        device: cpu, cuda or cuda:<i>.
        stored: what is kept of K and V: `native`, FP8, or codes of 8, 4, 3 or 2 bits (lossy).

    Raises:
        ModelError: family or RoPE kind not supported, or the RoPE gate fails.
        PlanError: the plan is for another machine or model.
        StoreError: no tier of that name, or trouble with the folder.
    """

    def __init__(
        self,
        model: str | Path | nn.Module | LoadedModel,
        plan: ReusePlan | TunedPlan | str | Path | None = None,
        *,
        store_dir: str | Path | None = None,
        tier: str = "dram",
        tiers: Sequence[TierConfig] | None = None,
        tokenizer: Any = None,
        dtype: str = "float32",
        ingest: Literal["after", "never"] = "after",
        allow_mismatch: bool = False,
        compute_threads: int = 1,
        write_back_bytes: int | None = None,
        device: str = "cpu",
        stored: Stored = "native",
    ) -> None:
        open_device(device)  # before a model is loaded for it
        if compute_threads < 1 or ingest not in ("after", "never"):
            raise PlanError(
                "an LLM needs one compute thread or more, and ingests after answers or never",
                values=f"compute_threads={compute_threads}, ingest={ingest!r}",
                remedy="give a number above 0, and 'after' or 'never'",
            )
        loaded = model if isinstance(model, LoadedModel) else load_model(model, dtype)
        if stored != "native":
            loaded = loaded.stored_as(stored)
        self.plan = self._plan(plan, loaded, compute_threads, allow_mismatch, device)
        tiers = tuple(tiers or (TierConfig("dram", "dram"), TierConfig("file", "file")))
        if tier not in (names := [t.name for t in tiers]):
            raise StoreError(
                f"the tier must be one of {', '.join(names)}", values=repr(tier),
                remedy="name one of them, or add that tier",
            )  # fmt: skip
        self._temp = tempfile.TemporaryDirectory() if store_dir is None else None
        folder = self._temp.name if self._temp is not None else store_dir
        assert folder is not None
        self._is_open = True
        self.runner = Runner(
            loaded, folder, tiers, compute_threads=compute_threads,
            write_back_bytes=write_back_bytes, device=device,
            pipeline_stages=self.plan.pipeline_stages,
        )  # fmt: skip
        try:
            check_rope(self.runner.transformer)
        except BaseException:
            self.close()
            raise
        self.tier = tier
        self.tokenizer = tokenizer
        self.ingest_when = ingest

    def ingest(self, chunks: Sequence[Text], tenant: str = "") -> list[str]:
        """Store a tenant's chunks ahead of time; returns their content ids.

        Raises:
            WorkloadError: a chunk that no prompt could hold, or not of this model's vocabulary.
            StoreError, CapacityError: no space, no permission, larger than the tier.
        """
        self._check_open()
        texts = self._texts(chunks)
        longest = self.runner.spec.max_position - 2  # a prompt has a suffix and an answer too
        for number, ids in enumerate(texts):
            self._check_part(ids, f"chunk {number}")
            if len(ids) > longest:
                raise WorkloadError(
                    f"a chunk must leave room in the model's context, so hold at most {longest}",
                    values=f"{len(ids)} tokens (chunk {number})",
                    remedy="cut it into smaller chunks",
                )
        order = order_of(self.plan)
        return [
            self.runner.ingestor.ingest(
                ids, selector=order, tier=self.tier, neighbours=texts, tenant=tenant
            ).content_id
            for ids in texts
        ]

    def generate(self, prompts: Sequence[Prompt], *, ignore_eos: bool = False) -> list[Completion]:
        """Answer prompts, batched as they fit; greedy.

        Raises:
            WorkloadError: no prompts, or one that is empty, longer than the model's context or
                not of its vocabulary.
            StoreError: it was closed.
        """
        self._check_open()
        workload = self._workload(prompts)
        stop = None if ignore_eos else self._stop_token()
        index = index_for(self.runner.store, order_of(self.plan), workload.requests)
        result = self.runner.serve(workload, self.plan, index, stop_token=stop)
        if self.ingest_when == "after":
            self._ingest_missed(workload)
        return self._completions(workload, result)

    def close(self) -> None:
        """Close the store; a temporary one is removed."""
        self._is_open = False
        self.runner.close()
        if self._temp is not None:
            self._temp.cleanup()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @staticmethod
    def _plan(
        plan: ReusePlan | TunedPlan | str | Path | None,
        loaded: LoadedModel,
        compute_threads: int,
        allow_mismatch: bool,
        device: str,
    ) -> ReusePlan:
        if plan is None:
            return ReusePlan()
        if isinstance(plan, ReusePlan):
            return plan
        if not isinstance(plan, TunedPlan | str | Path):
            raise PlanError(
                "a plan must be a ReusePlan, a TunedPlan or the path of one",
                values=type(plan).__name__,
                remedy="make one with ReusePlan(...)",
            )
        tuned = plan if isinstance(plan, TunedPlan) else TunedPlan.read(plan)
        here = device_here(compute_threads, device).fingerprint()
        differs = tuned.check_fits(here, loaded.fingerprint, allow_mismatch=allow_mismatch)
        if differs:
            log.warning("%s", differs)
        return tuned.plan

    def _check_open(self) -> None:
        if not self._is_open:
            raise StoreError("an LLM that was closed serves no more", remedy="make another one")

    def _texts(self, chunks: Sequence[Text]) -> list[list[int]]:
        """Token ids of each chunk. One text is not taken for many of one letter each."""
        if isinstance(chunks, str | bytes) or not isinstance(chunks, Iterable):
            raise WorkloadError(
                "chunks must be a list of texts or of token ids",
                values=type(chunks).__name__,
                remedy="pass [chunk, ...], also for one",
            )
        return [self._ids(chunk) for chunk in chunks]

    def _ids(self, text: Text) -> list[int]:
        ids: Any = text
        if isinstance(text, str):
            if self.tokenizer is None:
                raise WorkloadError(
                    "text needs a tokenizer", values=repr(text[:40]),
                    remedy="pass tokenizer= or ids",
                )  # fmt: skip
            encoded = self.tokenizer.encode(text)
            ids = getattr(encoded, "ids", encoded)
        elif isinstance(text, bytes):  # text that was not decoded, whose bytes are no ids
            ids = [text]
        try:
            return [index(t) for t in ids]
        except TypeError as e:
            raise WorkloadError(
                "a part must be text or token ids", values=str(e), remedy="pass whole numbers"
            ) from None

    def _check_part(self, ids: Sequence[int], what: str) -> None:
        n_vocab = self.runner.spec.vocab_size
        if not ids or min(ids) < 0 or max(ids) >= n_vocab:
            raise WorkloadError(
                f"{what} must hold at least one token, all ids in 0..{n_vocab - 1}",
                values=f"ids from {min(ids)} to {max(ids)}" if ids else "no tokens",
                remedy="leave empty parts out, and use this model's tokenizer",
            )

    @staticmethod
    def _check_knobs(prompt: Prompt, number: int) -> None:
        if not isinstance(prompt.max_tokens, int) or prompt.max_tokens < 1:
            raise WorkloadError(
                "max_tokens must be a whole number, at least 1",
                values=f"{prompt.max_tokens!r} (prompt {number})",
            )
        if not isinstance(prompt.tenant, str):
            raise WorkloadError(
                "a tenant must be named by a text", values=f"{prompt.tenant!r} (prompt {number})"
            )

    def _workload(self, prompts: Sequence[Prompt]) -> Workload:
        contents: dict[str, Content] = {}
        requests = []
        several = not isinstance(prompts, Prompt | str)
        asked: list[Any] = list(prompts) if several else [prompts]  # some can be read only once
        wrong = [p for p in asked if not isinstance(p, Prompt)]
        if wrong or not several:
            raise WorkloadError(
                "generate takes a list of prompts",
                values=type(wrong[0]).__name__ if wrong else "one prompt",
                remedy="pass [Prompt(chunks=[...], suffix=...)]; a plain text is a suffix",
            )
        for number, prompt in enumerate(asked):
            self._check_knobs(prompt, number)
            names = []
            for ids in map(tuple, self._texts(prompt.chunks)):
                self._check_part(ids, f"each chunk of prompt {number}")
                name = content_id_of(ids)
                contents.setdefault(name, Content(n_tokens=len(ids), token_ids=ids))
                names.append(name)
            suffix = tuple(self._ids(prompt.suffix))
            self._check_part(suffix, f"the suffix of prompt {number}")
            requests.append(
                Request(
                    request_id=number,
                    arrival_ns=0,
                    chunks=tuple(names),
                    suffix_tokens=len(suffix),
                    suffix_ids=suffix,
                    max_output_tokens=prompt.max_tokens,
                    output_tokens=prompt.max_tokens,
                    tenant=prompt.tenant,
                )
            )
        if not requests:
            raise WorkloadError("generate needs at least one prompt", values="0")
        return Workload(name="generate", contents=contents, requests=tuple(requests))

    def _stop_token(self) -> int | Sequence[int] | None:
        eos: int | Sequence[int] | None = getattr(
            self.runner.loaded.hf.generation_config, "eos_token_id", None
        )
        return eos

    def _ingest_missed(self, workload: Workload) -> None:
        """Keep new chunks for the next prompts; trouble must not lose the answers."""
        if self.plan.policy == "full_recompute":
            return
        try:
            self.runner.prepare(workload, self.plan, self.tier, only_missing=True)
        except CacheTuneError as e:
            log.warning("chunks of these prompts were not kept: %s", e)

    def _completions(self, workload: Workload, result: RunResult) -> list[Completion]:
        metrics = {m.request.request_id: m for m in per_request(result.timeline, workload)}
        out = []
        for request in workload.requests:
            ids = result.token_ids[request.request_id]
            reused = result.n_reused_tokens.get(request.request_id, 0)
            out.append(
                Completion(
                    token_ids=ids,
                    text=self.tokenizer.decode(ids) if self.tokenizer is not None else None,
                    ttft_ms=metrics[request.request_id].ttft_ms,
                    n_prompt_tokens=workload.prompt_tokens(request),
                    n_reused_tokens=reused,
                )
            )
        return out
