"""The command line: one line per error, results on stdout, exit codes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from cachetune.cli import console, main, settings
from cachetune.core.errors import CacheTuneError, PlanError
from cachetune.core.plan import ReusePlan, TunedPlan
from support import make_model, make_profile

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "profile.json"
    make_profile(model=make_model(max_position=4096)).write(path)
    return path


def small(profile: Path) -> list[object]:
    return ["simulate", "--profile", profile, "--requests", 12, "--chunk-tokens", 64]


def test_help_names_every_command(run: Run) -> None:
    for args in ((), ("--help",)):
        status, out, _ = run(*args)
        assert status == 0
        assert all(name in out for name in main.COMMANDS)


@pytest.mark.parametrize("name", main.COMMANDS)
def test_each_command_has_help(run: Run, name: str) -> None:
    status, out, err = run(name, "--help")
    assert status == 0 and "Usage" in out and not err


@pytest.mark.parametrize(
    "args", [("nope",), ("--nope",), ("schema",), ("schema", "x"), ("simulate",)]
)
def test_a_wrong_command_line_is_one_line(run: Run, args: tuple[str, ...]) -> None:
    status, out, err = run(*args)
    assert status == 2 and not out
    assert err.startswith("cachetune: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (
            CacheTuneError("a must be b", values="c", remedy="use\n d"),
            2,
            "a must be b, got c; use d",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_boundary(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, line: str
) -> None:
    def broken(names: object) -> typer.Typer:
        app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)

        def go() -> None:
            raise error

        app.command()(go)
        return app

    monkeypatch.setattr(main, "app", broken)
    monkeypatch.setattr(main, "DEFAULT_ARGS", [])
    found, out, err = run()
    assert found == status and not out
    assert err.strip() == f"cachetune: {line}"


def test_our_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(names: object) -> typer.Typer:
        raise ZeroDivisionError

    monkeypatch.setattr(main, "app", broken)
    with pytest.raises(ZeroDivisionError):
        main.main([])


@pytest.mark.parametrize("name", ["workload", "plan", "profile"])
def test_schema_is_json_schema(run: Run, name: str) -> None:
    status, out, _ = run("schema", name)
    schema = json.loads(out)
    assert status == 0
    assert schema["properties"]["schema_version"] == {"const": 1}
    assert "schema_version" in schema["required"] and schema["additionalProperties"] is False


def test_simulate_prints_a_table_then_one_json_line(run: Run, profile: Path) -> None:
    status, out, _ = run(*small(profile))
    lines = out.splitlines()
    result = json.loads(lines[-1])
    assert status == 0
    assert lines[0].split() == ["metric", "mean", "p50", "p90", "p99"]
    assert lines[1].split()[0] == "ttft_ms"
    assert result["n_ended"] == result["n_requests"] == 12
    assert result["tier"] == "dram" and result["policy"] == "cachetune"
    assert 0 < result["reuse_ratio"] < 1 and result["ttft_ms_p50"] > 0


def test_same_seed_same_bytes(run: Run, profile: Path) -> None:
    args = [*small(profile), "--noise", 0.1, "--seed"]
    assert run(*args, 3)[1] == run(*args, 3)[1]
    assert run(*args, 3)[1] != run(*args, 4)[1]


def test_a_thousand_requests_in_ten_seconds(run: Run, profile: Path) -> None:
    """Of CPU, on one core: eight chunks each, 32 tokens out, the command as a user calls it."""
    started = time.process_time()
    status, out, _ = run("simulate", "--profile", profile, "--requests", 1000, "--rate", 5)
    seconds = time.process_time() - started
    result = json.loads(out.splitlines()[-1])
    assert status == 0 and result["n_ended"] == 1000
    assert seconds <= 10


def test_set_reaches_the_engine(run: Run, profile: Path) -> None:
    def ratio(*extra: object) -> float:
        return json.loads(run(*small(profile), *extra)[1].splitlines()[-1])["reuse_ratio"]

    assert ratio("--set", "policy=full_recompute") == 0
    assert ratio("--set", "ratio=0.5") < ratio("--set", "ratio=0.1")


def test_simulate_writes_a_trace(run: Run, profile: Path, tmp_path: Path) -> None:
    trace = tmp_path / "new" / "trace.json"
    status, _, err = run(*small(profile), "--trace", trace, "--tier", "disk")
    assert status == 0 and str(trace) in err
    assert json.loads(trace.read_text())["traceEvents"]


def test_a_plan_for_another_machine_is_refused(run: Run, profile: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    TunedPlan(plan=ReusePlan(), hardware_fingerprint="0", model_fingerprint="0").write(path)
    status, out, err = run(*small(profile), "--plan", path)
    assert status == 2 and not out and "--allow-mismatch" in err and err.count("\n") == 1
    assert run(*small(profile), "--plan", path, "--allow-mismatch")[0] == 0


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (("--tier", "tape"), "tier must be one of"),
        (("--set", "look_ahed=2"), "did you mean 'look_ahead'?"),
        (("--workload", "missing.json"), "workload file must be readable"),
        (("--plan", "missing.json"), "plan file must be readable"),
        (("--chunks", "400"), "must fit the model's context"),
        (("--rate", "0"), "rate_rps must be positive"),
    ],
)
def test_bad_input_is_one_line(run: Run, profile: Path, extra: tuple[str, ...], says: str) -> None:
    status, out, err = run(*small(profile), *extra)
    assert status == 2 and not out
    assert says in err and err.startswith("cachetune: ") and err.count("\n") == 1


def test_settings() -> None:
    plan = settings.apply_settings(
        ReusePlan(), ["ratio=[0.3, 0.1]", "rules.0.load_exact=false", "policy=epic"]
    )
    assert plan.rules[0].ratios == (0.3, 0.1) and not plan.rules[0].load_exact
    assert plan.policy == "epic"
    plan = settings.apply_settings(plan, ["rules.0.rho=2.5", "disk=hdd"])
    assert plan.rules[0].rho == 2.5 and plan.rules[0].ratios == (0.3, 0.1)
    assert (plan.n_io_workers, plan.load_order) == (1, "chunk")


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("look_ahead", "--set takes key=value"),
        ("look_ahead=0", "greater than or equal to 1"),
        ("look_ahead=two", "valid integer"),
        ("policy=best", "'full_recompute'"),
        ("ratio=1.5", r"must lie in \[0, 1\]"),
        ("rules.7.tier=dram", "must name a knob"),
        ("look_ahead.deep=1", "must name a knob"),
        ("request_bytes=5000", "try 4096 or 8192"),
        ("rules.0.rho=0", "greater than 0"),
        ("disk=floppy", "one of ssd, hdd"),
    ],
)
def test_wrong_settings_say_the_rule(setting: str, says: str) -> None:
    with pytest.raises(PlanError, match=says) as caught:
        settings.apply_settings(ReusePlan(), [setting])
    assert "\n" not in str(caught.value)


def test_table_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"a": "x", "b": 1.0}, {"a": "long", "b": None}]
    console.print_table(rows, ("a", "b"), title="t")
    assert capsys.readouterr().out == "t\na     b\nx     1\nlong  -\n"


def test_progress_passes_items_through(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(console.progress([1, 2], "work")) == [1, 2]
    out, err = capsys.readouterr()
    assert not out and err == "work (2)\n"


def test_a_package_that_is_missing_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cachetune.__main__ import main

    monkeypatch.delitem(sys.modules, "cachetune.cli.main", raising=False)
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "cachetune: the package typer must be installed: see README.md\n"
    )
