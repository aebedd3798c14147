"""The main job at the smallest size, calibration and all: what it prints and what it leaves."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from statistics import median
from typing import Any

import pytest

pytest.importorskip("torch", reason="the demo runs a model")

from cachetune.calibration import calibrate, toy_rows
from cachetune.calibration.calibrate import Settings
from cachetune.calibration.fidelity import p95
from cachetune.calibration.text import load_tokenizer
from cachetune.calibration.toy_model import shipped_quality
from cachetune.cli import main
from cachetune.core.hardware import HardwareProfile
from cachetune.core.plan import ReusePlan, TunedPlan

TIERS = ["dram", "file", "rho0.1", "rho0.7", "rho4", "rho25"]
POLICIES = [
    "full_recompute",
    "prefix_cache",
    "full_reuse",
    "cacheblend",
    "epic",
    "cachetune",
    "tuned",
]
SMALL = ("--passages", "8", "--passage-tokens", "32", "--trials", "20", "--repeats", "2")


@dataclass(frozen=True)
class Ran:
    """A finished demo."""

    out: Path
    stdout: str
    stderr: str
    summary: dict[str, Any]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Random weights behind the shipped tokenizer's vocabulary; each probe and question is met
    once or twice, where the demo asks more often."""
    from cachetune.runtime.loaded_model import random_model
    from transformers import AutoConfig

    folder = tmp_path_factory.mktemp("demo")
    config = AutoConfig.for_model(
        "llama",
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=load_tokenizer().get_vocab_size(),
        max_position_embeddings=2048,
    )
    random_model(config).hf.save_pretrained(folder / "model")
    args = ["demo", "--model", str(folder / "model"), "--out", str(folder / "out"), *SMALL]
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        once = lambda **more: Settings(**{**more, "n_repeats": 1})  # noqa: E731
        patch.setattr(calibrate, "Settings", once)
        patch.setattr(toy_rows, "toy_rows", partial(toy_rows.toy_rows, n_contexts=2))
        with pytest.raises(SystemExit) as stop:
            main.main(args)
    assert stop.value.code == 0, err.getvalue()
    summary = json.loads((folder / "out" / "summary.json").read_text())
    return Ran(folder / "out", out.getvalue(), err.getvalue(), summary)


def test_every_file_is_there(ran: Ran) -> None:
    plans = [f"plan.{tier}.json" for tier in TIERS]
    rest = ["plan.json", "profile.json", "report.html", "summary.json"]
    assert {p.name for p in ran.out.iterdir()} == {
        *plans, *rest, "trace.real.json", "trace.sim.json",
    }  # fmt: skip


def test_every_policy_in_every_tier_with_and_without_the_plan(ran: Ran) -> None:
    rows = ran.summary["rows"]
    assert [(r["tier"], r["policy"]) for r in rows] == [(t, p) for t in TIERS for p in POLICIES]
    limits = {"rho0.1": 0.1, "rho0.7": 0.7, "rho4": 4.0, "rho25": 25.0}
    for row in rows:
        assert set(row) == {
            "policy", "tier", "rho", "limited", "recompute_ratio",
            "ttft_ms_predicted", "ttft_ms_measured", "speedup", "quality",
        }  # fmt: skip
        assert row["limited"] == (row["tier"] in limits)
        assert row["rho"] == limits[row["tier"]] if row["limited"] else 0 < row["rho"] < 4
        assert 0 <= row["recompute_ratio"] <= 1 and 0 <= row["quality"] <= 1.01
        assert row["ttft_ms_predicted"] > 0
        assert row["ttft_ms_measured"] and all(ms > 0 for ms in row["ttft_ms_measured"])


def test_the_summary_can_be_computed_again(ran: Ran) -> None:
    """Errors and speed-ups follow from the rows, the tuned plans from their files."""
    rows = ran.summary["rows"]
    errors = []
    for row in rows + ran.summary["sweep"]:
        measured = median(row["ttft_ms_measured"])
        errors.append(abs(row["ttft_ms_predicted"] - measured) / measured)
    assert ran.summary["fidelity"] == {
        "ttft_error_median": pytest.approx(median(errors)),
        "ttft_error_p95": pytest.approx(p95(errors)),
        "n_points": len(errors),
    }
    quality = shipped_quality()
    for tier in TIERS:
        of_tier = {r["policy"]: r for r in rows if r["tier"] == tier}
        baseline = median(of_tier["full_recompute"]["ttft_ms_measured"])
        for row in of_tier.values():
            assert row["speedup"] == pytest.approx(baseline / median(row["ttft_ms_measured"]))
        tuned = ran.summary["tuned"][tier]
        plan = TunedPlan.read(ran.out / f"plan.{tier}.json").plan
        assert tuned["policy"] == plan.policy
        assert tuned["selector"] == (plan.selector if plan.policy == "cachetune" else "")
        assert tuned["speedup"] == of_tier["tuned"]["speedup"]
        assert of_tier["tuned"]["quality"] == quality.score(plan, 32) >= 0.9


def test_the_trained_model_is_timed_and_scored(ran: Ran) -> None:
    toy = {(r["policy"], r["selector"]): r for r in ran.summary["toy"]}
    assert len(toy) == 6 and all(r["ttft_ms"] > 0 and r["n"] > 0 for r in toy.values())
    assert toy["full_recompute", ""]["cross"] > 0.9 > 0.1 > toy["full_reuse", ""]["cross"]
    assert toy["cachetune", "spread_high_pass"]["cross"] > toy["cachetune", "low_pass"]["cross"]


def test_profile_and_plan_fit_one_another(ran: Ran) -> None:
    profile = HardwareProfile.read(ran.out / "profile.json")
    tuned = TunedPlan.read(ran.out / "plan.json")
    assert tuned.check_fits(profile.hardware_fingerprint, profile.model_fingerprint) == ""
    assert tuned.plan == TunedPlan.read(ran.out / "plan.rho0.7.json").plan != ReusePlan()
    assert list(profile.tiers) == TIERS and tuned.quality == "borrowed"
    confirmed = tuned.evidence["confirmed"]["rows"]
    assert {"rank_simulated", "rank_measured", "ttft_ms"} <= set(confirmed[0])


def test_both_traces_hold_the_same_ops(ran: Ran) -> None:
    names = []
    for which in ("sim", "real"):
        trace = json.loads((ran.out / f"trace.{which}.json").read_text())
        spans = [e for e in trace["traceEvents"] if e["ph"] == "X"]
        assert all(e["dur"] >= 0 for e in spans) and any(e["dur"] > 0 for e in spans)
        names.append(sorted((e["name"], e["cat"]) for e in spans))
    assert names[0] == names[1] and {"prefill", "head"} <= {kind for _, kind in names[0]}


class Page(HTMLParser):
    """What a page shows, and what it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.shown = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [v for k, v in attrs if k in ("src", "href", "srcset") and v]

    def handle_data(self, data: str) -> None:
        self.shown += data if self.tags[-1] != "script" else ""


def test_the_report_is_one_file(ran: Ran) -> None:
    text = (ran.out / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.fetched and "@import" not in page.shown
    assert (
        page.tags.count("table") == 4
        and "commit" in page.shown
        and text.count("Plotly.newPlot(") >= 3
    )
    for row in ran.summary["toy"]:
        assert row["policy"] in page.shown
    for title in ("dram, rho ", "file, rho ", *(f"{tier}, limited" for tier in TIERS[2:])):
        assert title in text
    for name in ("predicted", "measured", "simulated compute", "real compute"):
        assert f'"{name}"' in text


def test_tables_then_one_json_line(ran: Ran) -> None:
    *tables, last = ran.stdout.splitlines()
    result = json.loads(last)
    assert result == {
        "command": "demo", **{k: ran.summary[k] for k in ("fidelity", "tuned")},
    }  # fmt: skip
    assert tables[0] == "TTFT by policy and tier"
    assert len([t for t in tables if t.split()[:1] == ["tuned"]]) == 1 + len(TIERS)
    for stage in ("probes", "tune", "tier rho25", "trained model", "report: "):
        assert stage in ran.stderr
