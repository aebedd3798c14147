"""`--device`: taken by the commands of the loop, refused in one line where there is no such GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="devices are torch's")

from cachetune.runtime.loaded_model import load_model  # noqa: E402
from cachetune.runtime.machine import device_here  # noqa: E402
from support import make_profile  # noqa: E402

from .file_cases import Run  # noqa: E402


def commands(folder: Path) -> dict[str, tuple[object, ...]]:
    """The commands of the loop; nothing of it exists but the profile."""
    profile = folder / "profile.json"
    model = ("--model", "llama-tiny")
    return {
        "calibrate": ("calibrate", *model, "--out", folder / "new.json"),
        "tune": ("tune", "--profile", profile, "--tier", "dram", "--out", folder / "plan.json"),
        "grid": ("bench", "grid", *model, "--profile", profile, "--out", folder / "grid"),
        "demo": ("demo", *model, "--out", folder / "demo"),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny = load_model("llama-tiny")
    profile = make_profile(model=tiny.spec)
    profile = profile.replace(device=device_here(1), model_fingerprint=tiny.fingerprint)
    profile.write(tmp_path / "profile.json")
    return tmp_path


@pytest.mark.parametrize("name", ["calibrate", "tune", "grid", "demo"])
@pytest.mark.parametrize("device", ["cuda:99", "tpu"])
def test_a_device_that_is_not_there(run: Run, folder: Path, name: str, device: str) -> None:
    before = sorted(folder.rglob("*"))
    status, out, err = run(*commands(folder)[name], "--device", device)
    said = [text for text in err.splitlines() if text.startswith("cachetune: ")]
    assert status == 2 and not out and len(said) == 1
    assert "--device must be cpu, cuda or cuda:<i>" in said[0] and device in said[0]
    assert sorted(folder.rglob("*")) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_profile_of_a_gpu_needs_one(run: Run, folder: Path) -> None:
    from cachetune.core.hardware import HardwareProfile

    path = folder / "profile.json"
    profile = HardwareProfile.read(path)
    gpu = profile.device.replace(kind="cuda", name="some GPU")
    profile.replace(device=gpu).write(path)
    status, _, err = run(*commands(folder)["grid"])
    assert status == 2 and "--device must be cpu, cuda" in err
    status, _, err = run(*commands(folder)["grid"], "--device", "cpu")
    assert status == 2 and "must be of the kind that the profile was measured on" in err
