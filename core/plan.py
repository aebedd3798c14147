"""`ReusePlan`: every knob, frozen. `TunedPlan`: a plan with its fingerprints and evidence.

The stream schedule is part of the plan. What the tuner suggests, the simulator scores and the
runtime loads is this one class.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from .errors import CacheTuneError, PlanError
from .hardware import Provenance
from .record import Document, Record

PolicyName = Literal[
    "full_recompute", "prefix_cache", "full_reuse", "cacheblend", "epic", "cachetune"
]
SelectorName = Literal["low_pass", "high_pass", "spread_high_pass", "chunk_start", "random"]


class RatioRule(Record):
    """How much of a reused chunk to recompute when it lies in `tier`."""

    tier: str = "*"
    max_prompt_tokens: int | None = Field(default=None, gt=0)
    """The rule holds up to this prompt length; None holds for all."""
    ratios: tuple[float, ...] = (0.15,)
    """One per band: the layers are cut into as many equal bands, first band first."""
    load_exact: bool = True
    """Whether chunks that are exact already are loaded whole rather than computed."""
    rho: float | None = Field(default=None, gt=0)
    """Seconds to load a token over seconds to compute it. Above 1, a prompt loads only so much as
    is worth it (`room` in `core/policies.py`); None: all it finds."""

    @model_serializer(mode="wrap")
    def _dump(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = dump(self)
        if self.rho is None:  # plans without it keep their fingerprint
            del data["rho"]
        return data

    @model_validator(mode="after")
    def _check(self) -> RatioRule:
        if not self.ratios:
            raise ValueError("ratios must hold at least one number, got none")
        if any(not 0.0 <= r <= 1.0 for r in self.ratios):
            raise ValueError(f"each ratio must lie in [0, 1], got {self.ratios}")
        if any(b > a for a, b in zip(self.ratios, self.ratios[1:], strict=False)):
            raise ValueError(f"ratios must not increase with depth, got {self.ratios}")
        return self


class ReusePlan(Record):
    """All knobs of reuse and of the stream schedule."""

    policy: PolicyName = "cachetune"
    selector: SelectorName = "low_pass"
    """Rank of tokens inside a chunk, fixed offline (policy `cachetune`)."""
    rules: tuple[RatioRule, ...] = (RatioRule(),)
    """The first rule that matches tier and prompt length holds."""
    epic_tokens: int = Field(default=16, ge=0)
    """Tokens recomputed at the start of each chunk (policy `epic`)."""
    layer_group: int = Field(default=2, ge=1)
    """Layers per op."""
    look_ahead: int = Field(default=2, ge=1)
    """Layer groups whose loads may run before their compute."""
    load_order: Literal["layer", "chunk"] = "layer"
    """All chunks of a layer group first, or all layers of a chunk first."""
    restore_stream: Literal["restore", "compute"] = "restore"
    n_io_workers: int = Field(default=1, ge=1, le=16)
    request_bytes: int = Field(default=1 << 20, ge=4096)
    """Largest single read."""
    prefill_chunk_tokens: int = Field(default=8192, ge=16)
    """Rows per prefill piece; decode steps run between pieces."""
    max_num_seqs: int = Field(default=64, ge=1)
    prefill_batch: int = Field(default=1, ge=1)
    """Requests whose rows go through the layers together, if they fit into one piece."""
    pipeline_stages: int = Field(default=1, ge=1)
    """Devices that share the layers, each an equal range; given by the machine, not searched."""

    @model_validator(mode="after")
    def _check(self) -> ReusePlan:
        if self.request_bytes % 4096:
            low = self.request_bytes // 4096 * 4096
            raise ValueError(
                f"request_bytes must be a multiple of 4096, got {self.request_bytes}; "
                f"try {max(low, 4096)} or {low + 4096}"
            )
        if not any(r.tier == "*" for r in self.rules):
            tiers = ", ".join(r.tier for r in self.rules) or "no rule"
            raise ValueError(
                f"one rule must have the tier '*', so that every chunk has a ratio, got {tiers}"
            )
        return self

    def check_stages(self, n_layers: int) -> None:
        """Whether every pipeline stage has a layer.

        Raises:
            PlanError: both numbers.
        """
        if self.pipeline_stages > n_layers:
            raise PlanError(
                "pipeline_stages must not exceed the model's layers",
                values=f"{self.pipeline_stages} stages, {n_layers} layers",
                remedy="use fewer stages",
            )

    def stage_start(self, stage: int, n_layers: int) -> int:
        """First layer of a pipeline stage; stages cut the layers into equal ranges."""
        return -(-stage * n_layers // self.pipeline_stages)

    def rule(self, tier: str, prompt_tokens: int) -> RatioRule:
        """The rule that holds for a chunk in `tier` within a prompt of that length."""
        for rule in self.rules:
            fits = rule.max_prompt_tokens is None or prompt_tokens <= rule.max_prompt_tokens
            if rule.tier in ("*", tier) and fits:
                return rule
        raise PlanError(
            "a rule must match every chunk",
            values=f"tier={tier!r}, prompt_tokens={prompt_tokens}",
            remedy="add a rule with tier '*' and no max_prompt_tokens",
        )


class TunedPlan(Document):
    """A plan, the machine and model it is for, and the evidence that it is good."""

    document: ClassVar[str] = "plan"
    version: ClassVar[int] = 1
    error: ClassVar[type[CacheTuneError]] = PlanError

    plan: ReusePlan
    hardware_fingerprint: str
    model_fingerprint: str
    quality: Literal["measured", "borrowed", "unknown"] = "unknown"
    quality_floor: float | None = None
    objective: dict[str, float] = Field(default_factory=dict)
    evidence: dict[str, Any] = Field(default_factory=dict)
    provenance: Provenance | None = None

    def check_fits(self, hardware: str, model: str, *, allow_mismatch: bool = False) -> str:
        """Refuse a plan made for another machine or model, unless told otherwise.

        Returns:
            What differs, to warn of; empty when nothing does.

        Raises:
            PlanError: says which fingerprint differs.
        """
        differs = [
            (what, f"the plan's {what} is {mine}, this one is {theirs}")
            for what, mine, theirs in (
                ("machine", self.hardware_fingerprint, hardware),
                ("model", self.model_fingerprint, model),
            )
            if mine != theirs
        ]
        if differs and not allow_mismatch:
            what, values = differs[0]
            raise PlanError(
                f"the plan must be made for this {what}",
                values=values,
                remedy="tune again here, or pass --allow-mismatch",
            )
        return "; ".join(values for _, values in differs)
