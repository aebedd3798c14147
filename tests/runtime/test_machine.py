"""What a result says of the code that made it."""

from __future__ import annotations

from pathlib import Path

import pytest
from cachetune.runtime import machine


def package(root: Path) -> Path:
    (root / "core").mkdir(parents=True)
    (root / "tests").mkdir()
    (root / "__init__.py").write_text("")
    (root / "core" / "a.py").write_text("x = 1")
    return root


def test_without_git_the_code_is_named_by_its_content(tmp_path: Path) -> None:
    here, there = package(tmp_path / "here"), package(tmp_path / "there")
    found = machine.source_id(here)
    assert found == machine.source_id(there) and found.startswith("source-")
    (here / "tests" / "test_a.py").write_text("")
    assert found == machine.source_id(here)
    (here / "core" / "a.py").write_text("x = 2")
    assert found != machine.source_id(here)
    (there / "core" / "a.py").rename(there / "core" / "b.py")
    assert found != machine.source_id(there)


def test_provenance_names_the_code_with_and_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_git", lambda root, *args: None)
    root = Path(machine.__file__).resolve().parent.parent
    assert machine.provenance_here(0).commit == machine.source_id(root)
    answers = {"--show-toplevel": str(root), "HEAD": "abc", ":!results": ""}
    monkeypatch.setattr(machine, "_git", lambda root, *args: answers[args[-1]])
    assert machine.provenance_here(0).commit == "abc"
    answers[":!results"] = " M core/a.py"
    assert machine.provenance_here(0).commit == "abc-dirty"
    answers["--show-toplevel"] = str(root.parent)  # a project that has us among its files
    assert machine.provenance_here(0).commit == machine.source_id(root)
