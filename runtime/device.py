"""`Device`: where ops run: its streams, its copies to and from host memory, its kernels.

On the CPU everything has happened when a call returns. On a GPU work is queued: what a stream runs
has happened once a mark made behind it is done. Whoever makes the host wait for a device says why,
is counted, and stands in the trace of the run.
"""

from __future__ import annotations

import mmap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import CacheTuneError
from ..core.layout import ALIGN_BYTES
from ..core.timeline import HostWait
from ..kernels import reference
from ..kernels.decode_reference import decode_pooled
from ..kernels.packing import Packed, Per, pack

if TYPE_CHECKING:
    from .attention import Rows
    from .standing_threads import StandingThreads

COPY_IN = "copy-in"
COPY_OUT = "copy-out"
URGENT = (COPY_IN, "restore")
"""Streams whose short kernels must not queue behind those of compute."""


Ranges = Sequence[tuple[int, int]]
"""(first, count) of each."""

SHARED_MASK_BYTES = 64 << 20
"""The largest mask of a piece of a prompt that is kept from layer to layer."""


class DeviceError(CacheTuneError):
    """A device that is not there, or that cannot do what it is asked."""


class Mark(Protocol):
    """A point in a stream: done once all work queued before it is."""

    def wait(self) -> None:
        """Block this thread until it is done; raises what the work raised."""

    def ns_since(self, earlier: Self) -> float:
        """The device's own nanoseconds between two marks that are done."""


class Stream(Protocol):
    """In-order work of one device."""

    def run(self, work: Callable[[], None]) -> None:
        """Queue what `work` launches."""

    def follow(self, mark: Any) -> None:
        """What is queued from now on starts after `mark`, which may be another device's."""

    def mark(self) -> Any:
        """A mark behind everything queued so far."""

    def close(self) -> None:
        """No more work comes."""


class Graph(Protocol):
    """Captured work that is queued again as a whole."""

    def replay(self) -> None:
        """Queue it on the stream that runs now."""


class Device:
    """The CPU; as a pipeline stage, a worker on it."""

    kind = "cpu"
    pooled_decode = False
    """Whether decode takes K and V of all requests from one pooled buffer."""
    standing: StandingThreads | None = None
    """Threads that launch what computes, where the libraries keep something by thread."""

    def __init__(self, index: int = 0) -> None:
        self.index = index
        self.torch = torch.device("cpu")
        self.host_waits: Counter[str] = Counter()
        """How often the host waited for the device, by reason."""
        self._counting = threading.Lock()
        self.on_wait: Callable[[HostWait], object] | None = None
        """Told of every wait, while a run is traced."""

    @contextmanager
    def waiting(self, why: str, stream: str = "") -> Iterator[None]:
        """Within the block this thread of the host waits for the device, or for one stream."""
        start_ns = time.perf_counter_ns()
        try:
            yield
        finally:
            with self._counting:
                self.host_waits[why] += 1
            if self.on_wait is not None:
                self.on_wait(HostWait(self.index, why, start_ns, time.perf_counter_ns(), stream))

    @property
    def copy_from_bytes(self) -> int:
        """Pieces of host memory from this size on go by the copy engine; 0 for all of them."""
        return 0

    @property
    def name(self) -> str:
        """As torch names it."""
        return str(self.torch)

    def stream(self, name: str) -> Stream:
        """A new stream.

        Raises:
            DeviceError: this device has none; its executor runs ops on threads.
        """
        raise DeviceError(
            "a device with streams must be used", values=self.name, remedy="use CpuExecutor"
        )

    def host_pages(self, n_bytes: int) -> Any:
        """Whole pages of host memory, from which the device can be filled: a buffer.

        Raises:
            OSError: there is no such memory left.
        """
        return mmap.mmap(-1, n_bytes)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory of the device, contents undefined."""
        return torch.empty(tuple(shape), dtype=dtype, device=self.torch)

    def lasting_pages(self, n_bytes: int) -> Any:
        """As `host_pages`, exactly as large: much of it stays for long."""
        return self.host_pages(n_bytes)

    def upload(self, host: Tensor) -> Tensor:
        """The values of a host tensor, for work queued from now on."""
        return host

    def upload_pages(self, pages: Tensor, ranges: Ranges) -> Tensor:
        """Ranges of uint8 pages (first byte, bytes), joined, for work queued from now on.

        The caller keeps the pages as they are until that is done.
        """
        return torch.cat([pages[start : start + size] for start, size in joined(ranges)])

    def hold(self, pages: Tensor) -> Tensor:
        """A copy of uint8 host pages that stays here, whole when this returns: off the path."""
        return self.upload_pages(pages, [(0, pages.numel())])

    def download(self, here: Tensor) -> Callable[[], Tensor]:
        """What gives a host copy once the running op has ended."""
        return lambda: here

    def to_host(self, here: Tensor, why: str) -> Tensor:
        """A host copy now; the host waits for it."""
        return here

    def move(self, other: Tensor) -> Tensor:
        """A tensor of another device of the pipeline, here."""
        return other

    def used_here(self, x: Tensor) -> None:
        """`x`, made by another stream, is used by the one that runs; its memory stays so long."""

    def synchronise(self, why: str) -> None:
        """Wait for everything that was queued."""

    def capture(self, work: Callable[[], None]) -> Graph:
        """A graph of what `work` launches.

        Raises:
            DeviceError: this device has no graphs.
        """
        raise DeviceError("graphs need a CUDA device", values=self.name)

    # Kernels

    def restore(
        self, k: Tensor | Packed, v: Tensor | Packed, positions: Tensor, k_out: Tensor,
        v_out: Tensor, cos: Tensor, sin: Tensor,
    ) -> None:  # fmt: skip
        """See `kernels.reference.restore` and, for both packed, `restore_quantised`."""
        if isinstance(k, Packed) and isinstance(v, Packed):
            reference.restore_quantised(k, v, positions, k_out, v_out, cos_table=cos, sin_table=sin)
        else:
            assert isinstance(k, Tensor) and isinstance(v, Tensor)
            reference.restore(k, v, positions, k_out, v_out, cos_table=cos, sin_table=sin)

    def pack(self, x: Tensor, bits: int, per: Per) -> Packed:
        """See `kernels.packing.pack`; the same bytes on every device."""
        return pack(x, bits, per)

    def deviation(self, k_new: Tensor, k_old: Tensor) -> Tensor:
        """See `kernels.reference.deviation`."""
        return reference.deviation(k_new, k_old)

    def attention(
        self, rows: Rows, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """Queries `[n, H, D]` of `rows` over K and V `[HK, n_slots, D]`, causal by position."""
        n = rows.n_keys
        if n == q.shape[0] > 1 and (window is None or n <= window):
            # A whole prompt from its start: the library's own causal kernel needs no mask.
            heads = q.transpose(0, 1)[None]
            k, v = k[None, :, :n], v[None, :, :n]
            out = F.scaled_dot_product_attention(
                heads, k, v, is_causal=True, scale=scale, enable_gqa=True
            )
            return out[0].transpose(0, 1)
        return self.sparse_attention(rows, q, k, v, scale, window)

    def sparse_attention(
        self, rows: Rows, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """See `kernels.reference.sparse_attention`. Layers share what rows see, if it is small."""
        seen = rows.plans.get(window)
        group = q.shape[1] // k.shape[0]
        if seen is None and q.shape[0] * group * rows.n_keys <= SHARED_MASK_BYTES:
            slot = torch.arange(rows.n_keys)
            seen = list(reference.seen_blocks(rows.positions, slot, group, window))
            rows.plans[window] = seen
        return reference.sparse_attention(
            q, k, v, rows.positions, rows.n_keys, scale, window, seen=seen
        )

    def decode_attention(
        self, q: Tensor, k: Tensor, v: Tensor, base: Tensor, n_keys: Tensor, scale: float,
        window: int | None,
    ) -> Tensor:  # fmt: skip
        """See `kernels.decode_reference.decode_pooled`."""
        return decode_pooled(q, k, v, base, n_keys, scale, window)


CPU = Device()
"""The one worker that there is without a pipeline."""


def open_device(name: str) -> Device:
    """`cpu`, `cuda` or `cuda:<i>`.

    Raises:
        DeviceError: another name, or a GPU that is not there.
    """
    kind, _, number = name.partition(":")
    if name == "cpu":
        return Device()
    index = int(number) if number.isdigit() else 0
    valid = kind == "cuda" and (number.isdigit() or ":" not in name)
    found = torch.cuda.device_count() if valid and torch.cuda.is_available() else 0
    if not valid or index >= found:
        raise DeviceError(
            "--device must be cpu, cuda or cuda:<i>, and be there",
            values=f"{name!r}, CUDA devices here: {found or torch.cuda.device_count()}",
            remedy="use --device cpu, or run where there is such a GPU",
        )
    from .cuda_device import CudaDevice

    return CudaDevice(index)


def stage_devices(first: Device, n_stages: int) -> list[Device]:
    """The devices of a pipeline: the first and those behind it, one for each stage.

    Raises:
        DeviceError: there are not so many GPUs.
    """
    if n_stages == 1:
        return [first]
    if first.kind == "cpu":
        return [first, *(Device(i) for i in range(1, n_stages))]
    return [first, *(open_device(f"cuda:{first.index + i}") for i in range(1, n_stages))]


def joined(ranges: Ranges) -> list[tuple[int, int]]:
    """The same, neighbours as one."""
    found: list[tuple[int, int]] = []
    for start, size in ranges:
        if found and sum(found[-1]) == start:
            found[-1] = (found[-1][0], found[-1][1] + size)
        elif size:
            found.append((start, size))
    return found


def aligned(pages: Tensor) -> bool:
    """Whether a host tensor begins where unbuffered reads need it."""
    return pages.data_ptr() % ALIGN_BYTES == 0
