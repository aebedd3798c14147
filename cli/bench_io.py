"""`cachetune bench io`: reading chunks from files, beside fio; page cache, Redis, link apart."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..calibration.ceilings import Ceiling
    from ..calibration.io_rates import Progress, Series
    from ..runtime.chunk_store import ChunkStore
    from ..runtime.tiers import TierConfig

_Folder = Annotated[Path, typer.Option(help="On the disk that is to be measured.")]
_Workers = Annotated[str, typer.Option(help="Reading threads, by comma.")]
_SizeMib = Annotated[int, typer.Option(min=32, help="Bytes on disk, MiB; twice that is written.")]
_RequestKib = Annotated[int, typer.Option(min=4, help="Largest single read, KiB.")]
_Rounds = Annotated[int, typer.Option(min=1, help="Rounds; 20 or more for a result.")]
_Seconds = Annotated[float, typer.Option(min=0.05, help="Seconds of each contender in a round.")]
_Device = Annotated[str, typer.Option(help="cuda, cpu, or auto: cuda where there is one.")]
_Out = Annotated[Path | None, typer.Option(help="The result; by default below results/.")]
_Seed = Annotated[int, typer.Option(min=0, help="Of the random data.")]

FIO_MUST = 0.9
CACHED_WORKERS = (1, 4)
REDIS_WORKERS = (1, 2, 4)
REDIS_VALUES = 16
COLD = (
    "a virtual disk has its host's cache behind it, which cannot be seen or emptied from here: "
    "O_DIRECT leaves out this system's page cache only, so these reads are not proven cold"
)
REDIS_BYTES = 64 << 20
LINKS = {"cpu": (), "cuda": ("host to device",)}
COLUMNS = (
    "medium",
    "contender",
    "workers",
    "GB/s",
    "q25",
    "q75",
    "of_fio",
    "of_ceiling",
    "ceiling",
    "must",
    "goal",
)


@dataclass(frozen=True)
class _Ask:
    """How much is measured, and where."""

    folder: Path
    n_bytes: int
    workers: list[int]
    request_bytes: int
    rounds: int
    seconds: float


def command(
    folder: _Folder = Path("build/bench/io"),
    workers: _Workers = "1,2,4,8,16",
    size_mib: _SizeMib = 512,
    request_kib: _RequestKib = 256,
    rounds: _Rounds = 20,
    seconds: _Seconds = 0.4,
    device: _Device = "auto",
    out: _Out = None,
    seed: _Seed = 0,
) -> None:
    """Measure reads of the chunk store against fio's O_DIRECT rate of the same run.

    The result is written after each medium, so that a run that is ended leaves what it has.
    """
    import shutil

    from ..calibration import ceilings as limits
    from ..calibration.io_rates import storage_of
    from ..core.record import check_writable, write_json
    from .bench_machine import device_name, pick_device, provenance, results_folder
    from .console import counts, note, print_json_line, print_table, progress_bar, warn

    device = pick_device(device)
    out = out or results_folder(device) / "io.json"
    check_writable(out)
    threads = counts(workers, "--workers")
    if shutil.which("fio") is None:
        warn("fio is not installed: files are held against our own raw reads only")
    folder.mkdir(parents=True, exist_ok=True)
    found = limits.measure(device, folder)
    print_table(limits.as_rows(found), limits.COLUMNS, f"limits of this run, {device_name(device)}")
    ask = _Ask(folder, size_mib << 20, threads, request_kib << 10, rounds, seconds)
    storage = storage_of(folder)
    result: dict[str, Any] = {
        "provenance": provenance(seed, device),
        "device": device_name(device),
        "storage": storage,
        "cold": COLD if storage["virtual"] is not False else "a disk of this machine",
        "request_bytes": request_kib << 10,
        "n_bytes": size_mib << 20,
        "ceilings": limits.as_json(found),
        "best_of_fio": None,
        "missing": ["file, O_DIRECT", "file, page cache", "redis", *LINKS[device]],
        "rows": [],
    }
    rows: list[dict[str, Any]] = result["rows"]
    with progress_bar() as tell:

        def keep(more: Sequence[dict[str, Any]]) -> None:
            rows.extend(more)
            result["missing"].pop(0)
            write_json(out, result)

        files = _files(ask, tell)
        best = result["best_of_fio"] = _headline(files)
        keep(_file_rows(files, found))
        keep([_row(s, "file, page cache", found["device_copy"]) for s in _cached(ask, tell)])
        keep([_row(s, "redis", found["loopback"]) for s in _redis(ask, tell)])
        if device == "cuda":
            keep(_link_rows(found))
    print_table(rows, COLUMNS, f"reads, requests of {request_kib} KiB")
    note(f"{result['cold']}")
    note(f"result: {out}")
    missed = [row["medium"] for row in rows if row.get("met") is False]
    print_json_line({"command": "bench io", **best, "below_must": missed})


@contextmanager
def _filled(
    folder: Path, config: TierConfig, n_bytes: int
) -> Iterator[tuple[ChunkStore, list[str]]]:
    """A store of its own with `n_bytes` of random chunks in that tier."""
    from ..calibration.io_rates import MODEL, fill_store
    from ..runtime.chunk_store import ChunkStore

    with (
        tempfile.TemporaryDirectory(prefix="store-", dir=folder) as root,
        closing(ChunkStore(Path(root), MODEL, "io", [config])) as store,
    ):
        yield store, fill_store(store, config.name, n_bytes)


def _files(ask: _Ask, tell: Progress) -> list[Series]:
    """O_DIRECT: the store, the bare system call and fio."""
    from ..calibration.ceilings import random_file
    from ..calibration.io_rates import compare_files
    from ..runtime.tiers import TierConfig
    from .console import warn

    file = TierConfig("file", "file")
    with (
        _filled(ask.folder, file, ask.n_bytes) as (store, keys),
        random_file(ask.folder, ask.n_bytes) as raw,
    ):
        if not store.is_unbuffered("file"):
            warn(
                f"{ask.folder} refuses O_DIRECT: no rates of files; name another --folder for them"
            )
            return []
        return compare_files(
            store, keys, "file", raw, ask.workers, ask.request_bytes, ask.rounds, ask.seconds, tell
        )


def _cached(ask: _Ask, tell: Progress) -> list[Series]:
    """The same through the page cache, everything in it."""
    from ..calibration.ceilings import random_file
    from ..calibration.io_rates import Series, by_threads, file_reader, run_rounds, store_reader
    from ..runtime.tiers import TierConfig
    from .bench_machine import read_buffered

    file = TierConfig("file", "file")
    with (
        _filled(ask.folder, file, ask.n_bytes) as (store, keys),
        random_file(ask.folder, ask.n_bytes) as raw,
    ):
        read_buffered(store, "file")
        raw.read_bytes()
        readers = {
            "preadv": file_reader(raw, ask.request_bytes, direct=False),
            "store": store_reader(store, keys, "file", ask.request_bytes),
        }
        contenders = [
            (Series(name, n), by_threads(n, read))
            for n in CACHED_WORKERS
            for name, read in readers.items()
        ]
        return run_rounds(contenders, ask.rounds, ask.seconds, tell)


def _redis(ask: _Ask, tell: Progress) -> list[Series]:
    """A server of our own, where one is installed: bare GETs, and the store's remote tier."""
    from ..calibration.io_rates import Series, by_threads, run_rounds, store_reader
    from ..calibration.redis_rates import RedisServer, redis_reader
    from ..runtime.tiers import TierConfig
    from .console import warn

    server = RedisServer.start()
    if server is None:
        warn("neither redis-server nor valkey-server is installed: no rates of a server")
        return []
    with server:
        get = redis_reader(server.port, REDIS_VALUES)
        bare = [(Series("bare GET", n), by_threads(n, get)) for n in REDIS_WORKERS]
        found = run_rounds(bare, ask.rounds, ask.seconds, tell)
        config = TierConfig("redis", "remote", url=f"redis://127.0.0.1:{server.port}")
        with _filled(ask.folder, config, min(ask.n_bytes, REDIS_BYTES)) as (store, keys):
            read = store_reader(store, keys, "redis", ask.request_bytes)
            ours = [(Series("store", n), by_threads(n, read)) for n in REDIS_WORKERS]
            return found + run_rounds(ours, ask.rounds, ask.seconds, tell)


def _row(series: Series, medium: str, ceiling: Ceiling | None) -> dict[str, Any]:
    import numpy as np

    low, middle, high = (float(x) for x in np.percentile(series.rates, [25, 50, 75]))
    return {
        "medium": medium,
        "contender": series.contender,
        "workers": series.workers,
        "GB/s": middle / 1e9,
        "q25": low / 1e9,
        "q75": high / 1e9,
        "n": len(series.rates),
        "of_fio": None,
        "of_ceiling": middle / ceiling.rate if ceiling is not None else None,
        "ceiling": ceiling.name if ceiling is not None else None,
        "rates": series.rates,
    }


def _file_rows(files: list[Series], found: dict[str, Ceiling]) -> list[dict[str, Any]]:
    from ..calibration.io_rates import paired_share

    fio = {s.workers: s for s in files if s.contender == "fio psync"}
    rows = []
    for series in files:
        row = _row(series, "file, O_DIRECT", found.get("disk"))
        if series.workers in fio and not series.contender.startswith("fio"):
            row["of_fio"] = paired_share(series, fio[series.workers])
        rows.append(row)
    return rows


def _link_rows(found: dict[str, Ceiling]) -> list[dict[str, Any]]:
    from ..calibration import link_rates as link

    rows = []
    for one in link.host_to_device():
        ceiling, (must, goal) = found[one.ceiling], one.goals
        rate = one.piece_bytes * one.n_pieces
        rows.append(
            {
                "medium": f"host to device, {one.piece_bytes >> 10}-KiB pieces",
                "contender": one.path,
                "workers": None,
                "GB/s": one.rate / 1e9,
                "q25": rate / one.took.high / 1e9,
                "q75": rate / one.took.low / 1e9,
                "n": one.took.n,
                "of_fio": None,
                "of_ceiling": one.rate / ceiling.rate,
                "ceiling": ceiling.name,
                "must": must,
                "goal": goal,
                "met": None if must is None else one.rate / ceiling.rate >= must,
            }
        )
    return rows


def _headline(files: list[Series]) -> dict[str, Any]:
    """Our best number of workers over fio's best of all its ways; None without fio."""
    from statistics import median

    from ..calibration.io_rates import best

    ours, theirs = best(files, "store"), best(files, "fio")
    if ours is None:
        return {"of_fio": None, "must": FIO_MUST, "met": None}
    share = median(ours.rates) / median(theirs.rates) if theirs is not None else None
    return {
        "store_workers": ours.workers,
        "store_gb_per_s": median(ours.rates) / 1e9,
        "fio": f"{theirs.contender} x{theirs.workers}" if theirs is not None else None,
        "fio_gb_per_s": median(theirs.rates) / 1e9 if theirs is not None else None,
        "of_fio": share,
        "must": FIO_MUST,
        "met": share >= FIO_MUST if share is not None else None,
    }
