"""What this machine can do at most, measured in the run that quotes it; never from a data sheet.

Random data, rotating buffers, the median of at least 20 repeats with its quartiles. Every figure of
a benchmark stands beside one of these. Names: `device_copy` (bytes read plus bytes written),
`matmul`, `h2d`, `d2h`, `h2d_d2h` (both ways at once), `h2d_sm` (processors read across the link),
`disk` (O_DIRECT, no file system cache of this system), `loopback` (one TCP stream).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import StoreError
from ..core.units import MIB

if TYPE_CHECKING:
    from ..kernels.stopwatch import Spread

DISK_WORKERS = 8
DISK_REQUEST_BYTES = MIB
DISK_FILE_BYTES = 256 * MIB
DISK_SAMPLE_BYTES = 64 * MIB
LOOPBACK_BYTES = 64 * MIB
SM_PROGRAMS = (12, 16, 32)


@dataclass(frozen=True)
class Ceiling:
    """One limit: rate per second, median and quartiles of `n` repeats."""

    name: str
    rate: float
    low: float
    high: float
    unit: str
    n: int
    how: str

    @staticmethod
    def of(name: str, work: float, unit: str, took: Spread, how: str) -> Ceiling:
        """`work` units were done in the times of `took`."""
        return Ceiling(
            name, work / took.median, work / took.high, work / took.low, unit, took.n, how
        )


@dataclass(frozen=True)
class Sizes:
    """How much is moved and multiplied; smaller in tests."""

    copy_bytes: int
    matmul: int
    disk_file_bytes: int = DISK_FILE_BYTES
    disk_sample_bytes: int = DISK_SAMPLE_BYTES
    loopback_bytes: int = LOOPBACK_BYTES

    @staticmethod
    def for_device(device: str) -> Sizes:
        """Seconds on a GPU as on two cores of a CPU."""
        return Sizes(1 << 30, 8192) if device.startswith("cuda") else Sizes(64 * MIB, 1024)


def measure(
    device: str,
    folder: Path | None = None,
    *,
    dtype: str = "",
    threads: int = 1,
    sizes: Sizes | None = None,
) -> dict[str, Ceiling]:
    """All limits of `device` that there are, by name.

    Args:
        device: ``cpu`` or ``cuda``.
        folder: on the disk to measure; None leaves the disk out.
        dtype: of the matmul; bfloat16 on a GPU and float32 on a CPU by default.
        threads: of a CPU's copy and matmul; as many as a compute op gets.
    """
    import torch

    size = sizes or Sizes.for_device(device)
    kind = dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = [device_copy(device, size), matmul(device, kind, size)]
    finally:
        torch.set_num_threads(before)
    if device.startswith("cuda"):
        found += host_link(device, size)
    if folder is not None:
        disk = disk_ceiling(folder, size)
        found += [disk] if disk is not None else []
    found.append(loopback(size))
    return {c.name: c for c in found}


def as_json(ceilings: Mapping[str, Ceiling]) -> dict[str, Any]:
    """For a result file."""
    return {name: asdict(c) for name, c in ceilings.items()}


def as_rows(ceilings: Mapping[str, Ceiling]) -> list[dict[str, Any]]:
    """For a table, in GB/s or Gflop/s."""
    return [
        {
            "ceiling": c.name,
            "median": c.rate / 1e9,
            "q25": c.low / 1e9,
            "q75": c.high / 1e9,
            "unit": "G" + c.unit,
            "n": c.n,
            "how": c.how,
        }
        for c in ceilings.values()
    ]


COLUMNS = ("ceiling", "median", "q25", "q75", "unit", "n", "how")


def device_copy(device: str, size: Sizes) -> Ceiling:
    """A large copy within the device's memory."""
    import torch

    from ..kernels.stopwatch import seconds_of

    pairs = []
    for _ in range(2):
        source = torch.randint(0, 255, (size.copy_bytes,), dtype=torch.uint8, device=device)
        pairs.append((source, torch.zeros_like(source)))
    took = seconds_of([partial(target.copy_, source) for source, target in pairs], device)
    how = f"copy of {size.copy_bytes >> 20} MiB, bytes read and written"
    return Ceiling.of("device_copy", 2 * size.copy_bytes, "B/s", took, how)


def matmul(device: str, dtype: str, size: Sizes) -> Ceiling:
    """A square product of random matrices."""
    import torch

    from ..kernels.stopwatch import seconds_of

    n, kind = size.matmul, getattr(torch, dtype)
    pairs = [[torch.randn(n, n, device=device).to(kind) for _ in range(2)] for _ in range(3)]
    took = seconds_of([partial(torch.matmul, a, b) for a, b in pairs], device)
    return Ceiling.of("matmul", 2 * n**3, "flop/s", took, f"{n} x {n} x {n} {dtype}, random")


def host_link(device: str, size: Sizes) -> list[Ceiling]:
    """Pinned memory to the GPU, back, both at once, and read by the GPU's own processors."""
    import torch

    from ..kernels.stopwatch import seconds_of

    n = size.copy_bytes
    # Drawn there: a core takes seconds for a GiB of random bytes.
    here = [torch.randint(0, 255, (n,), dtype=torch.uint8, device=device) for _ in range(2)]
    host = [torch.empty(n, dtype=torch.uint8, pin_memory=True).copy_(x) for x in here]
    side = torch.cuda.Stream()

    def down() -> None:
        here[0].copy_(host[0], non_blocking=True)

    def up() -> None:
        host[1].copy_(here[1], non_blocking=True)

    def both() -> None:
        main = torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            up()
        down()
        main.wait_stream(side)

    how = f"pinned, {n >> 20} MiB, copy engine"
    found = [
        Ceiling.of("h2d", n, "B/s", seconds_of([down], device), how),
        Ceiling.of("d2h", n, "B/s", seconds_of([up], device), how),
        Ceiling.of("h2d_d2h", 2 * n, "B/s", seconds_of([both], device), how + ", both ways"),
    ]
    from ..kernels.gather_host import gather_host

    rows = torch.randperm(n // MIB)
    table, out = host[0].view(-1, MIB), here[0].view(-1, MIB)
    by_sm = []
    for programs in SM_PROGRAMS:
        took = seconds_of([partial(gather_host, table, rows, out, "kernel", programs)], device)
        by_sm.append(Ceiling.of("h2d_sm", n, "B/s", took, f"{programs} programs, 1-MiB rows"))
    return [*found, max(by_sm, key=lambda c: c.rate)]


def disk_ceiling(folder: Path, size: Sizes) -> Ceiling | None:
    """Raw O_DIRECT reads of 1 MiB by eight threads; None where O_DIRECT is not to be had.

    A disk of a virtual machine has its host's cache behind it, which a guest can neither see nor
    empty: this is what reads reach, not what the medium does.
    """
    from ..kernels.stopwatch import Spread

    with random_file(folder, size.disk_file_bytes) as path:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        except (OSError, AttributeError):
            return None
        starts = range(0, size.disk_file_bytes, DISK_REQUEST_BYTES)
        per_sample = max(1, size.disk_sample_bytes // DISK_REQUEST_BYTES)
        try:
            times = list(_disk_samples(fd, list(starts), per_sample))
        except OSError:
            return None
        finally:
            os.close(fd)
    how = f"O_DIRECT, {DISK_WORKERS} threads, 1-MiB reads"
    work = min(per_sample, len(starts)) * DISK_REQUEST_BYTES
    return Ceiling.of("disk", work, "B/s", Spread.of(times[1:]), how)


def _disk_samples(fd: int, starts: list[int], per_sample: int) -> Iterator[float]:
    buffers = threading.local()

    def read(start: int) -> None:
        if not hasattr(buffers, "pages"):
            buffers.pages = mmap.mmap(-1, DISK_REQUEST_BYTES)
        if os.preadv(fd, [buffers.pages], start) != DISK_REQUEST_BYTES:
            raise OSError("short read")

    with ThreadPoolExecutor(DISK_WORKERS) as pool:
        at = 0
        for _ in range(21):
            taken = [starts[(at + i) % len(starts)] for i in range(min(per_sample, len(starts)))]
            at += len(taken)
            began = time.perf_counter()
            list(pool.map(read, taken))
            yield time.perf_counter() - began


@contextlib.contextmanager
def random_file(folder: Path, n_bytes: int) -> Iterator[Path]:
    """A file of random bytes on the disk, written through; removed at the end.

    Raises:
        StoreError: no space or no permission.
    """
    import numpy as np

    path = folder / f".ceiling-{os.getpid()}.bin"
    draw = np.random.default_rng(0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for start in range(0, n_bytes, 16 * MIB):
                file.write(draw.bytes(min(16 * MIB, n_bytes - start)))
            file.flush()
            os.fsync(file.fileno())
    except OSError as e:
        with contextlib.suppress(OSError):
            path.unlink()
        raise StoreError(
            "measuring the disk needs room for a file",
            values=f"{folder}: {e.strerror or e}",
            remedy="free space, or name another folder",
        ) from None
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def loopback(size: Sizes) -> Ceiling:
    """One TCP stream within this machine: what a server next to us could deliver at most."""
    from ..kernels.stopwatch import seconds_of

    data = os.urandom(size.loopback_bytes)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def feed() -> None:
            link, _ = server.accept()
            with link, contextlib.suppress(OSError):
                while link.recv(1):
                    link.sendall(data)

        feeder = threading.Thread(target=feed, daemon=True)
        feeder.start()
        with socket.create_connection(server.getsockname()) as client:
            took = seconds_of([_fetcher(client, len(data))], "cpu")
        feeder.join()
    return Ceiling.of("loopback", len(data), "B/s", took, f"TCP, {len(data) >> 20} MiB at a time")


def _fetcher(client: socket.socket, n_bytes: int) -> Callable[[], None]:
    buffer = memoryview(bytearray(n_bytes))

    def fetch() -> None:
        client.sendall(b"x")
        got = 0
        while got < n_bytes:
            n = client.recv_into(buffer[got:])
            if not n:
                raise ConnectionResetError("the other end has hung up")
            got += n

    return fetch
