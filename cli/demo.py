"""`cachetune demo`: the main job on real text: calibrate, tune, run every policy, compare."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..calibration.compare import Row
    from ..core.hardware import HardwareProfile
    from ..core.plan import ReusePlan, TunedPlan
    from ..core.quality import QualityProfile
    from ..core.workload import Workload
    from ..runtime.runner import Runner

_Out = Annotated[Path, typer.Option(help="Folder of the report and its data.")]
_Model = Annotated[str, typer.Option(help="Hugging Face folder, or a shape with random weights.")]
_Passages = Annotated[int, typer.Option(min=8, help="Passages in the library.")]
_Tokens = Annotated[int, typer.Option(min=32, help="Tokens of a passage.")]
_Trials = Annotated[int, typer.Option(min=20, help="Simulated plans per tier.")]
_Repeats = Annotated[int, typer.Option(min=2, help="Interleaved repeats of each measurement.")]
_Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:<i>.")]
_Seed = Annotated[int, typer.Option(min=0, help="Root of every random stream.")]

CHUNKS = 8
N_REQUESTS = 2
RATIO = 0.15
SWEEP = (0.0, 0.15, 0.3, 0.5, 0.75, 1.0)
PLAN_TIER = "rho0.7"
"""The tier of plan.json and of the traces: an NVMe disk under an H200."""
QUALITY_FLOOR = 0.9


@dataclass
class Demo:
    """What one run of the demo knows so far."""

    runner: Runner
    profile: HardwareProfile
    workloads: list[Workload]
    quality: QualityProfile
    chunk_tokens: int


def command(
    out: _Out = Path("build/demo"),
    model: _Model = "llama-10m",
    passages: _Passages = 16,
    passage_tokens: _Tokens = 104,
    trials: _Trials = 80,
    repeats: _Repeats = 3,
    seed: _Seed = 0,
    device: _Device = "cpu",
) -> None:
    """Calibrate, tune and run every policy in every tier; write the report to build/demo."""
    from ..calibration.calibrate import Settings, calibrate, open_runner
    from ..calibration.compare import single_requests
    from ..calibration.toy_model import shipped_quality
    from ..calibration.toy_rows import toy_rows
    from ..core.record import check_writable
    from .bench_machine import checked_device, load_on
    from .console import note, progress_bar
    from .demo_output import finish

    started = time.monotonic()
    check_writable(out / "report.html")
    device = checked_device(device)
    loaded = load_on(model, device, "float32" if device == "cpu" else "bfloat16")
    workload = _workload(passages, passage_tokens, seed)
    workload.check_fits(loaded.spec)
    with progress_bar() as tell:
        settings = Settings(
            max_tokens=CHUNKS * passage_tokens, n_repeats=4, seed=seed, device=device
        )
        profile = calibrate(loaded, settings, tell)
        profile.write(out / "profile.json")
        with (
            tempfile.TemporaryDirectory(prefix="cachetune-") as folder,
            open_runner(profile, loaded, folder, device) as runner,
        ):
            alone = single_requests(workload, N_REQUESTS)
            demo = Demo(runner, profile, alone, shipped_quality(), passage_tokens)
            plans = _tune(demo, trials, seed, tell)
            plans[PLAN_TIER].write(out / "plan.json")
            rows, sweep = _compare(demo, plans, repeats, tell)
            traces = _traces(demo, plans[PLAN_TIER].plan, out)
        toy = toy_rows(seed, progress=tell)
    summary = finish(demo, plans, rows, sweep, toy, traces, out, seed)
    note(f"report: {out}/report.html ({time.monotonic() - started:.0f} s)")
    from .console import print_json_line

    print_json_line({"command": "demo", **{k: summary[k] for k in ("fidelity", "tuned")}})


def _workload(n_passages: int, n_tokens: int, seed: int) -> Workload:
    """Questions over passages of the standard library's documentation, as RAG sends them."""
    from ..calibration.text import load_tokenizer, passages, rag_requests

    tokenizer = load_tokenizer()
    texts = passages(tokenizer, n_tokens, n_passages, seed)
    return rag_requests(seed, texts, tokenizer, n_requests=N_REQUESTS, chunks_per_request=CHUNKS)


def _tune(demo: Demo, n_trials: int, seed: int, tell: Any) -> dict[str, TunedPlan]:
    """One plan per tier, by simulation; that of plan.json is confirmed on the runtime too."""
    from ..tuner.search import tune

    plans = {}
    for i, tier in enumerate(demo.profile.tiers):
        plans[tier] = tune(
            demo.profile,
            _joined(demo.workloads),
            tier,
            n_trials=n_trials,
            seed=seed,
            quality=demo.quality,
            quality_floor=QUALITY_FLOOR,
            runner=demo.runner if tier == PLAN_TIER else None,
            n_confirm=4,
            n_repeats=3,
        )
        tell("tune", i + 1, len(demo.profile.tiers))
    return plans


def _joined(workloads: list[Workload]) -> Workload:
    """The single requests as one workload."""
    contents = {k: v for w in workloads for k, v in w.contents.items()}
    requests = tuple(w.requests[0].replace(request_id=i) for i, w in enumerate(workloads))
    return workloads[0].replace(contents=contents, requests=requests)


def _compare(
    demo: Demo, plans: dict[str, TunedPlan], repeats: int, tell: Any
) -> tuple[list[Row], list[Row]]:
    """Every policy and the tuned plan, then the sweep over r; predicted before measured."""
    from ..calibration.compare import measure_rows, predict_rows

    rows: list[Row] = []
    sweep: list[Row] = []
    for tier, tuned in plans.items():
        of_tier = _policy_rows(demo, tier, tuned.plan)
        points = _sweep_rows(demo, tier)
        predict_rows(demo.runner, demo.profile, demo.workloads, of_tier)
        predict_rows(demo.runner, demo.profile, demo.workloads[:1], points)
        measure_rows(demo.runner, demo.workloads, of_tier, repeats, tell)
        measure_rows(demo.runner, demo.workloads[:1], points[-1:] + points[:-1], 2, tell)
        rows += of_tier
        sweep += points
    return rows, sweep


def _policy_rows(demo: Demo, tier: str, tuned: ReusePlan) -> list[Row]:
    from ..calibration.compare import Row
    from ..calibration.ttft import policy_plans
    from ..core.quality import smallest_ratio

    rho = _rho(demo, tier)
    rows = []
    for label, plan in [*policy_plans(RATIO, demo.chunk_tokens).items(), ("tuned", tuned)]:
        ratio = 1.0 if plan.policy in ("full_recompute", "prefix_cache") else None
        ratio = smallest_ratio(plan, demo.chunk_tokens) if ratio is None else ratio
        quality = demo.quality.score(plan, demo.chunk_tokens)
        rows.append(Row(label, tier, rho, plan, ratio, quality=quality))
    return rows


def _sweep_rows(demo: Demo, tier: str) -> list[Row]:
    from ..calibration.compare import Row
    from ..calibration.probes import plan_with

    rho = _rho(demo, tier)
    return [Row("sweep", tier, rho, plan_with("cachetune", r), r) for r in SWEEP]


def _rho(demo: Demo, tier: str) -> float:
    """What the tier's limiter was set to; for a tier as it is, what calibration found."""
    from ..tuner.baselines import token_times

    limit = demo.profile.tier(tier).rho
    if limit is not None:
        return limit
    return token_times(demo.profile, _joined(demo.workloads), tier).rho


def _traces(demo: Demo, plan: ReusePlan, out: Path) -> dict[str, Any]:
    """The same schedule on both executors, as Chrome traces."""
    from ..calibration.align import simulate_schedule
    from ..core import invariants
    from ..core.trace import write_chrome

    workload = demo.workloads[0]
    demo.runner.prepare(workload, plan, PLAN_TIER)
    index = demo.runner.index(plan, PLAN_TIER)
    request = workload.requests[0]
    decisions, schedule = demo.runner.schedule(workload, request, plan, index)
    real = demo.runner.execute_schedule(workload, plan, decisions, schedule).timeline
    simulated = simulate_schedule(demo.profile, schedule)
    for timeline in (simulated, real):
        invariants.check(timeline, workload, schedule)
    write_chrome(out / "trace.sim.json", simulated)
    write_chrome(out / "trace.real.json", real)
    return {"simulated": simulated, "real": real}
