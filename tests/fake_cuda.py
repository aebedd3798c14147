"""A device that behaves as a GPU does, in host memory: in-order streams on threads of their own,
marks, pinned pages that must not change under a copy, graphs that replay what was recorded.

Whatever a stream runs happens later, so a dependency that is not followed gives wrong values.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from cachetune.kernels.packing import Packed
from cachetune.runtime.device import Device
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_running = threading.local()


class FakeMark:
    """Reached when the stream's thread gets there; times as coarse as CUDA's."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.at_ns = 0
        self.error: BaseException | None = None

    def wait(self) -> None:
        assert not getattr(_running, "stream", None), "work on a stream must not wait for marks"
        self.reached.wait()
        if self.error is not None:
            raise self.error

    def ns_since(self, earlier: FakeMark) -> float:
        assert self.reached.is_set() and earlier.reached.is_set()
        return float(np.float32((self.at_ns - earlier.at_ns) / 1e6)) * 1e6


class FakeStream:
    """Queued work, done in order by a thread."""

    SLOW_S: ClassVar[dict[str, float]] = {}
    """Streams whose work begins later than the host's distance alone."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._loop, name=f"fake.{name}", daemon=True)
        self._thread.start()

    def run(self, work: Callable[[], None]) -> None:
        def act() -> None:
            if self._error is None:
                # The host is ahead of the device.
                time.sleep(self.SLOW_S.get(self.name.split("@")[0], 0.0002))
                work()

        self._queue.put(act)

    def follow(self, mark: FakeMark) -> None:
        assert mark is not None, "an event that was never recorded holds nothing up"
        self._queue.put(lambda: mark.reached.wait() and None)

    def mark(self) -> FakeMark:
        mark = FakeMark()

        def reach() -> None:
            mark.at_ns, mark.error = time.perf_counter_ns(), self._error
            mark.reached.set()

        self._queue.put(reach)
        return mark

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _loop(self) -> None:
        _running.stream = self
        while (act := self._queue.get()) is not None:
            try:
                act()
            except BaseException as e:
                self._error = self._error or e


class FakeGraph:
    """What was launched while it recorded: the same calls on the same memory, host values fixed."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.n_replays = 0

    def replay(self) -> None:
        self.n_replays += 1
        with torch._C.DisableTorchFunctionSubclass():
            for func, args, kwargs, out in self.calls:
                new = func(*args, **kwargs)
                for kept, made in zip(_flat(out), _flat(new), strict=True):
                    if kept.data_ptr() != made.data_ptr():
                        kept.copy_(made)


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: FakeGraph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_local_scalar_dense" in str(func) or "is_nonzero" in str(func):
            raise RuntimeError("a value was read on the host during a capture")
        out = func(*args, **(kwargs or {}))
        self.graph.calls.append((func, args, kwargs or {}, out))
        return out


READS = frozenset(
    (
        "item", "tolist", "numpy", "cpu", "nonzero", "equal", "allclose", "unique",
        "__int__", "__bool__", "__float__", "__index__",
    )
)  # fmt: skip
"""Functions that make the host wait for the device."""


class OnDevice(Tensor):
    """A tensor of the fake device: the host must not read it, nor mix its own into it."""

    on_read: ClassVar[Callable[[str], object] | None] = None
    """Told of reads instead of refusing them: they show in a trace, as on a GPU."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS and cls.on_read is not None:
            cls.on_read(name)
        elif name in READS:
            raise AssertionError(f"{name} of a tensor of the device makes the host wait")
        for x in _flat((args, kwargs or {})):
            if name == "__getitem__" and x.dtype == torch.bool:
                raise AssertionError("a mask as an index makes the host wait")
            is_index = not isinstance(x, OnDevice) and not x.is_floating_point() and x.dim()
            if is_index:
                raise AssertionError(
                    f"{name} mixes a host tensor {tuple(x.shape)} into device ones"
                )
        return super().__torch_function__(func, types, args, kwargs or {})


def _flat(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, dict):
        x = tuple(x.values())
    return [t for part in x for t in _flat(part)] if isinstance(x, tuple | list) else []


def there(x: Any) -> Any:
    if isinstance(x, Packed):
        return replace(x, codes=there(x.codes), scale=there(x.scale), zero=there(x.zero))
    return x.as_subclass(OnDevice) if isinstance(x, Tensor) else x


def plain(x: Any) -> Any:
    if isinstance(x, Packed):
        return replace(x, codes=plain(x.codes), scale=plain(x.scale), zero=plain(x.zero))
    return x.as_subclass(Tensor) if isinstance(x, OnDevice) else x


def check_attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    """What the kernels refuse, and a product of two dtypes, which tensor cores have not."""
    assert q.dtype == k.dtype == v.dtype, f"{q.dtype} queries, {k.dtype} keys, {v.dtype} values"
    assert k.stride() == v.stride() and k.stride(2) == 1


class FakeCuda(Device):
    """See the module. `kind` is a GPU's, so that everything takes the path of a GPU."""

    kind = "cuda"
    pooled_decode = True

    def __init__(self, index: int = 0) -> None:
        super().__init__(index)
        self.streams: list[str] = []
        self.graphs: list[FakeGraph] = []
        self.n_kernels: Counter[str] = Counter()
        self.uploaded_bytes = 0
        self.downloaded_bytes = 0
        self._capturing = False

    @property
    def name(self) -> str:
        return f"fake:{self.index}"

    def stream(self, name: str) -> FakeStream:
        self.streams.append(name)
        return FakeStream(f"{name}@{self.index}")

    def empty(self, shape: Any, dtype: torch.dtype) -> Tensor:
        return there(super().empty(shape, dtype))

    def _refuse_in_capture(self, what: str) -> None:
        """A graph would replay a copy from or to host memory that is long another's."""
        assert not self._capturing, f"{what} within a capture"

    def upload(self, host: Tensor) -> Tensor:
        assert not isinstance(host, OnDevice), "it is on the device"
        self._refuse_in_capture("an upload")
        return there(host.clone())

    def upload_pages(self, pages: Tensor, ranges: Any) -> Tensor:
        self._refuse_in_capture("an upload")
        self.uploaded_bytes += sum(size for _, size in ranges)
        return there(super().upload_pages(pages, ranges))

    def download(self, here: Tensor) -> Callable[[], Tensor]:
        assert isinstance(here, OnDevice), "it is on the host"
        self._refuse_in_capture("a download")
        host = plain(here).clone()

        def found() -> Tensor:
            assert not getattr(_running, "stream", None), "the copy may not have ended yet"
            return host

        return found

    def to_host(self, here: Tensor, why: str) -> Tensor:
        assert isinstance(here, OnDevice), "it is on the host"
        self._refuse_in_capture("a download")
        with self.waiting(why):
            found: Tensor = plain(here).clone()
        self.downloaded_bytes += found.nbytes
        return found

    def move(self, other: Tensor) -> Tensor:
        assert isinstance(other, OnDevice), "it is on the host"
        return other.clone()

    def synchronise(self, why: str) -> None:
        assert not getattr(_running, "stream", None), "work on a stream must not wait"
        self._refuse_in_capture("a wait")
        with self.waiting(why):
            pass

    def capture(self, work: Callable[[], None]) -> FakeGraph:
        graph = FakeGraph()
        self._capturing = True
        try:
            with self.waiting("capture"), _Recorder(graph):
                work()
        finally:
            self._capturing = False
        self.graphs.append(graph)
        return graph

    def restore(self, *args: Any) -> None:
        k_out, v_out, cos, sin = args[3:]
        assert k_out.stride() == v_out.stride() and k_out.stride(2) == 1
        assert cos.dtype == sin.dtype == torch.float32 and cos.is_contiguous()
        self._kernel("restore", *args)

    def pack(self, *args: Any) -> Packed:
        return self._kernel("pack", *args)

    def deviation(self, *args: Any) -> Tensor:
        return self._kernel("deviation", *args)

    def decode_attention(self, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Tensor:
        check_attention(q, k, v)
        assert args[1].dtype == torch.int32 and len(args[0]) == len(args[1]) == len(q)
        return self._kernel("decode_attention", q, k, v, *args)

    def sparse_attention(self, rows: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Tensor:
        """With the plan that the Triton kernel needs, made as for it."""
        check_attention(q, k, v)
        if args[1] not in rows.plans:
            pytest.importorskip("triton")
            from cachetune.kernels.tile_plan import plan_tiles

            at = plain(rows.positions) if rows.host is None else rows.host
            shape = (rows.n_keys, q.shape[1], k.shape[0], q.shape[2], args[1])
            rows.plans[args[1]] = plan_tiles(at, *shape, on_device=rows.host is None)
            self.n_kernels["plans"] += 1
        assert rows.plans[args[1]].positions.tolist() == plain(rows.positions).tolist()
        assert isinstance(rows.positions, OnDevice)
        bare = SimpleNamespace(positions=plain(rows.positions), n_keys=rows.n_keys, plans={})
        self.n_kernels["sparse_attention"] += 1
        return there(super().sparse_attention(bare, plain(q), plain(k), plain(v), *args))  # type: ignore[arg-type]

    def _kernel(self, name: str, *args: Any) -> Any:
        """The reference in the place of a kernel: on what lies there, reading nothing."""
        self.n_kernels[name] += 1
        for x in args:
            part = x.codes if isinstance(x, Packed) else x
            assert not isinstance(part, Tensor) or isinstance(part, OnDevice), (
                f"{name} of host tensors"
            )
        out = getattr(super(), name)(*map(plain, args))
        return there(out)
