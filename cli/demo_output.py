"""What the demo leaves: the table, `summary.json`, the plans, and the HTML report."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..calibration.compare import Row
    from ..core.plan import TunedPlan
    from .demo import Demo

COLUMNS = (
    "policy",
    "tier",
    "rho",
    "limited",
    "recompute_ratio",
    "ttft_ms_predicted",
    "ttft_ms_measured",
    "error",
    "speedup",
    "quality",
)


def finish(
    demo: Demo,
    plans: dict[str, TunedPlan],
    rows: list[Row],
    sweep: list[Row],
    toy: list[dict[str, Any]],
    traces: dict[str, Any],
    out: Path,
    seed: int,
) -> dict[str, Any]:
    """Write everything and print the table; returns the summary."""
    from ..calibration.fidelity import p95
    from ..core.record import write_json
    from ..runtime.machine import provenance_here
    from .console import print_table
    from .demo import PLAN_TIER
    from .report import write_report

    errors = [abs(r.error) for r in rows + sweep]
    summary: dict[str, Any] = {
        "provenance": provenance_here(seed).model_dump(mode="json"),
        "model": demo.profile.model.name,
        "hardware_fingerprint": demo.profile.hardware_fingerprint,
        "model_fingerprint": demo.profile.model_fingerprint,
        "quality": f"borrowed from the shipped model {demo.quality.model_fingerprint}",
        "fidelity": {
            "ttft_error_median": median(errors),
            "ttft_error_p95": p95(errors),
            "n_points": len(errors),
        },
        "rows": [_row(r, demo) for r in rows],
        "sweep": [_row(r, demo) for r in sweep],
        "toy": toy,
        "tuned": {tier: _tuned(plan, tier, rows) for tier, plan in plans.items()},
    }
    confirmed = plans[PLAN_TIER].evidence["confirmed"]
    summary["confirmed"] = {"tier": PLAN_TIER, **confirmed}
    for tier, plan in plans.items():
        plan.write(out / f"plan.{tier}.json")
    write_json(out / "summary.json", summary)
    write_report(out / "report.html", summary, demo.quality, traces)
    print_table([_cells(r, demo) for r in rows], COLUMNS, "TTFT by policy and tier")
    print_table(
        toy,
        ["policy", "selector", "recompute_ratio", "ttft_ms", "speedup", "cross", "local", "n"],
        TOY,
    )
    print_table(
        confirmed["rows"],
        ["name", "rank_simulated", "rank_measured", "ttft_ms_simulated", "ttft_ms_median", "error"],
        f"confirmed on the runtime, tier {PLAN_TIER}",
    )
    print_table(
        [{"tier": t, **v} for t, v in summary["tuned"].items()],
        ["tier", "policy", "selector", "ratios", "ttft_ms_measured", "speedup", "vs_best_fixed"],
        "tuned plans; vs_best_fixed compares with the best policy row that keeps the quality floor",
    )
    return summary


TOY = "the trained model: timed and scored, same weights"


def _row(row: Row, demo: Demo) -> dict[str, Any]:
    return {
        "policy": row.label,
        "tier": row.tier,
        "rho": row.rho,
        "limited": demo.profile.tier(row.tier).limited,
        "recompute_ratio": row.recompute_ratio,
        "ttft_ms_predicted": row.ttft_ms_predicted,
        "ttft_ms_measured": row.ttft_ms_measured,
        "speedup": row.speedup,
        "quality": row.quality,
    }


def _cells(row: Row, demo: Demo) -> dict[str, Any]:
    return {**_row(row, demo), "ttft_ms_measured": row.ttft_ms, "error": round(row.error, 4)}


def _tuned(tuned: TunedPlan, tier: str, rows: list[Row]) -> dict[str, Any]:
    """The tuned plan of one tier beside the best policy row that keeps the quality floor."""
    from .demo import QUALITY_FLOOR

    mine = next(r for r in rows if r.tier == tier and r.label == "tuned")
    fixed = [
        r
        for r in rows
        if r.tier == tier and r.label != "tuned" and (r.quality or 0.0) >= QUALITY_FLOOR
    ]
    best = min(fixed, key=lambda r: r.ttft_ms)
    rule = tuned.plan.rule(tier, 1)
    return {
        "policy": tuned.plan.policy,
        "selector": tuned.plan.selector if tuned.plan.policy == "cachetune" else "",
        "ratios": list(rule.ratios),
        "layer_group": tuned.plan.layer_group,
        "load_order": tuned.plan.load_order,
        "restore_stream": tuned.plan.restore_stream,
        "ttft_ms_predicted": mine.ttft_ms_predicted,
        "ttft_ms_measured": mine.ttft_ms,
        "speedup": mine.speedup,
        "best_fixed": best.label,
        "vs_best_fixed": mine.ttft_ms / best.ttft_ms,
        "quality": tuned.quality,
    }
