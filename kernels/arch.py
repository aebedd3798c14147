"""Which GPU a launch is shaped for: the one present, or the one a compile check assumes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch

DEFAULT_ARCH = 90
DEFAULT_PROCESSORS = 132
_assumed: ContextVar[int | None] = ContextVar("assumed_arch", default=None)


def current_arch() -> int:
    """Compute capability times ten (80, 90, 100); 90 where there is no GPU."""
    assumed = _assumed.get()
    return assumed if assumed is not None else _device()[0]


def processors() -> int:
    """Streaming multiprocessors of the GPU; an H200's 132 where there is none."""
    return _device()[1]


@contextmanager
def assuming(arch: int) -> Iterator[None]:
    """Within the block launches are shaped for ``sm_<arch>``."""
    token = _assumed.set(arch)
    try:
        yield
    finally:
        _assumed.reset(token)


@cache
def _device() -> tuple[int, int]:
    if not torch.cuda.is_available():
        return DEFAULT_ARCH, DEFAULT_PROCESSORS
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor, torch.cuda.get_device_properties(0).multi_processor_count
