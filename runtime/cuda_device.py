"""`CudaDevice`: streams, events, pinned pages and Triton kernels of one GPU.

Nothing here makes the host wait but what counts itself in `host_waits`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..core.layout import ALIGN_BYTES
from .device import URGENT, Device, Graph, aligned

if TYPE_CHECKING:
    from ..kernels.sparse_attention import TilePlan
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
        return earlier.event.elapsed_time(self.event) * 1e6


class CudaStream:
    """A CUDA stream."""

    def __init__(self, device: torch.device, priority: int) -> None:
        self._stream = torch.cuda.Stream(device=device, priority=priority)

    def run(self, work: Callable[[], None]) -> None:
        """See `Stream`: launched at once, carried out later."""
        with torch.cuda.stream(self._stream):
            work()

    def follow(self, mark: CudaMark) -> None:
        """See `Stream`."""
        self._stream.wait_event(mark.event)

    def mark(self) -> CudaMark:
        """See `Stream`."""
        with torch.cuda.device(self._stream.device):
            return CudaMark(self._stream)

    def close(self) -> None:
        """Nothing to let go of."""


class CudaDevice(Device):
    """One GPU."""

    kind = "cuda"
    pooled_decode = True

    def __init__(self, index: int = 0) -> None:
        super().__init__(index)
        self.torch = torch.device("cuda", index)

    def stream(self, name: str) -> CudaStream:
        """See `Device`."""
        return CudaStream(self.torch, -1 if name in URGENT else 0)

    def host_pages(self, n_bytes: int) -> np.ndarray:
        """Pinned pages, aligned for unbuffered reads: uint8 `[n_bytes]`."""
        pages = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)
        if not aligned(pages):
            pages = torch.empty(n_bytes + ALIGN_BYTES, dtype=torch.uint8, pin_memory=True)
            skip = -pages.data_ptr() % ALIGN_BYTES
            pages = pages[skip : skip + n_bytes]
        found: np.ndarray = pages.numpy()
        return found

    def upload(self, host: Tensor) -> Tensor:
        """See `Device`; through pinned memory that torch keeps until the copy is done."""
        return host.pin_memory().to(self.torch, non_blocking=True)

    def upload_pages(self, pages: Tensor) -> Tensor:
        """See `Device`."""
        return pages.to(self.torch, non_blocking=True)

    def download(self, here: Tensor) -> Callable[[], Tensor]:
        """See `Device`."""
        host = torch.empty(here.shape, dtype=here.dtype, pin_memory=True)
        host.copy_(here, non_blocking=True)
        return lambda: host

    def to_host(self, here: Tensor, why: str) -> Tensor:
        """See `Device`."""
        self.host_waits[why] += 1
        host = torch.empty(here.shape, dtype=here.dtype, pin_memory=True)
        host.copy_(here, non_blocking=True)
        CudaMark(torch.cuda.current_stream(self.torch)).wait()
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
        self.host_waits[why] += 1
        torch.cuda.synchronize(self.torch)

    def capture(self, work: Callable[[], None]) -> Graph:
        """See `Device`. What `work` allocates stays the graph's own."""
        self.host_waits["capture"] += 1
        graph = torch.cuda.CUDAGraph()
        # Other threads go on allocating and copying; only this one's calls are captured.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            work()
        return graph

    # Kernels

    def restore(
        self, k: Tensor, v: Tensor, positions: Tensor, k_out: Tensor, v_out: Tensor,
        cos: Tensor, sin: Tensor,
    ) -> None:  # fmt: skip
        """See `kernels.restore.restore`."""
        from ..kernels.restore import restore

        restore(k, v, positions, k_out, v_out, cos, sin)

    def deviation(self, k_new: Tensor, k_old: Tensor) -> Tensor:
        """See `kernels.deviation.deviation`."""
        from ..kernels.deviation import deviation

        return deviation(k_new, k_old)

    def sparse_attention(
        self, rows: Rows, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """See `kernels.sparse_attention`; the plan is made once for all layers."""
        from ..kernels.sparse_attention import sparse_attention

        plan = rows.plans.get(window)
        if plan is None:
            plan = rows.plans[window] = self._plan(rows, q, k, window)
        return sparse_attention(q, k, v, rows.positions, rows.n_keys, scale, window, plan=plan)

    def _plan(self, rows: Rows, q: Tensor, k: Tensor, window: int | None) -> TilePlan:
        from ..kernels.sparse_attention import plan_tiles

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

        return decode_pooled(q, k, v, base, n_keys, scale, window)


def is_pinned(pages: Any) -> bool:
    """Whether the copy engine can read these host pages by itself."""
    return torch.from_numpy(np.frombuffer(pages, dtype=np.uint8)).is_pinned()
