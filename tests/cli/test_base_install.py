"""What needs the extra `runtime` says so in one line where there is only the base install."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from .file_cases import Case, Run

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "xxhash")


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if none were there: our modules that hold them, too, are imported anew."""
    for name in list(sys.modules):
        if name.split(".")[0] in PACKAGES or name.startswith("cachetune.runtime."):
            monkeypatch.delitem(sys.modules, name)
    for name in PACKAGES:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("base")
@pytest.mark.parametrize(
    "args",
    [
        ("demo",),
        ("calibrate",),
        ("run", "--model", "llama-tiny", "--plan", "plan.json", "--profile", "profile.json"),
        ("tune", "--profile", "profile.json", "--tier", "dram", "--confirm", "2"),
        ("bench", "quality", "--out", "out.json"),
        ("bench", "ttft", "--out", "out.json"),
    ],
)
def test_a_command_that_needs_more(
    case: Case, args: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(case.folder)
    more = ("--model", "llama-tiny", "--out", "plan2.json") if args[0] == "tune" else ()
    line = case.refused(*args, *more)
    assert "this command needs t" in line
    assert line.endswith("got an install without; pip install 'cachetune[runtime]'\n")


def test_what_is_missing_of_ours_keeps_its_traceback(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from cachetune.cli.main import main

    monkeypatch.setitem(sys.modules, "cachetune.core.record", None)
    with pytest.raises(ModuleNotFoundError):
        main(["schema", "plan"])
