"""The demo's HTML report: one file, plots drawn by the plotly that is inside it, no network."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from ..core.quality import QualityProfile
    from ..core.timeline import Timeline

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; color: #1b1f24;
       padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; width: 100%; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #e3e6ea; }
td:nth-child(-n+2), th:nth-child(-n+2) { text-align: left; }
tr.tuned { background: #eef7ee; font-weight: 600; }
.note { color: #57606a; }
"""
KIND_COLOURS = {
    "load": "#4c78a8",
    "restore": "#72b7b2",
    "prefill": "#f58518",
    "select": "#eeca3b",
    "head": "#e45756",
    "decode": "#b279a2",
}
PALETTE = (
    "#4c78a8", "#f58518", "#54a24b", "#e45756", "#b279a2", "#72b7b2",
    "#9d755d", "#666", "#eeca3b", "#2f4b7c", "#ff9da6", "#1b9e77",
)  # fmt: skip
TITLE_PX = 80
"""Room above a plot for its title and the buttons of plotly."""


def write_report(
    path: Path, summary: dict[str, Any], quality: QualityProfile, traces: dict[str, Timeline]
) -> None:
    """Answer first: the tuned plans; then every row, and the plots behind them."""
    from plotly.offline import get_plotlyjs

    from ..core.record import write_atomic

    plots = [
        ("TTFT against the recompute ratio", _sweep(summary)),
        ("Overlap: the tuned plan's schedule, simulated and measured", _timelines(traces)),
        ("Quality against the recompute ratio (shipped model, 95 % intervals)", _quality(quality)),
    ]
    fidelity = summary["fidelity"]
    body = [
        "<h1>CacheTune: calibrate, tune, run, compare</h1>",
        f"<p>Over {fidelity['n_points']} schedules the simulator's TTFT was off by "
        f"{100 * fidelity['ttft_error_median']:.1f} % (median) and "
        f"{100 * fidelity['ttft_error_p95']:.1f} % (p95). Tiers named rho are DRAM behind a rate "
        "limiter, so that loading a token takes rho times as long as computing it. Quality is "
        f"{html.escape(summary['quality'])}.</p>",
        "<h2>Tuned plans</h2>",
        _table(_tuned_rows(summary), mark="tier"),
        f"<h2>Confirmed on the runtime, tier {summary['confirmed']['tier']}</h2>",
        _table(_confirmed_rows(summary)),
        *[f"<h2>{title}</h2>{_div(figure)}" for title, figure in plots],
        "<h2>Every policy in every tier</h2>",
        _table(_policy_rows(summary)),
        "<h2>The trained model, timed and scored</h2>",
        "<p>Shares of right answers: cross, to questions that need what an earlier chunk says; "
        "local, to the others; n is their number.</p>",
        _table(summary["toy"]),
        f"<p class=note>{html.escape(_origin(summary['provenance']))}</p>",
    ]
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><title>CacheTune demo</title>"
        f"<style>{STYLE}</style><script>{get_plotlyjs()}</script><body>{''.join(body)}</body></html>"
    )
    write_atomic(path, page.encode())


def _sweep(summary: dict[str, Any]) -> go.Figure:
    """Per tier: the predicted line over the measured points."""
    from plotly.subplots import make_subplots

    tiers = {r["tier"]: r for r in summary["sweep"]}
    titles = [
        f"{tier}, limited" if r["limited"] else f"{tier}, rho {r['rho']:.2g}"
        for tier, r in tiers.items()
    ]
    columns = 3
    figure = make_subplots(-(-len(tiers) // columns), columns, subplot_titles=titles)
    for i, tier in enumerate(tiers):
        rows = sorted(
            (r for r in summary["sweep"] if r["tier"] == tier), key=lambda r: r["recompute_ratio"]
        )
        at = {"row": i // columns + 1, "col": i % columns + 1}
        x = [r["recompute_ratio"] for r in rows]
        y = [r["ttft_ms_predicted"] for r in rows]
        points = [(r["recompute_ratio"], m) for r in rows for m in r["ttft_ms_measured"]]
        shown = {"showlegend": i == 0}
        figure.add_scatter(
            x=x, y=y, mode="lines", name="predicted", line_color="#4c78a8", **shown, **at
        )
        figure.add_scatter(
            x=[p[0] for p in points],
            y=[p[1] for p in points],
            mode="markers",
            name="measured",
            marker_color="#e45756",
            **shown,
            **at,
        )
    figure.update_xaxes(title_text="recompute ratio")
    figure.update_yaxes(title_text="TTFT, ms", rangemode="tozero")
    figure.update_layout(height=640, margin={"t": TITLE_PX})
    return figure


def _timelines(traces: dict[str, Timeline]) -> go.Figure:
    """Spans by stream, one bar each; simulated above measured."""
    import plotly.graph_objects as go

    figure = go.Figure()
    seen: set[str] = set()
    for label, timeline in reversed(traces.items()):
        for span in timeline.spans:
            kind = span.op.kind
            figure.add_bar(
                orientation="h",
                y=[f"{label} {span.op.stream}"],
                base=[(span.start_ns - timeline.start_ns) / 1e6],
                x=[max(span.duration_ns / 1e6, 0.01)],
                marker_color=KIND_COLOURS[kind],
                name=kind,
                legendgroup=kind,
                showlegend=kind not in seen,
                hovertext=f"{kind} layers {span.op.layer_start}-{span.op.layer_stop}",
            )
            seen.add(kind)
    figure.update_yaxes(categoryorder="category ascending")
    figure.update_layout(barmode="overlay", height=420, margin={"t": TITLE_PX})
    figure.update_xaxes(title_text="ms since the request came")
    return figure


def _quality(quality: QualityProfile) -> go.Figure:
    """Score relative to full recompute, per task and selector."""
    from plotly.subplots import make_subplots

    tasks = sorted({r.task for r in quality.rows})
    figure = make_subplots(1, len(tasks), subplot_titles=tasks)
    names = sorted({(r.policy, r.selector) for r in quality.rows})
    for i, task in enumerate(tasks):
        for n, (policy, selector) in enumerate(names):
            rows = sorted(
                (
                    r
                    for r in quality.rows
                    if (r.task, r.policy, r.selector) == (task, policy, selector)
                ),
                key=lambda r: r.ratio,
            )
            figure.add_scatter(
                x=[r.ratio for r in rows],
                y=[r.score for r in rows],
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": [r.high - r.score for r in rows],
                    "arrayminus": [r.score - r.low for r in rows],
                },
                mode="lines+markers",
                name=f"{policy} {selector}".strip(),
                legendgroup=f"{policy} {selector}",
                showlegend=i == 0,
                line_color=PALETTE[n % len(PALETTE)],
                row=1,
                col=i + 1,
            )
    figure.update_yaxes(title_text="score relative to full recompute", range=[-0.02, 1.05])
    figure.update_xaxes(title_text="recompute ratio")
    figure.update_layout(height=480, margin={"t": TITLE_PX})
    return figure


def _div(figure: go.Figure) -> str:
    text: str = figure.to_html(
        full_html=False, include_plotlyjs=False, config={"displaylogo": False}
    )
    return text


def _tuned_rows(summary: dict[str, Any]) -> list[dict[str, Any]]:
    keys = ("policy", "selector", "ratios", "ttft_ms_predicted", "ttft_ms_measured", "speedup")
    return [
        {"tier": tier, **{k: row[k] for k in keys}, "vs best fixed policy": row["vs_best_fixed"]}
        for tier, row in summary["tuned"].items()
    ]


def _confirmed_rows(summary: dict[str, Any]) -> list[dict[str, Any]]:
    keys = ("name", "feasible", "rank_simulated", "rank_measured")
    more = ("ttft_ms_simulated", "ttft_ms_median", "error")
    return [{k: row[k] for k in (*keys, *more)} for row in summary["confirmed"]["rows"]]


def _policy_rows(summary: dict[str, Any]) -> list[dict[str, Any]]:
    out = []
    for row in summary["rows"]:
        cells = dict(row)
        measured = cells["ttft_ms_measured"] = median(row["ttft_ms_measured"])
        rest = {name: cells.pop(name) for name in ("speedup", "quality")}
        error = (row["ttft_ms_predicted"] - measured) / measured
        out.append({**cells, "error": f"{100 * error:+.1f} %", **rest})
    return out


def _origin(provenance: dict[str, Any]) -> str:
    """What made the page, in words."""
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    return (
        f"{provenance['command']}, seed {provenance['seed']}, commit {provenance['commit']}, on "
        f"{provenance['machine']}, {provenance['date']}; {versions}"
    )


def _table(rows: Sequence[dict[str, Any]], mark: str = "") -> str:
    """An HTML table; rows of the tuned plan stand out."""
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(k)}</th>" for k in rows[0])
    lines = []
    for row in rows:
        style = " class=tuned" if row.get("policy") == "tuned" and not mark else ""
        cells = "".join(f"<td>{html.escape(_text(v))}</td>" for v in row.values())
        lines.append(f"<tr{style}>{cells}</tr>")
    return f"<div class=wide><table><tr>{head}</tr>{''.join(lines)}</table></div>"


def _text(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    if isinstance(value, list):
        return ", ".join(_text(v) for v in value)
    return str(value)
