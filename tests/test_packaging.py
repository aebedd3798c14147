"""The root is the package: wheel, editable and no install; a base install has no torch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from support import make_profile

ROOT = Path(__file__).parent.parent
FLOORS = ("core", "kernels", "simulator", "runtime", "calibration", "tuner", "cli")
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis"
)
WHERE = "import cachetune, cachetune.cli.main, cachetune.simulator; print(cachetune.__file__)"
EXTRAS = ("torch", "transformers", "triton", "safetensors", "tokenizers", "xxhash")

FORBID = f"""
import sys
class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {EXTRAS!r}:
            raise ModuleNotFoundError(f"a base install has no {{name}}", name=name)
sys.meta_path.insert(0, Forbid())
"""

KERNELS = """
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    if name[0].isupper():
        return type(name, (), {"__init__": lambda self, *a, **k: None})
    return lambda *a, **k: lambda item: item
"""
"""Stands in for Hugging Face's `kernels`: any class, any decorator."""


def is_installed(package: str) -> bool:
    """Looked up, not found by import: for `pip` that would take setuptools' own distutils away from
    all that comes after, torch's compiler among it."""
    return any(importlib.metadata.distributions(name=package))


needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs the extra 'runtime'"
)
needs_builder = pytest.mark.skipif(
    not (is_installed("setuptools") and is_installed("pip")),
    reason="building without a network needs setuptools and pip here",
)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree, so that building leaves nothing behind; its name is no identifier."""
    copy = tmp_path_factory.mktemp("source") / "my-checkout"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=LEFT_OUT)
    return copy


def environment(folder: Path) -> Path:
    """The Python of a new virtual environment that sees our packages but not our own install."""
    venv.create(folder, with_pip=False, symlinks=True)
    scheme = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", "venv", scheme))
    seen = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "outer.pth").write_text("\n".join(sorted(seen)) + "\n")
    return folder / "bin" / "python"


def call(
    *args: object, cwd: Path, python: object = sys.executable, path: object = ""
) -> subprocess.CompletedProcess[str]:
    """Run Python without our own PYTHONPATH; fails with its output."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    env = {**kept, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [str(python), *map(str, args)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def pip_install(python: Path, *args: object, cwd: Path) -> None:
    offline = ("--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", "--quiet")
    call("-m", "pip", "install", *offline, *args, cwd=cwd, python=python)


@needs_builder
def test_wheel(checkout: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "env")
    flags = ("--no-deps", "--no-index", "--no-build-isolation", "--quiet", "-w", tmp_path / "dist")
    call("-m", "pip", "wheel", *flags, checkout, cwd=tmp_path)
    (wheel,) = (tmp_path / "dist").glob("cachetune-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "cachetune/kernels/__init__.py" not in names
    for folder in FLOORS:
        here = {f"cachetune/{folder}/{p.name}" for p in (checkout / folder).glob("*.py")}
        assert here <= names
    shipped = [*checkout.glob("calibration/text/*.json"), *checkout.glob("calibration/toy/*.*")]
    assert {f"cachetune/{p.relative_to(checkout).as_posix()}" for p in shipped} <= names
    assert not any(n.startswith(("cachetune/tests", "cachetune/results", "tests")) for n in names)
    pip_install(python, wheel, cwd=tmp_path)
    found = call("-c", WHERE, cwd=tmp_path, python=python).stdout
    assert str(tmp_path / "env") in found
    script = call(tmp_path / "env" / "bin" / "cachetune", "--version", cwd=tmp_path, python=python)
    assert script.stdout.strip()


@needs_builder
def test_editable(checkout: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "env")
    pip_install(python, "-e", checkout, cwd=tmp_path)
    for cwd in (checkout, tmp_path):
        found = call("-c", WHERE, cwd=cwd, python=python).stdout.strip()
        assert found == str(checkout / "__init__.py")
        call("-m", "cachetune", "schema", "plan", cwd=cwd, python=python)
    if importlib.util.find_spec("torch"):
        call("-c", "import cachetune.kernels.reference", cwd=tmp_path, python=python)


def test_no_install(checkout: Path, tmp_path: Path) -> None:
    for cwd, path in ((checkout, ".typing"), (tmp_path, checkout / ".typing")):
        assert call("-c", WHERE, cwd=cwd, path=path).stdout.strip().endswith("__init__.py")
        call("-m", "cachetune", "schema", "workload", cwd=cwd, path=path)


def stand_in_for_kernels(folder: Path) -> None:
    """A distribution of the name and version that transformers looks for."""
    from transformers.utils import import_utils

    version = getattr(import_utils, "KERNELS_MIN_VERSION", "0.17.0")
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text(f"__version__ = {version!r}\n{KERNELS}")
    info = folder / f"kernels-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")


@needs_transformers
@pytest.mark.parametrize("present", [False, True])
def test_transformers_from_the_root(checkout: Path, tmp_path: Path, present: bool) -> None:
    """From the root, `kernels` on sys.path is our folder; it must not pass for Hugging Face's."""
    if present:
        stand_in_for_kernels(tmp_path)
    elif any(d.name == "kernels" for d in importlib.metadata.distributions()):
        pytest.skip("kernels is installed here")
    code = (
        "import sys; assert sys.path[0] == ''\n"
        "import transformers, transformers.integrations.hub_kernels\n"
        "from transformers import LlamaForCausalLM\n"
        "from transformers.utils.import_utils import is_kernels_available\n"
        "import kernels; print(is_kernels_available(), kernels.__file__)\n"
    )
    out = call("-c", code, cwd=checkout, path=tmp_path if present else "").stdout.split()
    found = str(tmp_path / "kernels" / "__init__.py") if present else "None"
    assert out == [str(present), found]


def test_base_install_loads(checkout: Path, tmp_path: Path) -> None:
    """Every module of the floors without torch, but for the training scripts."""
    modules = []
    for folder in ("core", "simulator", "calibration", "tuner", "cli"):
        names = sorted(p.stem for p in (checkout / folder).glob("*.py"))
        modules += [f"cachetune.{folder}.{n}" for n in names if not n.startswith(("train_", "__"))]
    code = f"{FORBID}\nimport importlib\nfor m in {modules}: importlib.import_module(m)\n"
    call("-c", code, cwd=tmp_path, path=checkout / ".typing")


def test_base_install_simulates(checkout: Path, tmp_path: Path) -> None:
    make_profile().write(tmp_path / "profile.json")
    for args in (
        ["schema", "profile"],
        ["simulate", "--profile", "profile.json", "--requests", "5", "--trace", "trace.json"],
    ):
        code = f"{FORBID}\nfrom cachetune.cli.main import main\nmain({args!r})\n"
        assert call("-c", code, cwd=tmp_path, path=checkout / ".typing").stdout
    assert (tmp_path / "trace.json").stat().st_size


def test_tests_run_in_a_folder_of_any_name(tmp_path: Path) -> None:
    """pytest would import the root's `__init__.py` by the name of its folder."""
    root = tmp_path / "cache-tune"
    (root / "tests").mkdir(parents=True)
    for name in ("__init__.py", "pyproject.toml", "tests/conftest.py"):
        shutil.copy(ROOT / name, root / name)
    (root / "tests" / "test_one.py").write_text("def test_one():\n    assert True\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"],
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-800:]
