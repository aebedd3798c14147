"""`cachetune tune` and `cachetune run` from the command line: results, and one line per error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cachetune.calibration.probes import Library, Shape
from cachetune.cli.main import main
from cachetune.core.hardware import HardwareProfile
from cachetune.core.plan import TunedPlan
from cachetune.core.workload import Workload
from support import make_profile, make_tier


def status_of(*args: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in args])
    return int(stop.value.code or 0)


@pytest.fixture
def files(profile: HardwareProfile, workload: Workload, tmp_path: Path) -> Path:
    profile.write(tmp_path / "profile.json")
    workload.write(tmp_path / "workload.json")
    return tmp_path


def tune_args(files: Path, *more: object) -> list[object]:
    paths = ("--profile", files / "profile.json", "--workload", files / "workload.json")
    return ["tune", *paths, "--trials", 12, "--out", files / "plan.json", *more]


def test_tune_writes_a_plan(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(*tune_args(files, "--tier", "fast")) == 0
    captured = capsys.readouterr()
    line = json.loads(captured.out.splitlines()[-1])
    tuned = TunedPlan.read(files / "plan.json")
    assert line["plan_fingerprint"] == tuned.plan.fingerprint()
    assert line["policy"] == "cachetune"
    assert "quality: unknown" in captured.err


def test_tune_under_load(files: Path) -> None:
    assert status_of(*tune_args(files, "--tier", "slow", "--mode", "serve")) == 0
    assert TunedPlan.read(files / "plan.json").evidence["mode"] == "serve"


def test_tune_for_two_tiers_gives_a_ratio_each(files: Path) -> None:
    assert status_of(*tune_args(files, "--tier", "fast,slow")) == 0
    plan = TunedPlan.read(files / "plan.json").plan
    assert [rule.tier for rule in plan.rules] == ["fast", "slow", "*"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--tier", "tape"), "tier must be one of"),
        (("--tier", "fast", "--confirm", 3), "token ids"),
        (("--tier", "fast", "--quality-floor", 2), "quality-floor"),
        (("--tier", "fast", "--mode", "live"), "dag, serve"),
        (("--tier", "fast", "--quality", "missing.json"), "readable"),
    ],
)
def test_errors_are_one_line(
    files: Path, more: tuple[object, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(*tune_args(files, *more)) == 2
    error = [t for t in capsys.readouterr().err.splitlines() if t.startswith("cachetune: ")]
    assert len(error) == 1 and words in error[0]
    assert not (files / "plan.json").exists()


class TestRun:
    """With the real runtime."""

    @pytest.fixture
    def here(self, tmp_path: Path) -> Path:
        """Profile, workload and plan of this machine and the tiny model."""
        pytest.importorskip("torch")
        from cachetune.runtime.loaded_model import load_model
        from cachetune.runtime.machine import device_here

        loaded = load_model("llama-tiny")
        tiers = {"dram": make_tier(1e9)}
        profile = make_profile(model=loaded.spec, tiers=tiers).replace(
            model_fingerprint=loaded.fingerprint, device=device_here(1)
        )
        profile.write(tmp_path / "profile.json")
        Library(loaded.spec, 0).workload(Shape(3, 48, 16), 2, 2).write(tmp_path / "workload.json")
        assert status_of(*tune_args(tmp_path, "--tier", "dram")) == 0
        return tmp_path

    def args(self, here: Path, *more: object) -> list[object]:
        paths = ("profile", "plan", "workload")
        named = [x for p in paths for x in (f"--{p}", here / f"{p}.json")]
        return ["run", "--model", "llama-tiny", *named, *more]

    def test_serves(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        tuned = TunedPlan.read(here / "plan.json")
        tuned.replace(quality="borrowed").write(here / "plan.json")
        assert status_of(*self.args(here, "--trace", here / "trace.json")) == 0
        captured = capsys.readouterr()
        line = json.loads(captured.out.splitlines()[-1])
        assert line["n_ended"] == 2 and line["tier"] == "dram"
        assert line["plan_fingerprint"] == tuned.plan.fingerprint()
        assert "quality: borrowed" in captured.err
        assert json.loads((here / "trace.json").read_text())["traceEvents"]

    @pytest.mark.parametrize("what", ["hardware_fingerprint", "model_fingerprint"])
    def test_refuses_a_plan_for_another(
        self, here: Path, what: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        tuned = TunedPlan.read(here / "plan.json")
        tuned.replace(**{what: "other"}).write(here / "plan.json")
        assert status_of(*self.args(here)) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("cachetune: the plan must be made for this")
        assert status_of(*self.args(here, "--allow-mismatch")) == 0
