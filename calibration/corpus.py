"""Real text that is on every machine: the docstrings of the standard library, from its sources."""

from __future__ import annotations

import ast
import sysconfig
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..core.errors import WorkloadError

LEFT_OUT = {
    "__pycache__", "ensurepip", "idlelib", "lib-dynload", "lib2to3", "pydoc_data",
    "site-packages", "dist-packages", "test", "tests", "turtledemo",
}  # fmt: skip
"""Folders whose text is tests, data, installed packages, or missing on some machines."""

MIN_CHARACTERS = 80
"""Shorter docstrings say too little to be asked about."""


@dataclass(frozen=True, slots=True)
class Docstring:
    """The documentation of one module, class or function."""

    module: str
    name: str
    """Qualified name inside the module; empty for the module's own docstring."""
    text: str

    @property
    def title(self) -> str:
        """`module.name`."""
        return f"{self.module}.{self.name}" if self.name else self.module


@cache
def source_files() -> tuple[tuple[str, Path], ...]:
    """(module name, source file) of the standard library, sorted by name.

    Raises:
        WorkloadError: this Python came without its sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in root.rglob("*.py"):
        inside = path.relative_to(root)
        if LEFT_OUT.isdisjoint(inside.parts) and all(p.isidentifier() for p in inside.parts[:-1]):
            parts = [*inside.parts[:-1], inside.stem]
            found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    if not found:
        raise WorkloadError(
            "the standard library's sources must be on this machine",
            values=f"no .py file under {root}",
            remedy="use a Python that has them, or give a workload file",
        )
    return tuple(sorted(found))


def docstrings_of(module: str, path: Path) -> list[Docstring]:
    """Docstrings of one source file, in the order of the text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in somebody else's source
        tree = ast.parse(path.read_bytes())
    found: list[Docstring] = []
    _collect(tree, module, "", found)
    return found


def _collect(node: ast.AST, module: str, name: str, found: list[Docstring]) -> None:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node) or ""
        if len(text) >= MIN_CHARACTERS:
            found.append(Docstring(module, name, text))
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            _collect(child, module, f"{name}.{child.name}" if name else child.name, found)
