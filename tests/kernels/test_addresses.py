"""Addresses are made of 64-bit program ids; no case is large enough to overflow 32 bits."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
FILES = [path for path in sorted(KERNELS.glob("*.py")) if "@triton.jit" in path.read_text()]
FEW = {"split", "share"}
"""Numbers below `MAX_SPLITS`, widened where they meet a stride."""


def narrow(source: str) -> Iterator[str]:
    """Lines that use a program id as it comes, though not only to compare or to count it."""
    tree = ast.parse(source)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.program_id"):
            continue
        around = parents[node]
        used = ast.unparse(parents[around])
        is_few = isinstance(around, ast.Assign) and ast.unparse(around.targets[0]) in FEW
        is_counted = isinstance(around, ast.Compare) or used.startswith("range(")
        if not (used == f"{ast.unparse(node)}.to(tl.int64)" or is_counted or is_few):
            yield f"{node.lineno}: {used}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_program_ids_are_widened(path: Path) -> None:
    assert not list(narrow(path.read_text()))


@pytest.mark.parametrize(
    "line", ["x = tl.program_id(0)", "x = p + tl.program_id(0) * 8", "x = tl.program_id(0).to(y)"]
)
def test_a_narrow_one_is_seen(line: str) -> None:
    assert list(narrow(line))
    wide = line.removesuffix(".to(y)").replace("program_id(0)", "program_id(0).to(tl.int64)")
    assert not list(narrow(wide))
