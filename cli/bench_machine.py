"""What the benchmarks of a device share: which one, and what it is called."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..core.hardware import HardwareProfile
    from ..core.model_spec import Stored
    from ..runtime.chunk_store import ChunkStore
    from ..runtime.loaded_model import LoadedModel
    from ..runtime.runner import Runner
    from ..runtime.tiers import Medium, TierConfig


def pick_device(device: str) -> str:
    """`cuda` or `cpu`.

    Raises:
        CacheTuneError: neither, or cuda where there is none.
    """
    import torch

    from ..core.errors import CacheTuneError

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise CacheTuneError(
            "--device must be cpu, cuda or auto, and there",
            values=f"{device}, CUDA available: {torch.cuda.is_available()}",
            remedy="leave it out, or run where there is a GPU",
        )
    return device


def checked_device(device: str, profile: HardwareProfile | None = None) -> str:
    """`cpu`, `cuda` or `cuda:<i>`; empty for the kind that the profile was measured on.

    Raises:
        CacheTuneError: another name, not there, or not of the profile's kind.
    """
    from ..core.errors import ProfileError
    from ..runtime.device import open_device

    name = device or (profile.device.kind if profile is not None else "cpu")
    kind = open_device(name).kind
    if profile is not None and kind != profile.device.kind:
        raise ProfileError(
            "--device must be of the kind that the profile was measured on",
            values=f"{name}, profile of {profile.device.kind} ({profile.device.name})",
            remedy=f"calibrate with --device {name}, or leave --device out",
        )
    return name


def load_on(
    model: str, device: str, dtype: str, seed: int = 0, stored: Stored = "native"
) -> LoadedModel:
    """A model in that dtype, its chunks kept as `stored`; random weights are drawn on the device.

    Raises:
        CacheTuneError: no such model, dtype or format.
    """
    import torch

    from ..runtime.loaded_model import load_model

    with torch.device(device):
        return load_model(model, dtype, seed).stored_as(stored)


def device_name(device: str) -> str:
    """As the driver or the kernel names it."""
    import torch

    from ..runtime.machine import device_here

    return (
        torch.cuda.get_device_name(torch.device(device)) if device != "cpu" else device_here().name
    )


def results_folder(device: str) -> Path:
    """Where results of this device are kept: `results/cpu`, or by the GPU's name."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()) if device == "cuda" else "cpu"
    return Path("results") / name.strip("-")


@contextmanager
def tier_of(name: str) -> Iterator[TierConfig]:
    """The tier of that name: `device`, `dram`, `file`, `file-cached` or `redis`, with a server of
    its own.

    Raises:
        CacheTuneError: there is no Redis or Valkey server here.
    """
    from ..calibration.redis_rates import RedisServer
    from ..core.errors import CacheTuneError
    from ..runtime.tiers import TierConfig

    if name != "redis":
        medium: Medium = "file"
        if name in ("device", "dram"):
            medium = name  # type: ignore[assignment]
        yield TierConfig(name, medium)
        return
    server = RedisServer.start()
    if server is None:
        raise CacheTuneError(
            "the tier redis needs a server",
            values="neither redis-server nor valkey-server is installed",
            remedy="install one of them, or leave the tier out",
        )
    with server:
        yield TierConfig(name, "remote", url=f"redis://127.0.0.1:{server.port}?timeout_s=20")


def load(model: str, device: str, seed: int = 0) -> LoadedModel:
    """A model on the device, in the dtype that it computes in: float32 or bfloat16.

    Random weights are drawn on the device itself.
    """
    return load_on(model, device, "bfloat16" if device == "cuda" else "float32", seed)


def runner(
    loaded: LoadedModel,
    folder: str,
    tiers: Sequence[TierConfig],
    device: str,
    threads: int,
    **more: Any,
) -> Runner:
    """A runner on the device; the tier `file-cached` reads through the page cache."""
    from ..runtime.runner import Runner

    made = Runner(loaded, folder, tiers, compute_threads=threads, device=device, **more)
    if any(t.name == "file-cached" for t in tiers):
        read_buffered(made.store, "file-cached")
    return made


def read_buffered(store: ChunkStore, tier: str) -> None:
    """Have a store's files read through the page cache: the warm storage that others measure."""
    # Nobody who wants true figures asks for this, so the store has no public way to it.
    store.tiers[tier]._files.fall_back("asked for")


def provenance(seed: int, device: str) -> dict[str, Any]:
    """Of this run, the GPU named first where there is one."""
    from ..runtime.machine import provenance_here

    found = provenance_here(seed).model_dump(mode="json")
    if device != "cpu":
        found["machine"] = f"{device_name(device)}; {found['machine']}"
    return found
