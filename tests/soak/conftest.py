"""The fixture that runs rounds, and the summary when pytest ends."""

from __future__ import annotations

from pathlib import Path

import pytest
from cachetune.core.record import write_atomic
from cachetune.runtime.machine import provenance_here

from .soak_log import FOLDER, ROOT, Soak, code_version, summary_of, summary_text

RESULT = ROOT / "results" / "cpu" / "soak.json"
PARTIAL = FOLDER / "soak.json"

_ran: list[Soak] = []


@pytest.fixture(scope="session")
def soak(request: pytest.FixtureRequest) -> Soak:
    """Runs rounds as `--rounds` and `--replay` ask for."""
    option = request.config.getoption
    made = Soak(code_version(), option("--rounds"), option("--replay"))
    if made.replay is None:
        _ran.append(made)
    return made


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Write what is there so far: into `results/` once every soak has all of its rounds."""
    if not _ran:
        return
    path, line = write_summary(_ran[0].version)
    terminalreporter.section("soak")
    terminalreporter.write_line(line)
    terminalreporter.write_line(f"summary: {path.relative_to(ROOT)}")


def write_summary(version: str) -> tuple[Path, str]:
    """Where it lies, and a line on each soak."""
    summary = summary_of(version)
    provenance = provenance_here(0, "make soak").model_dump(mode="json")
    path = RESULT if summary["complete"] else PARTIAL
    write_atomic(path, summary_text({"provenance": provenance, **summary}).encode())
    lines = [
        f"{name}: {s['passed']} of {s['of']} rounds passed, {s['failed']} failed, "
        f"{s['seconds']} s, {s['counts']}"
        for name, s in summary["soaks"].items()
    ]
    return path, "\n".join(lines)
