"""The steps of `make gpu`: correctness, limits, benchmarks, then calibrate, tune, run, check.

Each is a command of its own with a limit of nine minutes; what was done is stamped, so a stopped
suite goes on where it was. Without a GPU the same steps run on tiny shapes, to be seen to run.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT_S = 540
LEAST_S = 30
"""A step that would have less is not begun."""
FIRST = "correctness"
ORDER = (
    FIRST, "ttft-8b-8k-dram", "kernels-attention", "kernels-restore", "loop-calibrate", "loop-tune",
    "loop-run", "ttft-8b-32k-dram", "kernels-pack", "kernels-decode", "io", "throughput-8b-8k",
    "ttft-8b-16k-dram", "loop-fidelity",
)  # fmt: skip
"""On a GPU these come first: time on one is often too short for all of it."""
CHECKED = ("tests/kernels", "tests/runtime", "tests/executors")
"""Where the tests of a real GPU are; others may need packages that a GPU machine lacks."""
STAMPS = Path("build/gpu")
DRY_RUN = Path("build/gpu-dry-run")
"""Results of tiny shapes are none, so they never get into `results/`."""
MODEL = "llama-3.1-8b"
TINY = "llama-tiny"
OTHER_MODELS = ("mistral-7b", "qwen2.5-32b")
PROMPTS = {"8k": 16, "16k": 32, "32k": 64}
"""Chunks of 512 tokens."""
IO = ["--io-workers", "8", "--layer-group", "2"]
"""One thread verifies less than a link of PCIe 5 carries, and a file wants several reads."""
LOOP_TIERS = "rho0.1,rho0.7,rho4,rho25"


@dataclass(frozen=True)
class Step:
    """One command: what comes after `python -m`."""

    name: str
    argv: tuple[str, ...]


def steps(device: str, folder: Path) -> list[Step]:
    """All steps for that device, results in `folder`; full-size on a GPU, tiny elsewhere."""
    # Most of the time of those tests is the compiler's; each process compiles for itself.
    parallel = device == "cuda" and importlib.util.find_spec("xdist") is not None
    several = ("-n", "4") if parallel else ()
    found = [Step(FIRST, ("pytest", "-m", "gpu", "-q", *several, *CHECKED))]
    found += [_bench(name, folder, *args) for name, args in _kernels(device).items()]
    found.append(_bench("io", folder, *_io(device, folder)))
    found += [_bench(name, folder, *args) for name, args in _ttft(device).items()]
    found += [_bench(name, folder, *args) for name, args in _throughput(device).items()]
    found += _loop(device, folder)
    return sorted(found, key=lambda s: ORDER.index(s.name) if s.name in ORDER else len(ORDER))


def _bench(name: str, folder: Path, *args: str) -> Step:
    kind = name.split("-")[0]
    out = folder / f"{name}.json"
    return Step(name, ("cachetune", "bench", kind, *args, "--out", str(out)))


def _kernels(device: str) -> dict[str, list[str]]:
    groups = {
        "kernels-attention": "sparse_attention",
        "kernels-restore": "restore,deviation,gather_host",
        "kernels-pack": "pack",
        "kernels-decode": "decode_quantised,decode_pooled",
    }
    small = [] if device == "cuda" else ["--smaller-by", "128", "--repeats", "3"]
    return {
        name: ["--device", device, "--only", only, "--peers", "first", *small]
        for name, only in groups.items()
    }


def _io(device: str, folder: Path) -> list[str]:
    place = ["--device", device, "--folder", str(STAMPS / "io")]
    if device == "cuda":
        return [*place, "--size-mib", "1024", "--workers", "1,4,8", "--seconds", "0.3"]
    return [*place, "--size-mib", "32", "--workers", "1,4", "--rounds", "2", "--seconds", "0.1"]


def _ttft(device: str) -> dict[str, list[str]]:
    """Per prompt length: on the device, in DRAM, in files; slower tiers and other models at 8k."""
    if device != "cuda":
        small = ["--device", device, "--model", TINY, "--chunks", "4", "--chunk-tokens", "64"]
        every = ["--tiers", "device,dram,file,file-cached"]
        return {"ttft-tiny": [*small, *every, "--repeats", "1", "--rhos", "0.7"]}
    found: dict[str, list[str]] = {}
    for length, chunks in PROMPTS.items():
        base = ["--device", "cuda", "--model", MODEL, "--chunks", str(chunks), *IO]
        for tier in ("device", "dram", "file"):
            found[f"ttft-8b-{length}-{tier}"] = [*base, "--tiers", tier, "--rhos", ""]
    eight = ["--device", "cuda", "--chunks", str(PROMPTS["8k"]), *IO]
    found["ttft-8b-8k-cached"] = [*eight, "--model", MODEL, "--tiers", "file-cached", "--rhos", ""]
    found["ttft-8b-8k-slower"] = [*eight, "--model", MODEL, "--tiers", ""]
    for model in OTHER_MODELS:
        found[f"ttft-{model}-8k"] = [*eight, "--model", model, "--tiers", "dram", "--rhos", ""]
    return found


def _throughput(device: str) -> dict[str, list[str]]:
    if device != "cuda":
        small = ["--model", TINY, "--chunks", "4", "--chunk-tokens", "64", "--repeats", "1"]
        return {"throughput-tiny": ["--device", device, *small]}
    base = ["--device", "cuda", "--model", MODEL, "--chunks", str(PROMPTS["8k"]), *IO]
    load = ["--chunk-tokens", "512", "--requests", "16", "--contents", "24"]
    return {"throughput-8b-8k": [*base, *load, "--output-tokens", "8"]}


def _loop(device: str, folder: Path) -> list[Step]:
    """Calibrate; tune, confirmed for real; run the tuned plan; a grid of fixed plans; held-out
    schedules predicted, then measured."""
    cuda = device == "cuda"
    model = MODEL if cuda else TINY
    profile, plan = str(folder / "profile.json"), str(folder / "plan.json")
    on = ["--device", device]
    tokens = "4096" if cuda else "128"  # held-out prompts are up to twice as long
    calibrate = ["cachetune", "calibrate", "--model", model, *on, "--max-tokens", tokens]
    calibrate += ["--dtype", "bfloat16" if cuda else "float32"]
    repeats = [] if cuda else ["--repeats", "1"]
    tier = "rho0.7"
    trials = "150" if cuda else "20"
    tune = ["cachetune", "tune", "--profile", profile, "--tier", tier, "--model", model, *on]
    tune += ["--trials", trials, "--confirm", "4" if cuda else "2", "--out", plan]
    run = ["cachetune", "run", "--model", model, "--plan", plan, "--profile", profile, *on]
    run += ["--trace", str(folder / "run-trace.json")]
    grid = ["cachetune", "bench", "grid", "--model", model, *on, "--profile", profile]
    grid += ["--tiers", LOOP_TIERS if cuda else tier, "--trials", trials]
    grid += ["--chunk-tokens", "512" if cuda else "32"]
    grid += ["--work", str(STAMPS / folder.name / "grid")]
    check = ["--profile", profile, "--check", "--check-out", str(folder / "fidelity")]
    return [
        Step("loop-calibrate", (*calibrate, *repeats, "--out", profile)),
        Step("loop-tune", tuple(tune)),
        Step("loop-run", tuple(run)),
        Step("loop-grid", (*grid, "--out", str(folder / "grid"))),
        Step("loop-fidelity", (*calibrate, *check, "--seed", "11")),
    ]


@dataclass(frozen=True)
class Stamps:
    """What has been done, kept by step; a step counts if its command is still the same."""

    folder: Path

    def read(self, step: Step) -> dict[str, Any] | None:
        """The stamp of a step that ended well, whose result is still there."""
        found = self.last(step)
        made = [Path(b) for a, b in zip(step.argv, step.argv[1:], strict=False) if a == "--out"]
        is_done = found is not None and found["status"] == "ok" and all(p.exists() for p in made)
        return found if is_done else None

    def last(self, step: Step) -> dict[str, Any] | None:
        """The stamp of a step that ran, however it ended."""
        path = self.folder / f"{step.name}.json"
        if not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found if found["argv"] == list(step.argv) else None

    def write(self, step: Step, status: str, seconds: float) -> dict[str, Any]:
        """Stamp a step."""
        from ..core.record import write_json

        stamp = {"step": step.name, "status": status, "seconds": round(seconds, 1)}
        data = {**stamp, "argv": list(step.argv)}
        path = self.folder / f"{step.name}.json"
        write_json(path, data)
        return stamp

    def log(self, step: Step) -> Path:
        """Where a step's output goes."""
        return self.folder / f"{step.name}.log"


def run_step(step: Step, log: Path, limit_s: float = LIMIT_S) -> tuple[str, float]:
    """Run a step, its output on stderr and in `log`; returns how it ended and how long it took.

    A step that exceeds the limit is ended together with all that it started. Its temporary files
    are beside the log, and go with it: a store of long prompts that stayed would fill the disk.
    """
    room = log.parent.absolute() / "tmp"
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir(parents=True)
    began = time.monotonic()
    late = threading.Event()
    with log.open("wb") as kept:
        process = subprocess.Popen(
            [sys.executable, "-m", *step.argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=_environment() | {"TMPDIR": str(room)},
            # A group, to be ended as one; a session of its own would outlive whoever ends ours and
            # go on using the GPU beside the steps of the next call.
            process_group=0,
        )

        def end() -> None:
            late.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(limit_s, end)
        timer.start()
        try:
            with _raising_sigterm():
                assert process.stdout is not None
                for line in process.stdout:
                    kept.write(line)
                    sys.stderr.write(line.decode(errors="replace"))
                status = process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            timer.cancel()
            shutil.rmtree(room, ignore_errors=True)
    took = time.monotonic() - began
    if late.is_set():
        return f"over {limit_s:.0f} s", took
    return ("ok" if status == 0 else f"exit {status}"), took


@contextmanager
def _raising_sigterm() -> Iterator[None]:
    """Within the block the signal ends us as an exception does, so that a step ends with us."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def proves_nothing(log: Path) -> str:
    """Why tests without a failure say nothing of a GPU; empty if they do."""
    text = log.read_text(encoding="utf-8", errors="replace")
    if not re.search(r"\b[1-9]\d* passed", text):
        return "no test ran"
    return "a package is missing" if re.search(r"^SKIPPED .*not installed", text, re.M) else ""


def _environment() -> dict[str, str]:
    """The caller's, with this very package found first."""
    package = Path(__file__).absolute().parent.parent.parent
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def chosen(all_steps: Sequence[Step], names: str) -> list[Step]:
    """Steps by name or by the beginning of it, by comma; all for an empty text.

    Raises:
        CacheTuneError: nothing begins with a name.
    """
    from ..core.errors import CacheTuneError

    wanted = [n.strip() for n in names.split(",") if n.strip()]
    for name in wanted:
        if not any(step.name.startswith(name) for step in all_steps):
            raise CacheTuneError(
                "--step must name steps of the suite",
                values=name,
                remedy=f"choose from {', '.join(s.name for s in all_steps)}",
            )
    return [s for s in all_steps if not wanted or any(s.name.startswith(n) for n in wanted)]
