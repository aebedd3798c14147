"""Triton kernels against the reference, without a GPU: the registry's tiny cases, interpreted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import needs_interpreter

pytest.importorskip("triton", reason="triton is not installed; its kernels cannot be interpreted")

from cachetune.kernels.registry import all_cases

TINY = [case.name for case in all_cases() if case.tiny]


@pytest.fixture(scope="module")
def verdicts() -> dict[str, str]:
    needs_interpreter()
    script = Path(__file__).with_name("run_tiny.py")
    paths = os.pathsep.join(p for p in sys.path if p)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    run = subprocess.run(
        [sys.executable, "-P", str(script)], capture_output=True, text=True, env=env, check=False
    )
    found = dict(line.split("\t", 1) for line in run.stdout.splitlines() if "\t" in line)
    assert run.returncode == 0, f"after {len(found)} cases:\n{run.stderr[-3000:]}"
    return found


@pytest.mark.parametrize("name", TINY)
def test_kernel_agrees_with_reference(name: str, verdicts: dict[str, str]) -> None:
    assert verdicts.get(name) == "ok"


@pytest.mark.parametrize(
    "name", ["bottom-right mask", "a key of the future", "no window", "holes seen"]
)
def test_a_case_tells_of_a_wrong_mask(name: str, verdicts: dict[str, str]) -> None:
    """The alignment that dense kernels assume, wrong for scattered rows, was a bug of others."""
    assert verdicts.get(name) == "caught"


def test_only_blocks_with_some_holes_cost_a_mask(verdicts: dict[str, str]) -> None:
    assert verdicts.get("unread bits") == "ok"


def test_every_kernel_has_tiny_and_full_cases() -> None:
    kernels = {(case.kernel, case.tiny) for case in all_cases()}
    assert {name for name, tiny in kernels if tiny} == {name for name, tiny in kernels if not tiny}
    assert len({case.name for case in all_cases()}) == len(all_cases())
