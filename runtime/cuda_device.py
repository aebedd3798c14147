"""`CudaDevice`: streams, events, pinned pages and Triton kernels of one GPU.

Nothing here makes the host wait but what says so by `waiting`.
"""

from __future__ import annotations

import errno
import gc
import logging
import mmap
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import CapacityError
from ..core.layout import ALIGN_BYTES
from .device import COPY_OUT, URGENT, Device, Graph, Ranges, aligned, joined
from .standing_threads import StandingThreads

log = logging.getLogger(__name__)

COPY_BELOW_ROWS = 16
"""So few pieces go by the copy engine, whatever their size."""

PLACE = "place"
"""The stream of copies that stay."""

if TYPE_CHECKING:
    from ..kernels.packing import Packed, Per
    from ..kernels.tile_plan import TilePlan
    from .attention import Rows


class CudaMark:
    """An event with a time."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        # Blocking: a thread that waits must not spin on a core that launches need.
        self.event = torch.cuda.Event(enable_timing=True, blocking=True)
        self.event.record(stream)

    def wait(self) -> None:
        """See `Mark`."""
        self.event.synchronize()

    def ns_since(self, earlier: CudaMark) -> float:
        """See `Mark`. The driver gives fp32 milliseconds: 60 ns of a second, 60 us of 1000 s."""
        ms: float = earlier.event.elapsed_time(self.event)
        return ms * 1e6


class CudaStream:
    """A CUDA stream."""

    def __init__(self, device: torch.device, priority: int) -> None:
        self.torch = torch.cuda.Stream(device=device, priority=priority)

    def run(self, work: Callable[[], None]) -> None:
        """See `Stream`: launched at once, carried out later."""
        with torch.cuda.stream(self.torch):
            work()

    def follow(self, mark: CudaMark) -> None:
        """See `Stream`."""
        self.torch.wait_event(mark.event)

    def mark(self) -> CudaMark:
        """See `Stream`."""
        with torch.cuda.device(self.torch.device):
            return CudaMark(self.torch)

    def close(self) -> None:
        """Nothing to let go of."""


class CudaDevice(Device):
    """One GPU."""

    kind = "cuda"
    pooled_decode = True
    standing = StandingThreads()

    def __init__(self, index: int = 0) -> None:
        super().__init__(index)
        self.torch = torch.device("cuda", index)
        self._streams: dict[str, CudaStream] = {}
        self._registers = True
        """Whether the driver pins pages that are not its own."""

    def current(self) -> AbstractContextManager[None]:
        """Within the block this is torch's current device, on which Triton launches."""
        return torch.cuda.device(self.torch)

    def stream(self, name: str) -> CudaStream:
        """The stream of that name, one for the life of the device.

        torch keeps freed memory by stream: a new stream for each run would allocate anew on the
        path of its first requests, and hold what the streams before it had used.
        """
        if name not in self._streams:
            self._streams[name] = CudaStream(self.torch, -1 if name in URGENT else 0)
        return self._streams[name]

    def host_pages(self, n_bytes: int) -> np.ndarray:
        """Pinned pages, aligned for unbuffered reads: uint8 `[n_bytes]`.

        Raises:
            OSError: the driver pins no more, as mapping memory fails elsewhere.
        """
        try:
            pages = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)
            if not aligned(pages):
                pages = torch.empty(n_bytes + ALIGN_BYTES, dtype=torch.uint8, pin_memory=True)
                skip = -pages.data_ptr() % ALIGN_BYTES
                pages = pages[skip : skip + n_bytes]
        except RuntimeError as e:
            why = str(e).partition("\n")[0]
            raise OSError(errno.ENOMEM, f"{n_bytes} bytes cannot be pinned: {why}") from None
        found: np.ndarray = pages.numpy()
        return found

    def upload(self, host: Tensor) -> Tensor:
        """See `Device`; through pinned memory that torch keeps until the copy is done."""
        return host.pin_memory().to(self.torch, non_blocking=True)

    def lasting_pages(self, n_bytes: int) -> np.ndarray:
        """See `Device`: pages that are pinned where they are; torch's own would be rounded up to
        a power of two. The driver lets go of them before their mapping does."""
        if not self._registers:
            return self.host_pages(n_bytes)
        runtime: Any = torch.cuda.cudart()
        mapping = mmap.mmap(-1, n_bytes)
        pages = np.frombuffer(mapping, dtype=np.uint8)
        with self.current():
            refused = int(runtime.cudaHostRegister(pages.ctypes.data, n_bytes, 0))
        if refused:
            self._registers = False
            with suppress(RuntimeError):  # takes the driver's note of the refusal
                torch.zeros(1, device=self.torch)
            return self.host_pages(n_bytes)
        done = weakref.finalize(pages, _unregister, runtime, pages.ctypes.data, mapping)
        done.atexit = False
        return pages

    def upload_pages(self, pages: Tensor, ranges: Ranges) -> Tensor:
        """See `Device`: small pieces by a kernel that reads them itself, others by the copy
        engine, one copy for each run."""
        runs = joined(ranges)
        sizes = [size for _, size in runs]
        out = self.empty((sum(sizes),), torch.uint8)
        if len(runs) >= COPY_BELOW_ROWS and max(sizes) < self.copy_from_bytes:
            self._gather(pages, runs, out)
            return out
        for (start, size), here in zip(runs, out.split(sizes), strict=True):
            here.copy_(pages[start : start + size], non_blocking=True)
        return out

    def hold(self, pages: Tensor) -> Tensor:
        """See `Device`; on a stream of its own, so that it is not in the way of copies on the path,
        and that the memory of a chunk that went serves the next one."""
        held: list[Tensor] = []
        stream = self.stream(PLACE)
        stream.run(lambda: held.append(self.upload_pages(pages, [(0, pages.numel())])))
        with self.waiting("chunk placed"):
            stream.mark().wait()
        return held[0]

    @property
    def copy_from_bytes(self) -> int:
        """See `Device`; measured once per GPU and process.

        Raises:
            CapacityError: the GPU has no room for it.
        """
        with self.current():
            try:
                return _crossover(self.index)
            except torch.OutOfMemoryError as e:
                raise CapacityError(
                    "measuring the link to a GPU takes some of its memory for a moment",
                    values=f"{self.name}: {str(e).splitlines()[0]}",
                    remedy="end what else uses that GPU, or use another one",
                ) from None

    def _gather(self, pages: Tensor, runs: Ranges, out: Tensor) -> None:
        from ..kernels.gather_host import gather_host

        row = ALIGN_BYTES
        rows = [torch.arange(start // row, (start + size) // row) for start, size in runs]
        whole = pages[: pages.numel() // row * row]
        with self.current():
            gather_host(
                whole.view(-1, row), self.upload(torch.cat(rows)), out.view(-1, row), "kernel"
            )

    def download(self, here: Tensor) -> Callable[[], Tensor]:
        """See `Device`."""
        host = torch.empty(here.shape, dtype=here.dtype, pin_memory=True)
        host.copy_(here, non_blocking=True)
        return lambda: host

    def to_host(self, here: Tensor, why: str) -> Tensor:
        """See `Device`."""
        host = torch.empty(here.shape, dtype=here.dtype, pin_memory=True)

        def copy() -> None:
            host.copy_(here, non_blocking=True)

        out = self.stream(COPY_OUT)
        out.follow(CudaMark(torch.cuda.current_stream(self.torch)))
        out.run(copy)
        with self.waiting(why):
            out.mark().wait()
        return host

    def move(self, other: Tensor) -> Tensor:
        """See `Device`; the stream that runs has followed the mark of the stage before."""
        if other.device == self.torch:
            return other
        # torch copies on a stream of the other device; it must not use that memory again meanwhile.
        other.record_stream(torch.cuda.current_stream(other.device))
        return other.to(self.torch, non_blocking=True)

    def used_here(self, x: Tensor) -> None:
        """See `Device`."""
        x.record_stream(torch.cuda.current_stream(self.torch))

    def synchronise(self, why: str) -> None:
        """See `Device`."""
        with self.waiting(why):
            torch.cuda.synchronize(self.torch)

    def capture(self, work: Callable[[], None]) -> Graph:
        """See `Device`. What `work` allocates stays the graph's own."""
        # torch captures on a stream of the current device, and keeps one for all devices by itself.
        with self.waiting("capture"), self.current(), _nothing_collected():
            graph = torch.cuda.CUDAGraph()
            side = self.stream("capture").torch
            # Other threads go on allocating and copying; only this one's calls are captured.
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                work()
        return graph

    # Kernels

    def restore(
        self, k: Tensor | Packed, v: Tensor | Packed, positions: Tensor, k_out: Tensor,
        v_out: Tensor, cos: Tensor, sin: Tensor,
    ) -> None:  # fmt: skip
        """See `kernels.restore.restore`."""
        from ..kernels.restore import restore

        with self.current():
            restore(k, v, positions, k_out, v_out, cos, sin)

    def pack(self, x: Tensor, bits: int, per: Per) -> Packed:
        """See `kernels.pack.pack`."""
        from ..kernels.pack import pack

        with self.current():
            return pack(x, bits, per)

    def deviation(self, k_new: Tensor, k_old: Tensor) -> Tensor:
        """See `kernels.deviation.deviation`."""
        from ..kernels.deviation import deviation

        with self.current():
            return deviation(k_new, k_old)

    def attention(
        self, rows: Rows, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """See `Device`; should cuDNN have no plan for a shape, this process does without it."""
        try:
            return super().attention(rows, q, k, v, scale, window)
        except RuntimeError as e:
            if "cudnn" not in str(e).lower() or not torch.backends.cuda.cudnn_sdp_enabled():
                raise
            log.warning("attention goes on without cuDNN: %s", str(e).splitlines()[0])
            torch.backends.cuda.enable_cudnn_sdp(False)
            return super().attention(rows, q, k, v, scale, window)

    def sparse_attention(
        self, rows: Rows, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """See `kernels.sparse_attention`; the plan is made once for all layers."""
        from ..kernels.sparse_attention import sparse_attention

        plan = rows.plans.get(window)
        if plan is None:
            plan = rows.plans[window] = self._plan(rows, q, k, window)
        with self.current():
            return sparse_attention(q, k, v, rows.positions, rows.n_keys, scale, window, plan=plan)

    def _plan(self, rows: Rows, q: Tensor, k: Tensor, window: int | None) -> TilePlan:
        from ..kernels.tile_plan import plan_tiles

        shape = (rows.n_keys, q.shape[1], k.shape[0], q.shape[2], window)
        if rows.host is None:
            return plan_tiles(rows.positions, *shape, dtype=q.dtype, on_device=True)
        plan = plan_tiles(rows.host, *shape, dtype=q.dtype)
        return replace(plan, items=self.upload(plan.items), positions=self.upload(plan.positions))

    def decode_attention(
        self, q: Tensor, k: Tensor, v: Tensor, base: Tensor, n_keys: Tensor, scale: float,
        window: int | None,
    ) -> Tensor:  # fmt: skip
        """See `kernels.decode_pooled`."""
        from ..kernels.decode_pooled import decode_pooled

        with self.current():
            return decode_pooled(q, k, v, base, n_keys, scale, window)


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """What garbage lets go of (graphs, pinned pages) the driver refuses while it captures, and the
    capture is lost; so it goes before."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@cache
def _crossover(index: int) -> int:
    """Of that GPU, which is the current one."""
    from ..kernels.gather_host import measured_crossover

    try:
        return measured_crossover()
    finally:  # KV and weights come next: torch would keep what it took, gigabytes
        torch.cuda.empty_cache()


def _unregister(runtime: Any, address: int, mapping: mmap.mmap) -> None:
    """The mapping is an argument so that it lives until the driver has let go of it."""
    runtime.cudaHostUnregister(address)


def is_pinned(pages: Any) -> bool:
    """Whether the copy engine can read these host pages by itself."""
    return torch.from_numpy(np.frombuffer(pages, dtype=np.uint8)).is_pinned()
