"""`cachetune simulate`: a workload through the engine and the simulated executor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..core.hardware import HardwareProfile
    from ..core.plan import ReusePlan
    from ..core.workload import Workload

CHUNK_TOKENS = 512
SUFFIX_TOKENS = 64
GROUP = 32

_Profile = Annotated[Path, typer.Option(help="Profile of the machine, from `calibrate`.")]
_Plan = Annotated[Path | None, typer.Option(help="Plan, from `tune`; without it, the defaults.")]
_Workload = Annotated[Path | None, typer.Option(help="Workload; without it, one is generated.")]
_Requests = Annotated[int, typer.Option(min=1, help="Generated: number of requests.")]
_Chunks = Annotated[int, typer.Option(min=0, help="Generated: chunks in a request.")]
_ChunkTokens = Annotated[
    int | None, typer.Option(min=1, help="Generated: tokens of a chunk; default 512 or what fits.")
]
_Output = Annotated[int, typer.Option(min=1, help="Generated: tokens of an answer.")]
_Rate = Annotated[float | None, typer.Option(help="Generated: requests per second; default 1.")]
_Tier = Annotated[str | None, typer.Option(help="Where the chunks lie; default the fastest tier.")]
_Set = Annotated[list[str] | None, typer.Option("--set", help="A knob: key=value. Repeatable.")]
_Seed = Annotated[int, typer.Option(min=0, help="Root of every random stream.")]
_Noise = Annotated[
    float, typer.Option(min=0, max=3, help="Spread of durations, as a log deviation.")
]
_Trace = Annotated[Path | None, typer.Option(help="Write a Chrome trace here.")]
_Mismatch = Annotated[bool, typer.Option(help="Take a plan made for another machine or model.")]


def command(
    profile: _Profile,
    plan: _Plan = None,
    workload: _Workload = None,
    requests: _Requests = 100,
    chunks: _Chunks = 8,
    chunk_tokens: _ChunkTokens = None,
    output_tokens: _Output = 32,
    rate: _Rate = 1.0,
    tier: _Tier = None,
    set_: _Set = None,
    seed: _Seed = 0,
    noise: _Noise = 0.0,
    trace: _Trace = None,
    allow_mismatch: _Mismatch = False,
) -> None:
    """Predict TTFT, throughput and bytes moved, in seconds and without a GPU."""
    from ..core.hardware import HardwareProfile
    from ..core.record import check_writable
    from ..core.trace import write_chrome
    from ..core.workload import Workload
    from .console import note, print_metrics

    check_writable(trace, inputs=[profile, plan, workload])
    machine = HardwareProfile.read(profile)
    reuse = _plan(plan, machine, set_ or [], allow_mismatch)
    if workload is not None:
        work = Workload.read(workload).by_content()
    else:
        work = generate(machine, requests, chunks, chunk_tokens, output_tokens, rate, seed)
    result, timeline = simulate(work, machine, reuse, tier, seed, noise)
    if trace is not None:
        write_chrome(trace, timeline)
        note(f"trace: {trace} (open it in ui.perfetto.dev)")
    print_metrics(result)


def simulate(
    work: Workload,
    machine: HardwareProfile,
    plan: ReusePlan,
    tier: str | None = None,
    seed: int = 0,
    noise: float = 0.0,
) -> tuple[dict[str, Any], Any]:
    """(metrics and what they are of, timeline) of `work` on the simulated machine."""
    from ..core import invariants, metrics
    from ..core.block_pool import BlockPool
    from ..core.engine import Engine
    from ..core.executor import serve
    from ..core.warm_index import warm_index
    from ..simulator.executor import SimExecutor

    where = tier if tier is not None else fastest_tier(machine)
    work.check_fits(machine.model)
    index = warm_index(work, machine, [where])
    engine = Engine(work, machine.model, plan, index, BlockPool(n_kv_blocks(machine)))
    timeline = serve(work, engine, SimExecutor(machine, seed=seed, noise=noise))
    invariants.check(timeline, work)
    result = {
        "command": "simulate",
        "profile": machine.name,
        "hardware_fingerprint": machine.hardware_fingerprint,
        "model_fingerprint": machine.model_fingerprint,
        "workload": work.name,
        "workload_fingerprint": work.fingerprint(),
        "policy": plan.policy,
        "plan_fingerprint": plan.fingerprint(),
        "tier": where,
        "seed": seed,
        **metrics.summary(timeline, work),
    }
    return result, timeline


def generate(
    machine: HardwareProfile,
    n_requests: int,
    n_chunks: int,
    chunk_tokens: int | None,
    output_tokens: int,
    rate_rps: float | None,
    seed: int,
) -> Workload:
    """RAG requests for the machine's model: by default, chunks as long as its context allows."""
    from ..core.generators import rag_workload

    if chunk_tokens is None:
        room = machine.model.max_position - SUFFIX_TOKENS - output_tokens
        fits = room // max(1, n_chunks) // GROUP * GROUP
        chunk_tokens = max(GROUP, min(CHUNK_TOKENS, fits))
    return rag_workload(
        seed=seed,
        n_requests=n_requests,
        n_contents=max(200, n_chunks),
        chunk_tokens=chunk_tokens,
        chunks_per_request=n_chunks,
        suffix_tokens=SUFFIX_TOKENS,
        output_tokens=output_tokens,
        rate_rps=rate_rps,
    )


def fastest_tier(machine: HardwareProfile) -> str:
    """The tier with the fastest link, ties by name.

    Raises:
        ProfileError: the profile has no tier.
    """
    from ..core.errors import ProfileError

    if not machine.tiers:
        raise ProfileError("the profile must have a tier", values="none", remedy="calibrate again")
    return min(sorted(machine.tiers), key=lambda name: -machine.tiers[name].link_bytes_per_s)


def n_kv_blocks(machine: HardwareProfile, block_tokens: int = 16) -> int:
    """Blocks in nine tenths of the memory that the weights leave, and one at least."""
    from ..core.model_spec import DTYPE_BYTES

    model = machine.model
    weights = model.n_params * DTYPE_BYTES[model.dtype]
    room = int(0.9 * max(0, machine.device.memory_bytes - weights))
    return max(1, room // (model.kv_bytes_per_token * block_tokens))


def _plan(
    path: Path | None, machine: HardwareProfile, settings: list[str], allow_mismatch: bool
) -> ReusePlan:
    from ..core.plan import ReusePlan, TunedPlan
    from .console import warn
    from .settings import apply_settings

    plan = ReusePlan()
    if path is not None:
        tuned = TunedPlan.read(path)
        here = machine.hardware_fingerprint, machine.model_fingerprint
        if differs := tuned.check_fits(*here, allow_mismatch=allow_mismatch):
            warn(differs)
        plan = tuned.plan
    return apply_settings(plan, settings)
