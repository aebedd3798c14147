"""A command line run in this process, and files for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from cachetune.cli import main
from support import make_model, make_profile, make_workload

from .file_cases import Case, Run


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line: (exit status, stdout, stderr)."""

    def go(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main.main([str(a) for a in args])
        out, err = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return stop.value.code, out, err

    return go


@pytest.fixture
def case(run: Run, tmp_path: Path) -> Case:
    """Files for the simulator."""
    profile = make_profile(model=make_model(max_position=512))
    return Case.write(run, tmp_path, profile, make_workload([("a", "b"), ("b", "a")]))
