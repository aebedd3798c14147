"""Where chunk bytes are: the device, RAM, files or another machine, fast or acting as slower."""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, Self, get_args

import numpy as np

from ..core.errors import CapacityError, StoreError
from ..core.eviction import EvictionName, Evictor
from ..core.layout import ALIGN_BYTES
from .rate_limit import RateLimiter
from .remote import RemoteMedium, open_remote

log = logging.getLogger(__name__)

MIN_BUFFER_BYTES = 64 << 10
POOL_BYTES_PER_SIZE = 128 << 20
MIN_FREE_PER_SIZE = 4

Medium = Literal["device", "dram", "file", "remote"]
DEMOTIONS = (("device", "dram"), ("device", "file"), ("dram", "file"))
"""From which medium to which an evicted chunk may go on."""

HostPages = Callable[[int], Any]
"""Makes a buffer of that many bytes, whole pages."""


@dataclass(frozen=True)
class HostMemory:
    """Host memory that a device can be filled from."""

    staging: HostPages
    """Of reads."""
    lasting: HostPages
    """Of chunks in RAM: what lies there need not be staged."""


@dataclass(frozen=True)
class TierConfig:
    """One place to read chunks from.

    With `limit_bytes_per_s` the medium acts as a slower one: its workers share a link of that
    rate, and every request also takes `read_latency_s`. Without it, no latency is added.
    `capacity_bytes` counts blobs (`core.layout.chunk_bytes`), headers left out; None is unbounded.
    A dram or device tier's capacity holds in each process that has the store open. A device tier
    keeps chunks where the model computes (device_chunks.py); its capacity is that of all pipeline
    stages together, and as nothing is moved on a read, it takes no limit; unbounded, it takes
    chunks until the device has no memory left (CapacityError). `url` says where a remote
    tier lies (remote.py); it may hold a password, so it is never printed. What a device or dram
    tier evicts goes on in the tier `demote_to`, if one is named: a file tier, whose bytes are on
    disk already, or from a device a dram tier.
    """

    name: str
    medium: Medium
    limit_bytes_per_s: float | None = None
    capacity_bytes: int | None = None
    read_latency_s: float = 0.0
    url: str = field(default="", repr=False)
    eviction: EvictionName = "lru"
    demote_to: str | None = None

    def __post_init__(self) -> None:
        rate = self.limit_bytes_per_s
        if (
            self.medium not in get_args(Medium)
            or (rate is not None and not rate > 0)
            or (self.capacity_bytes is not None and self.capacity_bytes < 0)
            or not self.read_latency_s >= 0
            or (self.medium == "remote") != bool(self.url)
        ):
            raise StoreError(
                "a tier must be device, dram, file or, with a URL, remote, its limit above 0, "
                "capacity and latency not below 0",
                values=repr(self),
                remedy="correct the value, or leave it out",
            )
        if self.medium == "device" and (rate is not None or self.read_latency_s):
            raise StoreError(
                "a device tier takes no limit and no latency, as nothing is moved on a read",
                values=repr(self),
                remedy="limit a dram tier instead",
            )

    @property
    def terms(self) -> str:
        """What processes that share a store must agree on."""
        below = f", then {self.demote_to}" if self.demote_to else ""
        return f"{self.medium}, capacity {self.capacity_bytes}, {self.eviction}{below}"


def check_tiers(configs: Sequence[TierConfig]) -> None:
    """Refuse tiers that do not fit together.

    Raises:
        StoreError: none, a name that comes twice, or a demotion to a medium that is not slower.
    """
    by_name = {config.name: config for config in configs}
    if not configs or len(by_name) != len(configs):
        raise StoreError(
            "a store needs one tier or more, each with its own name",
            values=f"{[config.name for config in configs]}",
            remedy="name each tier once",
        )
    for config in configs:
        below = by_name.get(config.demote_to or config.name)
        moves = config.demote_to is not None
        if below is None or (moves and (config.medium, below.medium) not in DEMOTIONS):
            raise StoreError(
                "demote_to must name a file tier, or for a device tier a dram tier, and be set "
                "for device and dram tiers only",
                values=f"tier '{config.name}' ({config.medium}) to {config.demote_to!r}",
                remedy="name such a tier of this store, or leave it out",
            )


class StoreTier:
    """A tier of an open store: its configuration, its link and how full it is."""

    def __init__(self, config: TierConfig, files: FileMedium) -> None:
        self.config = config
        self.name = config.name
        self.limiter: RateLimiter | None = None
        if config.limit_bytes_per_s is not None:
            self.limiter = RateLimiter(config.limit_bytes_per_s, config.read_latency_s)
        self.evictor = Evictor(config.eviction)
        self.remote: RemoteMedium | None = None
        if config.medium == "remote":
            self.remote = open_remote(config.url)
        self.used_bytes = 0
        """Bytes kept and bytes promised to writers; the store changes it under its lock."""
        self._files = files

    @property
    def is_dram(self) -> bool:
        """True when chunks are served from RAM."""
        return self.config.medium == "dram"

    @property
    def is_device(self) -> bool:
        """True when chunks are served from where they lie on the device."""
        return self.config.medium == "device"

    @property
    def unbuffered(self) -> bool | None:
        """For files: whether reads bypass the page cache. None for other media."""
        return self._files.unbuffered if self.config.medium == "file" else None

    @property
    def overfull(self) -> bool:
        """True when more is kept than the capacity, which must never be seen."""
        capacity = self.config.capacity_bytes
        return capacity is not None and self.used_bytes > capacity

    def can_hold(self, n_bytes: int) -> bool:
        """Whether `n_bytes` could be kept if the tier were empty."""
        capacity = self.config.capacity_bytes
        return capacity is None or n_bytes <= capacity

    def fits(self, n_bytes: int) -> bool:
        """Whether `n_bytes` more can be kept now.

        Raises:
            CapacityError: they could not be kept even if the tier were empty.
        """
        capacity = self.config.capacity_bytes
        if capacity is None:
            return True
        if n_bytes > capacity:
            raise CapacityError(
                f"a chunk must fit into its tier '{self.name}'",
                values=f"{n_bytes} bytes for a capacity of {capacity}",
                remedy="raise capacity_bytes, or use smaller chunks",
            )
        return self.used_bytes + n_bytes <= capacity


class BufferPool:
    """Page-aligned staging buffers, used again so that their pages are faulted in once.

    A buffer is lent as an array; it comes back by itself when the array and all tensors over it
    are gone, so a view can never see the bytes of a later read. `pages` makes a buffer of whole
    pages, as a device wants them.
    """

    def __init__(self, pages: HostPages | None = None) -> None:
        self._pages = pages or (lambda size: mmap.mmap(-1, size))
        self._free: dict[int, deque[Any]] = {}
        self._lent: dict[int, _Loan] = {}

    def lend(self, n_bytes: int) -> np.ndarray:
        """A uint8 array of at least `n_bytes`, contents undefined."""
        size = max(MIN_BUFFER_BYTES, 1 << (n_bytes - 1).bit_length())
        free = self._free.get(size)
        if free is None:
            keep = max(MIN_FREE_PER_SIZE, POOL_BYTES_PER_SIZE // size)
            free = self._free.setdefault(size, deque(maxlen=keep))
        try:
            pages = free.pop()
        except IndexError:
            pages = self._pages(size)
        # Over a memoryview: views of an array over an array would keep only the innermost one
        # alive, and the lent one would die before them.
        array = np.frombuffer(memoryview(pages), dtype=np.uint8)
        loan = _Loan(array, self._take_back)
        loan.pages, loan.size = pages, size
        self._lent[id(loan)] = loan
        return array

    def _take_back(self, loan: _Loan) -> None:
        # Runs wherever the last view dies, lock or not: only atomic calls. A full deque drops
        # the oldest buffer.
        self._lent.pop(id(loan), None)
        self._free[loan.size].append(loan.pages)


class _Loan(weakref.ref):  # type: ignore[type-arg]
    __slots__ = ("pages", "size")

    pages: Any
    size: int

    def __new__(cls, array: np.ndarray, take_back: Callable[[_Loan], None]) -> Self:
        return super().__new__(cls, array, take_back)


class Source(Protocol):
    """An open chunk to read blobs from. `at_byte` counts from the first blob."""

    def announce(self, ranges: Sequence[tuple[int, int]]) -> None:
        """(at_byte, n_bytes) of each `read_into` to come, in order; local media need no notice."""

    def read_into(self, out: memoryview, at_byte: int) -> int:
        """Fill `out`; returns the bytes there were, fewer at the end of the chunk."""

    def close(self) -> None:
        """Let go of the file, if there is one."""


class RamSource:
    """A chunk that lies in RAM: uint8 [chunk bytes]."""

    def __init__(self, blobs: np.ndarray) -> None:
        self.blobs = blobs

    def announce(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Nothing is asked ahead."""

    def read_into(self, out: memoryview, at_byte: int) -> int:
        """Copy; the interpreter lock is free meanwhile."""
        part = self.blobs[at_byte : at_byte + len(out)]
        np.copyto(np.frombuffer(out, dtype=np.uint8)[: part.size], part)
        return int(part.size)

    def close(self) -> None:
        """Nothing to let go of."""


class InPlace:
    """Bytes that lie where they are read from already: only to be verified."""

    def announce(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Nothing is asked ahead."""

    def read_into(self, out: memoryview, at_byte: int) -> int:
        """All of them are there."""
        return len(out)

    def close(self) -> None:
        """Nothing to let go of."""


class FileSource:
    """A chunk file, read past the page cache where that works."""

    def __init__(self, medium: FileMedium, path: str, blobs_at: int) -> None:
        self._medium = medium
        self._path = path
        self._blobs_at = blobs_at
        self._open()

    def announce(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Nothing is asked ahead."""

    def _open(self) -> None:
        self._fd, self._direct = self._medium.open(self._path)

    def read_into(self, out: memoryview, at_byte: int) -> int:
        """Read; a medium that refuses O_DIRECT on its first read is read buffered from then on."""
        offset = self._blobs_at + at_byte
        try:
            done = os.preadv(self._fd, [out], offset)
        except OSError as e:
            if e.errno != errno.EINVAL or not self._direct:
                raise
            self._medium.fall_back(os.strerror(e.errno))
            self.close()
            self._open()
            done = os.preadv(self._fd, [out], offset)
        # A short read is the end of the file or, rarely, only short: ask again, whole sectors on.
        while 0 < done < len(out) and done % ALIGN_BYTES == 0:
            more = os.preadv(self._fd, [out[done:]], offset + done)
            if more == 0:
                break
            done += more
        return done

    def close(self) -> None:
        """Close the file."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class FileMedium:
    """The chunk files' folder: probes O_DIRECT once and opens files for reading."""

    def __init__(self, folder: Path) -> None:
        self.unbuffered = False
        self._lock = threading.Lock()
        why = _probe_direct(folder)
        if why is None:
            self.unbuffered = True
        else:
            self._warn(str(folder), why)

    def open(self, path: str) -> tuple[int, bool]:
        """A file descriptor, which the caller closes, and whether it bypasses the page cache."""
        if self.unbuffered:
            try:
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT), True
            except OSError as e:
                if e.errno != errno.EINVAL:
                    raise
                self.fall_back(os.strerror(e.errno))
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC), False

    def fall_back(self, why: str) -> None:
        """Read through the page cache from now on; says so once."""
        with self._lock:
            if not self.unbuffered:
                return
            self.unbuffered = False
        self._warn("the chunk store", why)

    @staticmethod
    def _warn(where: str, why: str) -> None:
        log.warning(
            "reads of %s go through the page cache (no O_DIRECT: %s); "
            "file tiers look as fast as memory",
            where,
            why,
        )


def _probe_direct(folder: Path) -> str | None:
    """None when O_DIRECT reads work in `folder`, else why not.

    Raises:
        OSError: the folder cannot be written to.
    """
    if not hasattr(os, "O_DIRECT"):
        return "unknown to this system"
    fd, path = tempfile.mkstemp(dir=folder, prefix=".probe-", suffix=".tmp")
    try:
        os.write(fd, bytes(ALIGN_BYTES))
        page = mmap.mmap(-1, ALIGN_BYTES)
        try:
            direct = os.open(path, os.O_RDONLY | os.O_DIRECT)
        except OSError as e:
            return e.strerror
        try:
            os.preadv(direct, [page], 0)
        except OSError as e:
            return e.strerror
        finally:
            os.close(direct)
    finally:
        os.close(fd)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    return None
