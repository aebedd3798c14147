"""How fast chunks come from files, beside `fio` doing the same; page cache and links apart.

All contenders of a round run one after the other, so that a drift of the disk meets them alike, and
a share is the median over rounds of the ratio within a round. `store` is `ChunkStore.read`, staging
and checksums included; `preadv` is the bare system call from as many Python threads.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from ..core.chunk_index import content_id_of
from ..core.errors import StoreError
from ..core.model_spec import ModelSpec

if TYPE_CHECKING:
    from ..runtime.chunk_store import ChunkStore

CHUNK_TOKENS = 512
LAYERS_PER_READ = 2
FIO_DEPTH = 16
MODEL = ModelSpec(
    name="io",
    family="llama",
    n_layers=8,
    hidden_size=64,
    intermediate_size=64,
    n_heads=8,
    n_kv_heads=8,
    head_dim=128,
    vocab_size=1 << 16,
    max_position=4096,
)
"""K and V of a layer are 4 KiB per token, as in Llama-3.1-8B: 2 MiB per chunk and layer."""

Progress = Callable[[str, int, int], None]
ReadUntil = Callable[[float], float]
"""Reads until that moment of the clock; returns bytes per second."""


@dataclass
class Series:
    """One contender with some workers: bytes per second of each round."""

    contender: str
    workers: int
    rates: list[float] = field(default_factory=list)


def fill_store(store: ChunkStore, tier: str, n_bytes: int, seed: int = 0) -> list[str]:
    """Chunks of random K and V, `n_bytes` in all; returns their keys."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    shape = (MODEL.n_layers, CHUNK_TOKENS, MODEL.n_kv_heads, MODEL.head_dim)
    keys = []
    for i in range(max(2, n_bytes // (CHUNK_TOKENS * MODEL.kv_bytes_per_token))):
        k, v = (torch.randn(shape, generator=generator).bfloat16() for _ in range(2))
        order = torch.randperm(CHUNK_TOKENS, generator=generator)
        entry = store.put(content_id_of((i,)), k, v, order, order_name="random", tier=tier)
        keys.append(entry.key)
    return keys


def by_threads(workers: int, read_one: Callable[[int], int]) -> ReadUntil:
    """`read_one(i)` from `workers` threads, i counting on over all of them."""

    def run(until_s: float) -> float:
        numbers = count()
        lock = threading.Lock()

        def work(_: int) -> int:
            done = 0
            while time.perf_counter() < until_s:
                with lock:
                    i = next(numbers)
                done += read_one(i)
            return done

        began = time.perf_counter()
        with ThreadPoolExecutor(workers) as pool:
            total = sum(pool.map(work, range(workers)))
        return total / (time.perf_counter() - began)

    return run


def store_reader(store: ChunkStore, keys: Sequence[str], tier: str, request_bytes: int) -> Any:
    """`read_one` of `by_threads`: two layers of one chunk after another."""
    n_parts = MODEL.n_layers // LAYERS_PER_READ

    def read_one(i: int) -> int:
        start = LAYERS_PER_READ * (i % n_parts)
        key = keys[i // n_parts % len(keys)]
        rows = [CHUNK_TOKENS] * LAYERS_PER_READ
        return store.read(key, start, start + LAYERS_PER_READ, rows, request_bytes, tier).n_bytes

    return read_one


def file_reader(path: Path, request_bytes: int, *, direct: bool) -> Any:
    """`read_one` of `by_threads`: one request after another, by `preadv`. Keeps the file open."""
    fd = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    n_requests = os.fstat(fd).st_size // request_bytes
    mine = threading.local()

    def read_one(i: int) -> int:
        if not hasattr(mine, "pages"):
            mine.pages = mmap.mmap(-1, request_bytes)
        return os.preadv(fd, [mine.pages], i % n_requests * request_bytes)

    return read_one


def fio_reader(path: Path, workers: int, request_bytes: int, *, engine: str = "psync") -> ReadUntil:
    """`fio` with as many jobs, each with its part of the file; libaio is one job at depth 16."""
    jobs = workers if engine == "psync" else 1
    part = path.stat().st_size // jobs // request_bytes * request_bytes

    def run(until_s: float) -> float:
        runtime_ms = max(1, round(1e3 * (until_s - time.perf_counter())))
        command = [
            "fio", "--name=read", f"--filename={path}", "--rw=read", "--direct=1",
            f"--bs={request_bytes}", f"--ioengine={engine}", f"--numjobs={jobs}", "--thread",
            f"--iodepth={1 if engine == 'psync' else FIO_DEPTH}", f"--size={part}",
            f"--offset_increment={part}", "--time_based", f"--runtime={runtime_ms}ms",
            "--group_reporting", "--output-format=json", "--invalidate=1",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise StoreError(
                "fio must be able to read the file",
                values=(done.stderr or done.stdout).strip()[-200:],
                remedy="check fio by hand, or leave it out",
            )
        text = done.stdout[done.stdout.index("{") :]
        return float(json.loads(text)["jobs"][0]["read"]["bw_bytes"])

    return run


def compare_files(
    store: ChunkStore,
    keys: Sequence[str],
    tier: str,
    raw: Path,
    workers: Sequence[int],
    request_bytes: int,
    rounds: int,
    seconds: float,
    progress: Progress | None = None,
) -> list[Series]:
    """O_DIRECT reads of the store, of `preadv` and of `fio` if it is installed, round by round."""
    plain = file_reader(raw, request_bytes, direct=True)
    ours = store_reader(store, keys, tier, request_bytes)
    contenders: list[tuple[Series, ReadUntil]] = []
    with_fio = shutil.which("fio") is not None
    for n in workers:
        if with_fio:
            contenders.append((Series("fio psync", n), fio_reader(raw, n, request_bytes)))
        contenders.append((Series("preadv", n), by_threads(n, plain)))
        contenders.append((Series("store", n), by_threads(n, ours)))
    if with_fio:
        deep = fio_reader(raw, FIO_DEPTH, request_bytes, engine="libaio")
        contenders.append((Series("fio libaio", FIO_DEPTH), deep))
    return run_rounds(contenders, rounds, seconds, progress)


def run_rounds(
    contenders: Sequence[tuple[Series, ReadUntil]],
    rounds: int,
    seconds: float,
    progress: Progress | None = None,
) -> list[Series]:
    """Every contender in every round; the first round warms up."""
    for turn in range(rounds + 1):
        for i, (series, read) in enumerate(contenders):
            rate = read(time.perf_counter() + seconds)
            if turn:
                series.rates.append(rate)
            if progress is not None:
                done = turn * len(contenders) + i + 1
                progress("rounds", done, (rounds + 1) * len(contenders))
    return [series for series, _ in contenders]


def paired_share(ours: Series, theirs: Series) -> float:
    """Median over rounds of our rate over theirs in the same round."""
    return median(a / b for a, b in zip(ours.rates, theirs.rates, strict=True))


def best(series: Sequence[Series], prefix: str) -> Series | None:
    """The contender of that name with the highest median."""
    found = [s for s in series if s.contender.startswith(prefix)]
    return max(found, key=lambda s: median(s.rates)) if found else None


def storage_of(folder: Path) -> dict[str, Any]:
    """Which block device holds a folder, and whether it is a virtual one; None where unknown."""
    device = os.stat(folder).st_dev
    link = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    if not link.exists():
        return {"block_device": None, "virtual": None}
    real = link.resolve()
    virtual = "virtio" in str(real) or real.name.startswith(("vd", "xvd", "nbd"))
    return {"block_device": real.name, "virtual": virtual}
