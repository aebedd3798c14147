"""Cores of streams: compute keeps to its own, and restores keep off them.

Left alone, Linux now and then wakes the thread of a restore on the core that computes, where it
waits 3 to 5 ms for its turn: longer than most restores take. So the compute stream of each CPU
device is bound to cores of its own, out of those that the process may use (`taskset` chooses
them), and restores to the others. A core is claimed by a lock that ends with the process: two
runtimes on one machine never compute on the same one. Where too few cores are left, and on
systems that bind no threads, nothing is bound.
"""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path

from ..core.ops import COMPUTE, RESTORE

try:
    import fcntl
except ImportError:  # not on Windows; neither is sched_setaffinity
    fcntl = None  # type: ignore[assignment]

_guard = threading.Lock()
_claims: dict[int, int] = {}
"""By core, the descriptor whose lock claims it; kept until the process ends."""


def bind(stream: str, device: int, n_threads: int) -> None:
    """Bind the calling thread, which works for `stream` of CPU device `device`.

    Args:
        n_threads: with which each device computes.
    """
    if stream not in (COMPUTE, RESTORE) or not hasattr(os, "sched_setaffinity"):
        return
    usable = os.sched_getaffinity(os.getpid())
    taken = claim((device + 1) * n_threads, usable)
    if taken:
        own = taken[device * n_threads :][:n_threads]
        os.sched_setaffinity(0, own if stream == COMPUTE else usable - set(own))


def claim(n: int, usable: set[int], folder: str | None = None) -> list[int]:
    """The first `n` cores of `usable` that no other process has; empty unless one more is left."""
    with _guard:
        mine = [c for c in _claims if c in usable]
        for core in sorted(usable - set(mine)):
            if len(mine) == n or len(usable) <= n or fcntl is None:
                break
            try:
                lock = os.open(_path(core, folder), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except OSError:
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(lock)
                continue
            _claims[core] = lock
            mine.append(core)
    return mine[:n] if len(mine) >= n and len(usable) > n else []


def _path(core: int, folder: str | None) -> Path:
    return Path(folder or tempfile.gettempdir()) / f"cachetune-core-{core}.lock"
