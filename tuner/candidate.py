"""A candidate of capacity planning: a machine, a policy and a stored format, ready to simulate."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

from pydantic import Field, model_validator

from ..core.catalogue import Catalogue, GpuRow
from ..core.errors import CapacityError, ModelError, ProfileError
from ..core.layout import GROUP_TOKENS, group_bytes
from ..core.machine_spec import MachineSpec
from ..core.memory_sum import EngineMemory, MemorySum, check_fits, memory_sum
from ..core.model_spec import ModelSpec
from ..core.record import Record
from ..core.step_cost import StepCost
from ..core.units import GIB
from ..core.workload import Slo
from ..simulator.gpu_sheet import GpuSheet, gpu_sheet, gpu_sheets, key_of
from ..simulator.kernel_cost import KernelCost, kernel_document, nearest_fit
from ..simulator.model_cost import ACTIVATION_BYTES, ModelCost
from ..simulator.pipeline_cost import PipelineCost
from ..simulator.serving_fleet import (
    Fleet,
    ReplicaSpec,
    ReuseName,
    ReusePolicy,
    RouterName,
    ServingLimits,
    TierEviction,
    TierSpec,
)
from ..simulator.step_tables import StepTables
from .bounded_kernels import BoundedKernels, KernelEnd

StoredFormat = Literal["bf16", "fp8", "int8", "int4", "int3", "int2"]

HOST_BYTES = 32 * GIB
"""Of a machine's DRAM that is not for KV: system, engine, buffers. Assumed."""
OVERHEAD_S = 0.8e-3
"""Host time per step: vLLM 0.19 on the RTX PRO 6000 run of LLMServingSim; fit your own engine's."""
HOP_S = 10e-6
"""Of a message from a pipeline stage to the next in one machine. Assumed: a small NCCL transfer."""
CHUNK_TOKENS = 512
"""Of a stored chunk, where a tier's reads per second bound a load: the Mooncake trace's blocks."""
RESTORE_TOKENS = 4096
"""Tokens over which the cost of restoring is taken."""


class Stage(ModelSpec):
    """The first or the last pipeline stage of a model."""

    @property
    def n_params(self) -> int:
        """Weights of its layers, and of the embedding or the head."""
        return self.n_layers * self.layer_params + self.vocab_size * self.hidden_size


class Candidate(Record):
    """What may be bought and how it would be run; one replica of it."""

    machine: MachineSpec
    """All GPUs of a replica."""
    stages: int = Field(default=1, ge=1, le=64)
    """Pipeline stages that share the layers; the GPUs of a stage are tensor parallel."""
    policy: ReuseName = "cachetune"
    stored: StoredFormat = "bf16"
    recompute_ratio: float = Field(default=0.15, ge=0, le=1)
    break_even: bool = True
    """Whether a prompt loads from a tier that is slower than computing only what is worth it, as a
    tuned plan has it (`RatioRule.rho`); else whatever a tier holds."""
    epic_tokens: int = Field(default=16, ge=0)
    engine: EngineMemory = EngineMemory()
    eviction: TierEviction = "lru"
    router: RouterName = "least_load"
    overhead_s: float = Field(default=OVERHEAD_S, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Candidate:
        if self.engine.weights == "int4" or self.engine.kv == "fp8":
            raise ValueError(
                "weights must be bfloat16 or fp8 and KV in GPU memory bfloat16, the kernels that "
                f"were measured, got {self.engine.weights} and {self.engine.kv}"
            )
        batch, n_seqs = self.engine.max_num_batched_tokens, self.engine.max_num_seqs
        if batch < n_seqs:
            raise ValueError(
                f"max_num_batched_tokens must not be below max_num_seqs, got {batch} < {n_seqs}"
            )
        if self.reuses and self.machine.dram_bytes <= HOST_BYTES:
            raise ValueError(
                f"DRAM must be above the {HOST_BYTES >> 30} GiB of the host that are not for KV, "
                f"got {self.machine.dram_bytes / GIB:g} GiB"
            )
        if self.machine.n_gpus % self.stages:
            raise ValueError(
                "stages must have equally many GPUs, got "
                f"{self.machine.n_gpus} GPUs in {self.stages} stages"
            )
        return self

    @property
    def name(self) -> str:
        """In words, for tables and plots."""
        weights = "" if self.engine.weights == "bfloat16" else f" {self.engine.weights}"
        parts = [f"{self.machine_name}{weights}", self.tier_name, self.policy]
        parts += [self.stored] if self.reuses else []
        parts += [self.eviction] if self.reuses and self.eviction != "lru" else []
        return " · ".join([*parts, *([self.router] if self.router != "least_load" else [])])

    @property
    def machine_name(self) -> str:
        """Its GPUs, in words: `H100-SXM`, `2xH100-SXM` (tensor parallel), `4xH100-SXM pp2`."""
        count = f"{self.machine.n_gpus}x" if self.machine.n_gpus > 1 else ""
        return f"{count}{self.machine.gpu.name}{f' pp{self.stages}' if self.stages > 1 else ''}"

    @property
    def gpus_per_stage(self) -> int:
        """Of a pipeline stage, tensor parallel."""
        return self.machine.n_gpus // self.stages

    @property
    def tier_name(self) -> str:
        """Where chunks lie, in words."""
        if not self.reuses:
            return "no tiers"
        disk, network = self.machine.disk, self.machine.network
        return "+".join(
            ["dram", *([disk.name] if disk else []), *([network.name] if network else [])]
        )

    @property
    def reuses(self) -> bool:
        """Whether the policy keeps chunks outside GPU memory."""
        return self.policy != "full_recompute"

    def memory(self, model: ModelSpec) -> MemorySum:
        """Where the memory of a GPU goes, of the stage with most layers; KV tokens of the group."""
        gpu, staged = self.machine.gpu, self.stages > 1
        return memory_sum(self.stage(model), gpu, self.gpus_per_stage, self.engine, staged=staged)

    def stage(self, model: ModelSpec) -> ModelSpec:
        """What the largest pipeline stage holds: its layers, and the embedding or the head."""
        if self.stages == 1:
            return model
        layers = -(-model.n_layers // self.stages)
        name = f"{model.name} in {self.stages} stages"
        return Stage(**{**model.model_dump(), "name": name, "n_layers": layers})

    def check_fits(self, model: ModelSpec, catalogue: Catalogue, n_tokens: int) -> None:
        """Whether the model has `n_tokens` positions, and GPU memory holds it and their KV.

        Raises:
            CapacityError: by how much not, and what would: other weights, GPUs, stages.
            ModelError: more stages than layers, too short a context.
        """
        if n_tokens > model.max_position:
            raise ModelError(
                f"requests must fit in the {model.max_position} positions of the model",
                values=f"{n_tokens} tokens",
                remedy="use a model with a longer context, or shorter prompts",
            )
        if self.stages > model.n_layers:
            raise ModelError(
                "every pipeline stage must have a layer",
                values=f"{self.stages} stages, {model.name} has {model.n_layers} layers",
            )
        machine, tp = self.machine, self.gpus_per_stage
        try:
            held, staged = self.stage(model), self.stages > 1
            check_fits(held, machine.gpu, tp, self.engine, catalogue, n_tokens, staged=staged)
        except CapacityError as e:
            fits = e.remedy.removeprefix("would fit: ").split("; ")
            ways = [w for w in fits if e.remedy.startswith("would") and not w.startswith("int4")]
            for n in (2, 4, 8, 16):
                more = self.replace(stages=n, machine=machine.replace(n_gpus=tp * n))
                if self.stages < n <= model.n_layers and more.memory(model).kv_tokens >= n_tokens:
                    ways.append(f"{n} stages of {tp} x {machine.gpu.name}")
                    break
            text = f"would fit: {'; '.join(ways)}" if ways else "nothing here would fit"
            raise CapacityError(e.rule, values=e.values, remedy=text) from None

    def kv_bytes_per_token(self, model: ModelSpec) -> int:
        """Of a stored token, all layers, as the chunk store lays out whole row groups."""
        kept = model.stored_as("native" if self.stored == "bf16" else self.stored)
        return round(model.n_layers * group_bytes(kept) / GROUP_TOKENS)

    def cost(self, model: ModelSpec, end: KernelEnd | None = None) -> StepCost:
        """Seconds of steps of a replica; kernels are read once for the same machine and model.

        Args:
            end: of the interval of every kernel, for the cost there; None for their middle.
        """
        tables = self.tables(model, end)
        if self.stages == 1:
            return tables
        sheet = tables.cost.kernels.sheet
        row_s = ACTIVATION_BYTES * model.hidden_size / sheet.link_bytes_per_s
        batch_tokens = self.engine.max_num_batched_tokens
        return PipelineCost(tables, self.stages, batch_tokens, HOP_S, row_s)

    def tables(self, model: ModelSpec, end: KernelEnd | None = None) -> StepTables:
        """Seconds of the whole model on the GPUs of one stage."""
        gpu, weights = self.machine.gpu, self.engine.weights
        return _tables(gpu, self.gpus_per_stage, model, weights, self.overhead_s, end)

    def fleet(self, model: ModelSpec, slo: Slo, n_replicas: int = 1) -> Fleet:
        """Equal replicas of this, with its tiers."""
        limits = ServingLimits(
            max_num_seqs=self.engine.max_num_seqs,
            max_num_batched_tokens=self.engine.max_num_batched_tokens * self.stages,
            n_blocks=self.memory(model).n_blocks,
            block_size=self.engine.block_tokens,
        )
        machine, link = self.machine, self.machine.link
        both_ways = link.h2d_bytes_per_s.value + link.d2h_bytes_per_s.value
        replica = ReplicaSpec(
            limits=limits,
            tiers=tiers_of(machine, self.eviction) if self.reuses else (),
            host_link_bytes_per_s=link.h2d_bytes_per_s.value * machine.n_gpus,
            host_link_duplex=min(1.0, link.duplex_bytes_per_s.value / both_ways),
            gpu_bytes_per_s=sheet_of(machine.gpu).memory_bytes_per_s * machine.n_gpus,
        )
        policy = ReusePolicy(
            name=self.policy,
            kv_bytes_per_token=self.kv_bytes_per_token(model),
            n_layers=model.n_layers,
            recompute_ratio={"*": self.recompute_ratio},
            rho=self._rhos(model, replica) if self.break_even else {},
            epic_tokens=self.epic_tokens,
            restore_s_per_token=self._restore_s_per_token(model),
        )
        return Fleet(
            policy=policy,
            replica=replica,
            n_replicas=n_replicas,
            router=self.router,
            slo={"*": slo},
        )

    def _rhos(self, model: ModelSpec, replica: ReplicaSpec) -> dict[str, float]:
        """Of every tier: a token's load over its share of a full prefill piece, both alone."""
        n = self.engine.max_num_batched_tokens
        token_s = self.cost(model).step_s([(n, 0)], 0, 0) / n
        per_token, link = self.kv_bytes_per_token(model), replica.host_link_bytes_per_s
        chunk = CHUNK_TOKENS * (1 - self.recompute_ratio) or CHUNK_TOKENS
        return {
            tier.name: load_s_per_token(tier, link, per_token, model.n_layers, chunk) / token_s
            for tier in replica.tiers
        }

    def _restore_s_per_token(self, model: ModelSpec) -> float:
        """Read the stored form, write bfloat16, at the rate of elementwise kernels."""
        cost = self.tables(model).cost
        moved = (self.kv_bytes_per_token(model) + model.kv_bytes_per_token) / model.n_layers
        per_gpu = moved * RESTORE_TOKENS / cost.tp
        layers = self.stage(model).n_layers  # stages restore their own, at the same time
        return layers * cost.kernels.elementwise_s(per_gpu) / RESTORE_TOKENS


def load_s_per_token(
    tier: TierSpec,
    host_link_bytes_per_s: float | None,
    bytes_per_token: int,
    n_layers: int,
    n_tokens: float,
) -> float:
    """Seconds to load a token from `tier`, one of `n_tokens` that are loaded by themselves."""
    seconds = bytes_per_token / tier.read_bytes_per_s
    if host_link_bytes_per_s is not None:
        seconds = max(seconds, bytes_per_token / host_link_bytes_per_s)
    if tier.iops is not None:
        seconds = max(seconds, n_layers / (tier.iops * n_tokens))
    return seconds + tier.latency_s / n_tokens


def tiers_of(machine: MachineSpec, eviction: TierEviction = "lru") -> tuple[TierSpec, ...]:
    """DRAM, then the disk, then the store behind the network that all replicas share."""
    link, n = machine.link, machine.n_gpus
    dram_rate = machine.dram.read_bytes_per_s.value
    tiers = [
        TierSpec(
            name="dram",
            capacity_bytes=machine.dram_bytes - HOST_BYTES,
            read_bytes_per_s=dram_rate,
            write_bytes_per_s=min(dram_rate, link.d2h_bytes_per_s.value * n),
            latency_s=link.copy_overhead_s.value,
            iops=n / link.copy_overhead_s.value,
            eviction=eviction,
        )
    ]
    if machine.disk:
        disk, k = machine.disk, machine.n_disks
        tiers.append(
            TierSpec(
                name=disk.name,
                capacity_bytes=machine.disk_bytes,
                read_bytes_per_s=disk.read_bytes_per_s.value * k,
                write_bytes_per_s=disk.write_bytes_per_s.value * k,
                latency_s=disk.read_latency_s.value,
                iops=disk.read_iops.value * k,
                eviction=eviction,
            )
        )
    if machine.network:
        network = machine.network
        tiers.append(
            TierSpec(
                name=network.name,
                read_bytes_per_s=network.read_bytes_per_s.value,
                write_bytes_per_s=network.read_bytes_per_s.value,
                latency_s=network.latency_s.value,
                eviction=eviction,
                shared=True,
            )
        )
    return tuple(tiers)


@lru_cache(maxsize=64)
def _tables(
    gpu: GpuRow,
    n_gpus: int,
    model: ModelSpec,
    weights: str,
    overhead_s: float,
    end: KernelEnd | None,
) -> StepTables:
    sheet = sheet_of(gpu)
    kernels = KernelCost.load(sheet) if end is None else BoundedKernels(sheet, end)
    dtype = None if weights == "bfloat16" else weights
    return StepTables(ModelCost(model, kernels, n_gpus, dtype), overhead_s)


def sheet_of(gpu: GpuRow) -> GpuSheet:
    """Data sheet of a catalogue row, its matmul peak corrected where nobody measured its kernels.

    Such a GPU borrows the kernels of its nearest neighbour. Where the best matmul of both is known,
    its peak is set so that what it borrows ends at what it was seen to reach.

    Raises:
        ProfileError: neither a shipped sheet nor peaks of its own.
    """
    sheet = data_sheet_of(gpu)
    if kernel_document(gpu.name) is not None or gpu.matmul_flops is None:
        return sheet
    from ..core.catalogue import load_catalogue

    donor = nearest_fit("gemm.bfloat16", sheet)[1]
    row = load_catalogue().gpus.get(donor or "")
    if row is None or row.matmul_flops is None:
        return sheet
    reached = row.matmul_flops.value / gpu_sheet(row.name).bf16_flops
    scale = gpu.matmul_flops.value / reached / sheet.bf16_flops
    fp8 = sheet.fp8_flops * scale if sheet.fp8_flops else None
    return sheet.replace(bf16_flops=sheet.bf16_flops * scale, fp8_flops=fp8)


def data_sheet_of(gpu: GpuRow) -> GpuSheet:
    """The shipped sheet of a catalogue row, or one of its own peaks; raises as `sheet_of` does."""
    shipped = {key_of(n): s for n, s in gpu_sheets().items()}.get(key_of(gpu.name))
    if gpu.peaks is not None:
        return GpuSheet(name=gpu.name, source="catalogue file", **gpu.peaks.model_dump())
    if shipped is None:
        raise ProfileError(
            "a GPU needs a data sheet",
            values=f"none for {gpu.name}",
            remedy="give its peaks in the catalogue file: bf16_flops, memory_bytes_per_s, n_sms, "
            "link_bytes_per_s",
        )
    return shipped


def kernels_of(gpu: GpuRow) -> list[dict[str, Any]]:
    """Where each kind of kernel comes from: measured on this GPU, or borrowed from another."""
    found = []
    for kind in ("gemm.bfloat16", "prefill", "decode", "elementwise"):
        fit, donor = nearest_fit(kind, sheet_of(gpu))
        what = "measured" if donor is None else f"borrowed from {donor}"
        found.append({"row": gpu.name, "figure": f"kernels {kind}", "value": fit.n_rows})
        found[-1] |= {"kind": what, "source": fit.source}
    return found
