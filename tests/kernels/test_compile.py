"""The kernels compile for three GPU generations: no spills, tensor cores, within shared memory."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed; there is nothing to compile")

from cachetune.kernels.registry import all_cases


def run_check(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-P", "-m", "cachetune.kernels.compile_check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


def test_one_case_per_kernel_compiles_clean() -> None:
    run = run_check()
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    for arch in ("sm_80", "sm_90", "sm_100"):
        assert arch in run.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_case_compiles_clean() -> None:
    run = run_check("--all")
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    told = {line.split()[0] for line in run.stdout.splitlines() if "sm_100" in line}
    assert told == {case.name for case in all_cases() if not case.tiny}


def test_interpreter_mode_is_refused() -> None:
    run = run_check(TRITON_INTERPRET="1")
    assert run.returncode == 2
    assert "unset it" in run.stderr


def test_a_name_that_no_case_has_is_refused() -> None:
    run = run_check("--only", "nothing/like_this")
    assert run.returncode == 2
    assert "take one of" in run.stderr and "pack/" in run.stderr


def test_a_spill_fails_the_check() -> None:
    from cachetune.kernels.compile_check import Report, problems
    from cachetune.kernels.registry import representatives

    case = representatives()[0]
    assert case.kernel == "sparse_attention"
    clean = Report(200, 0, 1000, "mma.sync cp.async.cg.shared.global 0x10, 0x10", 0.0)
    assert problems(case, clean, 80, main=True) == []
    spilled = Report(255, 48, 1000, clean.ptx, 0.0)
    assert problems(case, spilled, 80, main=True) == ["spills 48 B"]
    assert problems(case, clean, 90, main=True) == ["no wgmma.mma_async"]
    greedy = Report(200, 0, 228 * 1024, clean.ptx, 0.0)
    assert "shared" in problems(case, greedy, 80, main=False)[0]
    assert len(problems(case, Report(9, 0, 0, "", 0.0), 80, main=True)) == 3
