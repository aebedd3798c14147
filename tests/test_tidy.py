"""The architecture as a test: who may import whom, sizes, banned calls, documentation."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from cachetune.cli.main import COMMANDS

ROOT = Path(__file__).parent.parent

FLOORS: dict[str, set[str]] = {
    "core": {"core"},
    "kernels": {"core", "kernels"},
    "simulator": {"core", "simulator"},
    "runtime": {"core", "kernels", "runtime"},
    "calibration": {"core", "kernels", "simulator", "runtime", "calibration"},
    "tuner": {"core", "kernels", "simulator", "runtime", "calibration", "tuner"},
    "cli": {"core", "kernels", "simulator", "runtime", "calibration", "tuner", "cli"},
}
"""Folder -> folders of ours that it may import, anywhere in a file."""

THIRD_PARTY: dict[str, set[str]] = {
    "core": {"pydantic", "numpy"},
    "kernels": {"torch", "triton", "numpy"},
    "simulator": {"simpy", "numpy", "pydantic"},
    "runtime": {
        "torch", "transformers", "safetensors", "tokenizers", "xxhash", "numpy", "obstore",
    },
    "calibration": {
        "numpy", "pandas", "scipy", "pydantic",
        "torch", "transformers", "safetensors", "tokenizers",
    },
    "tuner": {"optuna", "numpy", "pandas", "scipy", "pydantic"},
    "cli": {"typer", "rich", "plotly", "numpy", "pandas", "pydantic", "torch", "tokenizers"},
}  # fmt: skip

RUNTIME_EXTRA = {"torch", "transformers", "triton", "safetensors", "tokenizers", "xxhash"}
"""Not in the base install: core, simulator, calibration, tuner and cli load without them."""

WITHOUT_EXTRA = ("core", "simulator", "calibration", "tuner", "cli")

NO_CLOCK = {"time", "random", "secrets", "uuid", "threading", "asyncio"}
"""Modules that core and the simulator never import: the clock is an argument, chance is seeded."""

SEEDED = {"Generator", "PCG64", "SeedSequence", "BitGenerator"}
"""What may be taken from numpy.random: nothing that holds a global state."""

CLOCK_CALLS = {"now", "utcnow", "today", "urandom", "perf_counter_ns", "monotonic_ns", "time_ns"}

FILE_LINES_MAX = 400
FUNCTION_LINES_MAX = 70
KERNEL_LINES_MAX = 120
NOT_OURS = {"build", "dist", "node_modules", "__pycache__", "venv"}
TEXT_SUFFIXES = {".py", ".md", ".toml", ".json", ".jsonl", ".csv", ".yml", ".yaml", ".txt", ""}


@dataclass(frozen=True)
class Import:
    """One import statement: `module` is absolute, ours start with 'cachetune'."""

    path: Path
    line: int
    module: str
    names: tuple[str, ...]
    lazy: bool
    typing_only: bool

    @property
    def top(self) -> str:
        return self.module.split(".")[0]

    @property
    def where(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line} imports {self.module}"


def files() -> list[Path]:
    """Files of the project: no hidden folders but .ci, nothing that a build or a run made."""
    found = []
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        hidden = any(p.startswith(".") and p != ".ci" for p in parts[:-1]) or path.name == ".git"
        foreign = hidden or any(p in NOT_OURS or p.endswith(".egg-info") for p in parts)
        if not foreign and path.is_file() and not path.is_symlink():
            found.append(path)
    return sorted(found)


def sources(*folders: str) -> list[Path]:
    """Python files, of all the project or of some folders."""
    paths = [p for p in files() if p.suffix == ".py"]
    return [p for p in paths if not folders or p.relative_to(ROOT).parts[0] in folders]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes(), str(path))


def module_of(path: Path) -> str:
    parts = ("cachetune", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports_of(path: Path) -> tuple[Import, ...]:
    return tuple(_imports(tree_of(path), path, lazy=False, typing_only=False))


def _imports(node: ast.AST, path: Path, lazy: bool, typing_only: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        inside_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        typing_block = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(path, child.lineno, alias.name, (), lazy, typing_only)
        elif isinstance(child, ast.ImportFrom):
            base = child.module or ""
            if child.level:
                package = module_of(path).split(".")
                drop = child.level - (path.name == "__init__.py")
                above = package[: len(package) - drop]
                base = ".".join([*above, *([child.module] if child.module else [])])
            names = tuple(alias.name for alias in child.names)
            yield Import(path, child.lineno, base, names, lazy, typing_only)
        yield from _imports(child, path, lazy or inside_function, typing_only or typing_block)


def folders_of(found: Import) -> set[str]:
    """Folders of ours that an import reaches."""
    parts = found.module.split(".")
    if parts[0] != "cachetune":
        return set()
    return {parts[1]} if len(parts) > 1 else {n for n in found.names if n in FLOORS}


def listed(problems: list[str]) -> None:
    assert not problems, "\n" + "\n".join(problems)


@pytest.mark.parametrize("folder", FLOORS)
def test_imports_of_ours_go_down_only(folder: str) -> None:
    problems = []
    for path in sources(folder):
        for found in imports_of(path):
            for reached in folders_of(found) - FLOORS[folder]:
                problems.append(f"{found.where}: {folder} may not import {reached}")
    listed(problems)


@pytest.mark.parametrize("folder", FLOORS)
def test_third_party_imports_are_the_floor_s(folder: str) -> None:
    allowed = THIRD_PARTY[folder] | sys.stdlib_module_names | {"cachetune"}
    problems = [f.where for p in sources(folder) for f in imports_of(p) if f.top not in allowed]
    listed(problems)


def test_inside_the_package_imports_are_relative() -> None:
    problems = []
    for path in sources(*FLOORS):
        for node in ast.walk(tree_of(path)):
            names = []
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in names:
                if name.split(".")[0] in {"cachetune", *FLOORS}:
                    problems.append(f"{path.relative_to(ROOT)}:{node.lineno} imports {name}")
    listed(problems)


def test_base_floors_load_without_the_runtime_extra() -> None:
    """Follows top-level imports through our modules; `train_*` are scripts and stay out."""
    by_module = {module_of(p): p for p in sources(*FLOORS)}

    def closure(path: Path, seen: dict[Path, Import | None]) -> Iterator[Import]:
        for found in imports_of(path):
            if found.lazy or found.typing_only:
                continue
            if found.top in RUNTIME_EXTRA:
                yield found
            for name in (found.module, *(f"{found.module}.{n}" for n in found.names)):
                target = by_module.get(name)
                if target is not None and target not in seen:
                    seen[target] = found
                    yield from closure(target, seen)

    problems = []
    for path in sources(*WITHOUT_EXTRA):
        if not path.name.startswith("train_"):
            for found in closure(path, {path: None}):
                problems.append(f"{path.relative_to(ROOT)}: {found.where} when it is loaded")
    listed(sorted(set(problems)))


def test_core_and_simulator_know_no_clock_and_no_global_chance() -> None:
    problems = []
    for path in sources("core", "simulator"):
        problems += [f.where for f in imports_of(path) if f.top in NO_CLOCK]
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.Attribute):
                continue
            owner = ast.unparse(node.value)
            from_numpy = owner in ("np.random", "numpy.random") and node.attr not in SEEDED
            clock = node.attr in CLOCK_CALLS and owner in ("datetime", "date", "os", "time")
            if from_numpy or clock:
                problems.append(f"{path.relative_to(ROOT)}:{node.lineno} uses {owner}.{node.attr}")
    listed(problems)


def test_nothing_is_unpickled() -> None:
    """A file that users exchange must not be able to run code."""
    problems = []
    for path in sources(*FLOORS):
        for found in imports_of(path):
            if found.top in {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve"}:
                problems.append(found.where)
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
                problems.append(f"{path.relative_to(ROOT)}:{node.lineno} calls torch.load")
            allows = isinstance(node, ast.keyword) and node.arg == "allow_pickle"
            if allows and ast.unparse(node.value) != "False":
                problems.append(f"{path.relative_to(ROOT)}:{node.value.lineno} allows pickle")
    listed(problems)


def test_files_are_short() -> None:
    sizes = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in sources()}
    listed([f"{p.relative_to(ROOT)}: {n} lines" for p, n in sizes.items() if n > FILE_LINES_MAX])


def test_functions_are_short() -> None:
    problems = []
    for path in sources():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                jit = any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
                n = (node.end_lineno or node.lineno) - node.lineno + 1
                if n > (KERNEL_LINES_MAX if jit else FUNCTION_LINES_MAX):
                    problems.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {n}")
    listed(problems)


def test_kernels_is_a_namespace_package() -> None:
    """transformers imports any top-level `kernels` it finds; from the root that would be ours."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for folder in set(FLOORS) - {"kernels"}:
        assert (ROOT / folder / "__init__.py").exists(), folder


def _public(node: ast.AST) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, ast.FunctionDef | ast.ClassDef)
        if named and not child.name.startswith("_"):
            yield child
            if isinstance(child, ast.ClassDef):
                yield from _public(child)


def test_core_is_documented() -> None:
    problems = []
    for path in sources("core"):
        if not ast.get_docstring(tree_of(path)):
            problems.append(f"{path.relative_to(ROOT)} has no docstring")
        for node in _public(tree_of(path)):
            if not ast.get_docstring(node):
                problems.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    listed(problems)


def _forbidden_texts() -> dict[str, Callable[[str], object]]:
    folders = "|".join(("root", "home", "work", "Users", "tmp", "mnt", "workspace"))
    hosts = ("pypi" + ".org", "python" + "hosted", "download.py" + "torch", "anaconda" + ".org")
    return {
        "a path of one machine": re.compile(rf"(?<![\w.$}}>~/-])/(?:{folders})/[\w.]").search,
        "a registry host": re.compile("|".join(map(re.escape, hosts))).search,
        "a package index": re.compile("--(?:extra-)?index" + "-url").search,
    }


def test_no_machine_paths_and_no_registry_hosts() -> None:
    checks = _forbidden_texts()
    problems = []
    for path in files():
        if path.suffix not in TEXT_SUFFIXES or path.stat().st_size > 4 << 20:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if not any(search(text) for search in checks.values()):
            continue
        for number, line in enumerate(text.splitlines(), 1):
            for what, search in checks.items():
                if search(line):
                    problems.append(f"{path.relative_to(ROOT)}:{number} names {what}")
    listed(problems)


def test_every_command_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    listed([f"cachetune {c}" for c in COMMANDS if f"`cachetune {c}" not in readme])


def test_every_command_module_is_listed() -> None:
    def defines_command(node: ast.stmt) -> bool:
        if isinstance(node, ast.FunctionDef):
            return node.name == "command"
        return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "command"

    defines = {p.stem for p in sources("cli") if any(map(defines_command, tree_of(p).body))}
    subcommands = {name for name in defines if name.split("_")[0] in set(COMMANDS) - {name}}
    assert defines - subcommands == set(COMMANDS)


def test_every_verb_of_make_is_documented() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    rules = [line for line in text.splitlines() if re.match(r"[a-z]+:", line)]
    listed([line for line in rules if "  ## " not in line])
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    verbs = ("demo", "test", "check", "soak", "bench", "gpu", "clean")
    listed([f"make {v}" for v in verbs if f"make {v}" not in readme])


def test_architecture_is_a_page_that_names_every_file() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 100
    names = {p.name for p in sources(*FLOORS)} - {"__init__.py"}
    listed([f"ARCHITECTURE.md does not name {n}" for n in sorted(names) if f"`{n}`" not in text])
