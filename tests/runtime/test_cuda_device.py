"""`CudaDevice` as far as it can be held without a GPU: torch's own calls are stood in for."""

from __future__ import annotations

import ctypes
import errno
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cachetune.core.errors import CapacityError
from cachetune.runtime import cuda_device
from cachetune.runtime.cuda_device import COPY_BELOW_ROWS, CudaDevice
from cachetune.runtime.device import Device


class Driver:
    """Registers pages unless it refuses; sees that they are mapped for as long as it holds them."""

    def __init__(self, *, refuses: bool = False) -> None:
        self.refuses = refuses
        self.held: dict[int, int] = {}

    def cudaHostRegister(self, address: int, n_bytes: int, flags: int) -> int:
        if not self.refuses:
            self.held[address] = n_bytes
        return int(self.refuses)

    def cudaHostUnregister(self, address: int) -> int:
        assert ctypes.string_at(address + self.held.pop(address) - 1, 1) == b"\x07"
        return 0


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> CudaDevice:
    monkeypatch.setattr(CudaDevice, "current", lambda self: nullcontext())
    made = CudaDevice()
    made.torch = torch.device("cpu")
    return made


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    found = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: found)
    yield found
    assert not found.held


def test_lasting_pages_are_held_until_the_last_view_of_them_is_gone(
    device: CudaDevice, driver: Driver
) -> None:
    pages = np.frombuffer(device.lasting_pages(12288), dtype=np.uint8)
    pages[:] = 7
    assert pages.nbytes == 12288 and pages.ctypes.data % 4096 == 0
    assert driver.held == {pages.ctypes.data: 12288}
    rows = torch.from_numpy(pages)[4096:].view(torch.float32)
    del pages
    gc.collect()
    assert len(driver.held) == 1 and rows[0] == rows[-1]
    del rows
    gc.collect()
    assert not driver.held


def test_a_driver_that_pins_none_of_our_pages_pins_its_own(
    device: CudaDevice, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.refuses = True
    own: list[int] = []

    def host_pages(n_bytes: int) -> np.ndarray:
        own.append(n_bytes)
        return np.zeros(n_bytes, np.uint8)

    monkeypatch.setattr(device, "host_pages", host_pages)
    device.lasting_pages(4096)
    driver.refuses = False  # it is not asked again
    device.lasting_pages(8192)
    assert own == [4096, 8192]


def test_a_driver_that_pins_no_more_is_an_error_of_the_system(
    device: CudaDevice, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where mapping memory fails: the store tells it, and the chunk is computed."""

    def refuse(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(
        OSError, match="4096 bytes cannot be pinned: CUDA error: out of memory"
    ) as e:
        device.host_pages(4096)
    assert e.value.errno == errno.ENOMEM and "\n" not in str(e.value)


@pytest.mark.parametrize("fits", [True, False])
def test_what_measuring_the_link_took_is_given_back(
    device: CudaDevice, monkeypatch: pytest.MonkeyPatch, fits: bool
) -> None:
    done: list[str] = []

    def measured_crossover() -> int:
        done.append("measured")
        if not fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return 8192

    stub = SimpleNamespace(measured_crossover=measured_crossover)
    monkeypatch.setitem(sys.modules, "cachetune.kernels.gather_host", stub)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("emptied"))
    cuda_device._crossover.cache_clear()
    try:
        if fits:
            assert [device.copy_from_bytes for _ in range(3)] == [8192] * 3
        else:
            with pytest.raises(CapacityError, match=r"takes some of its memory.*2\.00 GiB"):
                _ = device.copy_from_bytes
    finally:
        cuda_device._crossover.cache_clear()
    assert done == ["measured", "emptied"]


@pytest.mark.parametrize(("n", "size"), [(3, 4096), (COPY_BELOW_ROWS, 8192), (40, 4096)])
@pytest.mark.parametrize("threshold", [4096, 1 << 20])
def test_pieces_go_by_the_kernel_or_the_copy_engine(
    device: CudaDevice, monkeypatch: pytest.MonkeyPatch, n: int, size: int, threshold: int
) -> None:
    """By size and number; the same bytes either way."""
    gathered: list[int] = []

    def gather(pages: torch.Tensor, runs: Any, out: torch.Tensor) -> None:
        gathered.append(len(runs))
        out.copy_(Device().upload_pages(pages, runs))

    monkeypatch.setattr(cuda_device, "_crossover", lambda index: threshold)
    monkeypatch.setattr(device, "_gather", gather)
    pages = torch.randint(0, 255, (3 * n * size,), dtype=torch.uint8)
    ranges = [(3 * i * size, size) for i in range(n)]
    found = device.upload_pages(pages, ranges)
    assert torch.equal(found, Device().upload_pages(pages, ranges))
    assert bool(gathered) == (n >= COPY_BELOW_ROWS and size < threshold)
    whole = device.upload_pages(pages, [(i * size, size) for i in range(n)])
    assert torch.equal(whole, pages[: n * size])
    assert len(gathered) <= 1  # one run is one copy


def test_a_chunk_is_whole_when_it_is_held(
    device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a stream that nothing on the path of a request uses; the host waits, and says so."""
    events: list[str] = []

    def run(work: Any) -> None:
        events.append("copy")
        work()

    def stream(name: str) -> SimpleNamespace:
        events.append(name)
        mark = SimpleNamespace(wait=lambda: events.append("wait"))
        return SimpleNamespace(run=run, mark=lambda: mark)

    monkeypatch.setattr(device, "stream", stream)
    pages = torch.randint(0, 255, (3 * 4096,), dtype=torch.uint8)
    held = device.hold(pages)
    assert torch.equal(held, pages) and held.data_ptr() != pages.data_ptr()
    assert events == ["place", "copy", "wait"] and device.host_waits == {"chunk placed": 1}


def test_a_stream_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps freed memory by stream: a new one for each run would begin with none."""
    made: list[int] = []

    def stream(device: torch.device, priority: int) -> SimpleNamespace:
        made.append(priority)
        return SimpleNamespace(device=device)

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    one = CudaDevice()
    names = ["compute", "copy-in", "restore", "copy-out"]
    first = [one.stream(name) for name in names]
    assert [one.stream(name) for name in names] == first
    assert made == [0, -1, -1, 0]


def test_nothing_is_collected_during_a_capture(
    device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver refuses to let go of pages and graphs then, and the capture is lost."""
    seen: list[object] = []

    @contextmanager
    def graph(made: object, *, stream: str, capture_error_mode: str) -> Iterator[None]:
        seen.append((made, stream, capture_error_mode))
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "graph")
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(device, "stream", lambda name: SimpleNamespace(torch=name))
    assert device.capture(lambda: seen.append(gc.isenabled())) == "graph"
    assert seen == [("graph", "capture", "thread_local"), False] and gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        device.capture(lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    assert gc.isenabled()


def test_attention_goes_on_without_cudnn(
    device: CudaDevice, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where it has no plan for a prompt; other errors are passed on."""
    asked: list[bool] = []
    why = "cuDNN Frontend error: No valid execution plans built."

    def attention(self: Device, *args: object) -> str:
        asked.append(torch.backends.cuda.cudnn_sdp_enabled())
        if asked[-1]:
            raise RuntimeError(why)
        return "done"

    monkeypatch.setattr(Device, "attention", attention)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        assert device.attention(*[None] * 6) == "done"  # type: ignore[arg-type]
        assert asked == [True, False] and "No valid" in caplog.text
        torch.backends.cuda.enable_cudnn_sdp(True)
        why = "an illegal memory access"
        with pytest.raises(RuntimeError, match="illegal"):
            device.attention(*[None] * 6)  # type: ignore[arg-type]
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
