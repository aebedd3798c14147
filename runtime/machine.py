"""What machine this is: the device whose fingerprint profiles and plans carry."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import subprocess
import sys
from pathlib import Path

from ..core.hardware import Device, Provenance

FLOORS = ("core", "kernels", "simulator", "runtime", "calibration", "tuner", "cli")


def device_here(compute_threads: int = 1, device: str = "cpu") -> Device:
    """The CPU of this machine, or its GPU called `device`, as a device.

    A GPU's cores are its multiprocessors.
    """
    if device != "cpu":
        import torch

        gpu = torch.cuda.get_device_properties(torch.device(device))
        return Device(
            name=gpu.name,
            kind="cuda",
            n_cores=gpu.multi_processor_count,
            memory_bytes=(gpu.total_memory >> 30) << 30,
            compute_threads=compute_threads,
        )
    return Device(
        name=_cpu_name(),
        kind="cpu",
        n_cores=len(os.sched_getaffinity(0)),
        # Whole GiB: the kernel's own share varies a little from boot to boot.
        memory_bytes=(_memory_bytes() >> 30) << 30,
        compute_threads=compute_threads,
    )


def provenance_here(seed: int, command: str | None = None) -> Provenance:
    """Command, commit, machine, versions and date of this run."""
    return Provenance(
        command=command or "cachetune " + " ".join(sys.argv[1:]),
        commit=_commit(),
        machine=f"{_cpu_name()}, {len(os.sched_getaffinity(0))} cores",
        versions=_versions(),
        date=datetime.date.today().isoformat(),
        seed=seed,
    )


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def source_id(root: Path) -> str:
    """What stands for the commit where there is no git, as of a copy without its history: `source-`
    and a hash of the package's modules in `root`, names and contents."""
    digest = hashlib.sha256()
    for path in sorted(p for floor in FLOORS for p in (root / floor).glob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return f"source-{digest.hexdigest()[:12]}"


def _commit() -> str:
    """Short hash; `-dirty` when code differs from it (results a run writes do not count)."""
    root = Path(__file__).resolve().parent.parent
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root:  # none, or of a project that we are installed in
        return source_id(root)
    commit = _git(root, "rev-parse", "--short=12", "HEAD")
    changed = _git(root, "status", "--porcelain", "-uno", "--", ".", ":!results")
    if commit is None or changed is None:
        return source_id(root)
    return f"{commit}-dirty" if changed else commit


def _git(root: Path, *args: str) -> str | None:
    command = ["git", "-C", str(root), *args]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("torch", "triton", "transformers", "numpy", "simpy", "optuna"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
