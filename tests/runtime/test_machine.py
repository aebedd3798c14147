"""Where a result comes from, also where there is no git."""

from __future__ import annotations

from pathlib import Path

import pytest
from cachetune.runtime import machine


def copy_of_code(root: Path, text: str) -> Path:
    for floor in machine.FLOORS:
        (root / floor).mkdir(parents=True)
        (root / floor / "module.py").write_text(text)
    return root


def test_a_copy_without_history_is_known_by_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that only got the files."""
    monkeypatch.setattr(machine, "_git", lambda *_: None)
    commit = machine.provenance_here(0).commit
    root = Path(machine.__file__).resolve().parent.parent
    assert commit == f"sources-{machine.sources_hash(root)}" and len(commit) == 20
    assert all((root / floor).is_dir() for floor in machine.FLOORS)


def test_the_hash_is_of_names_and_contents(tmp_path: Path) -> None:
    first, again = (copy_of_code(tmp_path / name, "x = 1\n") for name in ("first", "again"))
    assert machine.sources_hash(first) == machine.sources_hash(again)
    other = copy_of_code(tmp_path / "other", "x = 2\n")
    renamed = copy_of_code(tmp_path / "renamed", "x = 1\n")
    (renamed / "cli" / "module.py").rename(renamed / "cli" / "else.py")
    hashes = {machine.sources_hash(p) for p in (first, other, renamed)}
    assert len(hashes) == 3
