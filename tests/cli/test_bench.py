"""The benchmarks from the command line at tiny sizes: results, ledgers, errors, resumption."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="benchmarks run the model")

from cachetune.calibration import hf_peer, redis_rates, throughput, ttft
from cachetune.calibration.ceilings import Sizes
from cachetune.calibration.io_rates import Series
from cachetune.cli import (
    bench_grid,
    bench_io,
    bench_kernels,
    bench_machine,
    bench_parts,
    bench_serve,
    gpu_suite,
)
from cachetune.cli.gpu_suite import Stamps, Step

from .file_cases import Run


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Small limits, and parts that no other test sees."""
    sizes = Sizes(1 << 16, 32, 1 << 20, 1 << 20, 1 << 16)
    monkeypatch.setattr(Sizes, "for_device", staticmethod(lambda device: sizes))
    monkeypatch.setattr(bench_parts, "KEPT", tmp_path / "parts")


def result(run: Run, *args: object) -> tuple[dict[str, Any], str]:
    status, out, err = run("bench", *args)
    assert status == 0, err
    line: dict[str, Any] = json.loads(out.splitlines()[-1])
    return line, err


def test_kernels(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    out = tmp_path / "kernels.json"
    args = ("--device", "cpu", "--only", "deviation,pack/token4", "--smaller-by", 512)
    line, err = result(run, "kernels", *args, "--peers", "none", "--repeats", 3, "--out", out)
    assert line["wrong"] == [] and "torch reference" in err
    written = json.loads(out.read_text())
    assert written["path"] == "torch reference" and written["provenance"]["commit"]
    assert {r["case"].split("/")[0] for r in written["rows"]} == {"deviation", "pack"}


def test_kernels_that_were_timed_stay_when_the_rest_is_cut_off(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    out, usual = tmp_path / "kernels.json", bench_kernels._rows

    def rows(case: Any, *args: Any) -> list[dict[str, Any]]:
        if case.name.startswith("pack"):
            raise KeyboardInterrupt
        return usual(case, *args)

    monkeypatch.setattr(bench_kernels, "_rows", rows)
    listed = bench_kernels._cases("cpu", "deviation,pack/token4", 512)
    monkeypatch.setattr(bench_kernels, "_cases", lambda *_: listed[::-1])
    status, _, _ = run("bench", "kernels", "--device", "cpu", "--peers", "none", "--out", out)
    written = json.loads(out.read_text())
    assert status and {r["case"].split("/")[0] for r in written["rows"]} == {"deviation"}
    assert [name.split("/")[0] for name in written["missing"]] == ["pack"]


SMALL = ("--model", "llama-tiny", "--chunks", 2, "--chunk-tokens", 32, "--device", "cpu")


def test_ttft_prints_four_ledgers_and_goes_on_where_it_stopped(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "ttft.json"
    args = ("ttft", *SMALL, "--repeats", 1, "--policies", "cachetune", "--tiers", "dram,device")
    line, err = result(run, *args, "--rhos", "0.7", "--parts", "dram", "--out", out)
    assert "not measured yet: device, curve, rho0.7" in err
    line, err = result(run, *args, "--rhos", "0.7", "--out", out)
    assert "dram: measured before" in err and set(line["over_bound"]) == {"rho0.7"}
    written = json.loads(out.read_text())
    assert written["missing"] == []
    assert written["prefill_chunk_tokens"] == "whole prompt in one piece"
    full, reused = written["parts"]["dram"]["rows"]
    assert full["n_bytes"] == 0 and reused["n_bytes"] > 0 < reused["prepare_ms"]
    assert reused["path_ms"] >= reused["ttft_ms"] and 0 < reused["flops_skipped"] < 1
    ceilings = written["parts"]["dram"]["ceilings"]
    expected = 1e3 * reused["n_bytes"] / (ceilings["device_copy"]["rate"] / 2)
    assert reused["ideal_load_ms"] == pytest.approx(expected)
    assert set(written["parts"]["dram"]["peer_ms"]) == {"hf generate"}


def cut_off_after(n: int, usual: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, which at its n-th call is interrupted instead."""
    calls = count(1)

    def work(*args: Any, **kwargs: Any) -> Any:
        if next(calls) >= n:
            raise KeyboardInterrupt
        return usual(*args, **kwargs)

    return work


def test_ttft_keeps_the_repeats_before_it_was_cut_off(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The part is still to be measured."""
    out = tmp_path / "ttft.json"
    # Two rows: a warm-up, two repeats, and half of the third.
    monkeypatch.setattr(ttft, "run_on_path", cut_off_after(8, ttft.run_on_path))
    args = ("ttft", *SMALL, "--repeats", 5, "--policies", "cachetune", "--tiers", "dram")
    status, _, _ = run("bench", *args, "--rhos", "", "--out", out)
    written = json.loads(out.read_text())
    assert status and written["missing"] == ["dram"]
    assert [row["n"] for row in written["parts"]["dram"]["rows"]] == [2, 2]


def test_ttft_goes_on_without_a_peer_that_cannot_run(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> float:
        raise RuntimeError("cuDNN Frontend error: No valid execution plans built.\nmore")

    monkeypatch.setattr(ttft, "generate_ms", refuse)
    out = tmp_path / "ttft.json"
    args = ("ttft", *SMALL, "--repeats", 1, "--policies", "cachetune", "--tiers", "dram")
    _, err = result(run, *args, "--rhos", "", "--out", out)
    part = json.loads(out.read_text())["parts"]["dram"]
    why = {"hf generate": "cuDNN Frontend error: No valid execution plans built."}
    assert part["peer_trouble"] == why and part["peer_ms"] == {}
    assert "hf generate did not run: cuDNN" in err
    assert part["rows"][0]["speedup"] == pytest.approx(1.0)


def test_throughput_keeps_the_repeats_before_it_was_cut_off(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a peer that cannot run takes nothing else with it."""

    def refuse(*_: Any) -> float:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(hf_peer, "generate_ms", refuse)
    monkeypatch.setattr(throughput, "_note", cut_off_after(4, throughput._note))
    out = tmp_path / "throughput.json"
    args = (*SMALL, "--requests", 2, "--contents", 3, "--output-tokens", 1, "--repeats", 3)
    policies = ("--policies", "cachetune", "--ratios", "0.5")
    status, _, _ = run("bench", "throughput", *args, *policies, "--out", out)
    written = json.loads(out.read_text())
    assert status and written["repeats"] == 3 and [r["n"] for r in written["rows"]] == [1, 1]
    assert written["hf_generate_s"] == []


def test_throughput(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "throughput.json"
    args = (*SMALL, "--requests", 3, "--contents", 4, "--output-tokens", 2, "--repeats", 1)
    policies = ("--policies", "full_reuse,cachetune", "--ratios", "0.5")
    line, _ = result(run, "throughput", *args, *policies, "--out", out)
    assert list(line["rps"]) == ["full_recompute", "full_reuse", "cachetune 0.5"]
    full, blind, half = json.loads(out.read_text())["rows"]
    assert full["of_ideal"] == pytest.approx(1.0)
    assert 0 == full["flops_skipped"] < half["flops_skipped"] < blind["flops_skipped"] < 1
    assert half["prepared_rps"] < half["path_rps"] <= half["rps"]
    assert half["n_decode_steps"] >= 1


def test_io(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "io.json"
    args = ("--folder", tmp_path / "disk", "--workers", 1, "--size-mib", 32, "--device", "cpu")
    status, _, err = run("bench", "io", *args, "--rounds", 1, "--seconds", 0.05, "--out", out)
    if "refuses O_DIRECT" in err:
        pytest.skip("this file system has no O_DIRECT")
    assert status == 0, err
    written = json.loads(out.read_text())
    assert written["cold"] and written["request_bytes"] == 256 << 10
    media = {(r["medium"], r["contender"]) for r in written["rows"]}
    assert {("file, O_DIRECT", "store"), ("file, page cache", "store")} <= media
    assert not list((tmp_path / "disk").iterdir())


def test_io_keeps_the_media_before_it_was_cut_off(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no server, that is told."""
    monkeypatch.setattr(bench_io, "_files", lambda *_: [Series("store", 1, [1e9, 2e9])])
    monkeypatch.setattr(bench_io, "_cached", cut_off_after(1, bench_io._cached))
    out = tmp_path / "io.json"
    args = ("--folder", tmp_path / "disk", "--device", "cpu", "--out", out)
    assert run("bench", "io", *args)[0]
    written = json.loads(out.read_text())
    assert [row["medium"] for row in written["rows"]] == ["file, O_DIRECT"]
    assert written["missing"] == ["file, page cache", "redis"]
    monkeypatch.setattr(bench_io, "_cached", lambda *_: [])
    monkeypatch.setattr(redis_rates.RedisServer, "start", lambda: None)
    _, err = result(run, "io", *args)
    assert json.loads(out.read_text())["missing"] == []
    assert "neither redis-server nor valkey-server" in err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("kernels", "--device", "tpu"), "--device must be"),
        (("kernels", "--device", "cpu", "--only", "nothing"), "--only must name"),
        (("ttft", "--tiers", "tape"), "--tiers must be of"),
        (("ttft", *SMALL, "--parts", "tape"), "--parts must name"),
        (("throughput", "--ratios", "2"), "--ratios must be"),
        (("io", "--workers", "0"), "--workers must be"),
        (("gpu", "--step", "nothing"), "--step must name"),
    ],
)
def test_errors_are_one_line(run: Run, args: tuple[object, ...], words: str) -> None:
    status, out, err = run("bench", *args)
    said = [text for text in err.splitlines() if text.startswith("cachetune: ")]
    assert status == 2 and not out and len(said) == 1 and words in said[0]


def _state(pid: int) -> bytes:
    """What /proc says of a process; nothing once it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rsplit(b")", 1)[1].split()[0]
    except OSError:
        return b"Z"


class TestSuite:
    """`bench gpu`."""

    def test_a_dry_run_never_writes_results(self) -> None:
        assert bench_machine.results_folder("cpu") == Path("results/cpu")
        for step in gpu_suite.steps("cpu", gpu_suite.DRY_RUN):
            assert not any("results" in word for word in step.argv), step.name

    def test_on_a_gpu_everything_is_there(self) -> None:
        found = gpu_suite.steps("cuda", Path("results/nvidia-h200"))
        names = [s.name for s in found]
        assert names[0] == "correctness" and len(names) == len(set(names))
        assert list(gpu_suite.ORDER) == names[: len(gpu_suite.ORDER)]
        loop = ["loop-calibrate", "loop-tune", "loop-run", "loop-fidelity", "loop-grid"]
        assert [name for name in names if name in loop] == loop
        for step in found[1:]:
            assert "cuda" in step.argv and any("results/nvidia-h200" in w for w in step.argv)

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            ("109 skipped, 1034 deselected in 17 s", "no test ran"),
            ("SKIPPED [1] a.py:3: triton is not installed\n9 passed, 1 skipped", "a package is"),
            ("SKIPPED [1] a.py:3: root may write anywhere\n100 passed, 1 skipped", ""),
        ],
    )
    def test_tests_that_were_skipped_prove_nothing(
        self, tmp_path: Path, text: str, why: str
    ) -> None:
        log = tmp_path / "correctness.log"
        log.write_text(text)
        assert gpu_suite.proves_nothing(log).startswith(why)
        assert bool(gpu_suite.proves_nothing(log)) == bool(why)

    def test_every_step_is_a_command_that_parses(self, run: Run) -> None:
        found = gpu_suite.steps("cpu", Path("x"))[1:]
        found += gpu_suite.steps("cuda", Path("x"))[1:]
        for step in found:
            status, _, err = run(*step.argv[1:], "--help")
            assert status == 0, (step.name, err)

    def test_a_step_that_takes_too_long_is_ended(self, tmp_path: Path) -> None:
        code = "import tempfile, time; print(tempfile.mkdtemp()); time.sleep(60)"
        slow = Step("slow", ("timeit", "-n", "1", "-r", "1", code))
        status, seconds = gpu_suite.run_step(slow, tmp_path / "slow.log", limit_s=1.5)
        assert status == "over 2 s" and seconds < 20
        left = Path((tmp_path / "slow.log").read_text().splitlines()[0])
        assert left.parent == tmp_path / "tmp" and not left.exists()

    def test_a_step_ends_with_the_one_who_ends_the_suite(self, tmp_path: Path) -> None:
        """It is no session of its own, which nobody would clear away from a shared machine."""
        code = "import os, time; print(os.getpid(), os.getsid(0), flush=True); time.sleep(60)"
        step = f"Step('slow', ('timeit', '-n1', '-r1', {code!r}))"
        script = (
            "from pathlib import Path; from cachetune.cli.gpu_suite import Step, run_step; "
            f"run_step({step}, Path({str(tmp_path)!r}) / 'log')"
        )
        suite = subprocess.Popen(
            [sys.executable, "-c", script],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert suite.stderr is not None
        pid, session = map(int, suite.stderr.readline().split())
        assert session == os.getsid(0)
        suite.terminate()
        assert suite.wait(20) == 128 + signal.SIGTERM
        for _ in range(200):
            if not Path(f"/proc/{pid}").exists() or b"Z" in _state(pid):
                break
            time.sleep(0.05)
        else:
            raise AssertionError("the step goes on")

    def test_done_steps_are_skipped_until_their_command_changes(self, tmp_path: Path) -> None:
        stamps, step = Stamps(tmp_path), Step("one", ("platform",))
        status, seconds = gpu_suite.run_step(step, stamps.log(step))
        assert status == "ok" and stamps.log(step).read_text()
        stamps.write(step, status, seconds)
        assert stamps.read(step) is not None
        assert stamps.read(Step("one", ("platform", "--other"))) is None
        stamps.write(step, "exit 1", seconds)
        assert stamps.read(step) is None

    def test_what_has_no_time_is_left_to_the_next_call(
        self, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        limits: list[float] = []

        def runs(step: Step, log: Path, limit_s: float) -> tuple[str, float]:
            limits.append(limit_s)
            return f"over {limit_s:.0f} s", limit_s

        monkeypatch.setattr(gpu_suite, "STAMPS", tmp_path)
        monkeypatch.setattr(gpu_suite, "run_step", runs)
        monkeypatch.setattr(gpu_suite, "DRY_RUN", tmp_path / "out")
        status, out, _ = run("bench", "gpu", "--within-s", "20")
        assert status == 0 and not limits and not json.loads(out.splitlines()[-1])["failed"]
        status, _, _ = run("bench", "gpu", "--within-s", "100", "--step", "correctness,io")
        assert status == 0 and len(limits) == 2 and all(90 < n <= 100 for n in limits)
        kept = json.loads((tmp_path / "out" / "steps.json").read_text())
        assert {s["status"] for s in kept["steps"]} == {"to do"}
        assert run("bench", "gpu", "--step", "io")[0] == 1 and limits[-1] == gpu_suite.LIMIT_S

    def test_a_failed_step_hides_none_of_the_later_ones(
        self, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        ran = []

        def fails(step: Step, log: Path, limit_s: float) -> tuple[str, float]:
            ran.append(step.name)
            if step.name != "io":
                return "exit 1", 0.1
            out.mkdir(exist_ok=True)
            Path(step.argv[step.argv.index("--out") + 1]).write_text("{}")
            return "ok", 0.1

        out = tmp_path / "out"

        monkeypatch.setattr(gpu_suite, "STAMPS", tmp_path)
        monkeypatch.setattr(gpu_suite, "run_step", fails)
        monkeypatch.setattr(gpu_suite, "DRY_RUN", out)
        status, said, err = run("bench", "gpu")
        names = [s.name for s in gpu_suite.steps("cpu", out)]
        assert status == 1 and ran == names and "no figure of this run counts" in err
        failed = json.loads(said.splitlines()[-1])["failed"]
        assert failed == [name for name in names if name != "io"]
        kept = json.loads((out / "steps.json").read_text())
        assert kept["provenance"]["commit"]
        assert {s["step"]: s["status"] for s in kept["steps"]}["io"] == "ok"
        ran.clear()
        run("bench", "gpu")
        assert ran == failed
        (out / "io.json").unlink()  # a stamp without its result is worth nothing
        ran.clear()
        run("bench", "gpu")
        assert ran == names


def test_grid_and_serve_share_a_profile() -> None:
    """`make bench` runs them in this order, and a profile is of one model."""
    shared = [inspect.signature(bench.command).parameters for bench in (bench_grid, bench_serve)]
    for name in ("model", "profile"):
        assert len({str(parameters[name].default) for parameters in shared}) == 1
