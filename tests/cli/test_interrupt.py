"""Ctrl-C while a command works: exit 130, one line, and no half-written file."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cachetune.core.workload import Content
from support import make_profile, make_workload

from .file_cases import Case, Run, snapshot

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 120
N_CONTEXTS = 4


@dataclass
class Started:
    """A command in a process of its own; what it says on stderr is in a file."""

    process: subprocess.Popen[bytes]
    stderr: Path

    def wait_for(self, what: Callable[[], bool]) -> None:
        limit = time.monotonic() + PATIENCE_S
        while not what():
            assert self.process.poll() is None, self.stderr.read_text()
            assert time.monotonic() < limit, self.stderr.read_text()
            time.sleep(0.02)

    def interrupt(self) -> list[str]:
        """Ctrl-C; the lines of stderr, once the process has ended with 130."""
        self.process.send_signal(signal.SIGINT)
        status = self.process.wait(PATIENCE_S)
        lines = self.stderr.read_text().splitlines()
        assert status == 130, lines
        assert lines[-1] == "cachetune: interrupted", lines
        return lines[:-1]


Start = Callable[..., Started]


def _default_sigint() -> None:
    """A shell that starts tests in the background has them ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For temporary files of the command, and its stderr."""
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture
def start(scratch: Path) -> Iterator[Start]:
    started: list[subprocess.Popen[bytes]] = []

    def go(*args: object, stdout: str = os.devnull) -> Started:
        stderr = scratch / "stderr"
        (scratch / "tmp").mkdir(exist_ok=True)
        variables = {"PYTHONPATH": str(ROOT / ".typing"), "TMPDIR": str(scratch / "tmp")}
        with stderr.open("wb") as err, open(stdout, "wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "cachetune", *map(str, args)],
                stdout=out,
                stderr=err,
                env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
                preexec_fn=_default_sigint,
            )
        started.append(process)
        return Started(process, stderr)

    yield go
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()
    # Locks of cores are for every process to find; an empty file each stays.
    shared = ("torchinductor", "cachetune-core-")
    left = [p.name for p in scratch.glob("tmp/*") if not p.name.startswith(shared)]
    assert not left


@pytest.mark.parametrize("pause_s", [0.0, 0.3])
def test_simulate(case: Case, start: Start, pause_s: float) -> None:
    trace = case.folder / "trace.json"
    trace.write_text("old")
    long = make_workload([("a", "b")] * 30_000).to_json().encode()
    fifo = case.folder / "workload.json"
    fifo.unlink()
    os.mkfifo(fifo)
    started = start(*case.command(trace=trace))
    with fifo.open("wb") as f:  # opens once the command reads
        f.write(long)
    fifo.unlink()
    before = snapshot(case.folder)
    time.sleep(pause_s)
    assert started.interrupt() == []
    assert snapshot(case.folder) == before


def test_tune(case: Case, start: Start) -> None:
    out = case.folder / "plan.json"
    before = snapshot(case.folder)
    started = start(*case.command("tune", trials=100_000, out=out))
    started.wait_for(lambda: "tuning for" in started.stderr.read_text())
    time.sleep(0.3)
    assert started.interrupt() == ["tuning for dram: 100000 trials", "trials (100000)"]
    assert snapshot(case.folder) == before


def test_calibrate(tmp_path: Path, start: Start) -> None:
    options = ("--model", "llama-tiny", "--max-tokens", 256, "--repeats", 1000)
    started = start("calibrate", *options, "--out", tmp_path / "profile.json")
    started.wait_for(lambda: "probes" in started.stderr.read_text())
    time.sleep(0.1)
    assert len(started.interrupt()) == 1
    assert not snapshot(tmp_path)


def test_run(case: Case, start: Start) -> None:
    """While it serves: the chunks it has stored are good, and it serves them afterwards."""
    pytest.importorskip("torch", reason="run needs the runtime")
    from cachetune.runtime.loaded_model import load_model
    from cachetune.runtime.machine import device_here

    tiny = load_model("llama-tiny")
    profile = make_profile(model=tiny.spec).replace(
        device=device_here(1), model_fingerprint=tiny.fingerprint
    )
    ids = {name: tuple(range(64 * i, 64 * i + 64)) for i, name in enumerate("ab")}
    contents = {name: Content(n_tokens=64, token_ids=t) for name, t in ids.items()}

    def write(n_requests: int) -> None:
        work = make_workload([("a", "b")] * n_requests, output_tokens=20)
        requests = tuple(r.replace(suffix_ids=tuple(range(8))) for r in work.requests)
        work = work.replace(contents=contents, requests=requests)
        Case.write(case.run, case.folder, profile, work)

    write(3000)
    store = case.folder / "store"
    command = case.command("run", model="llama-tiny", store=store, trace=case.folder / "t.json")
    started = start(*command)
    started.wait_for(lambda: len(list(store.glob("chunks/*"))) == len(ids))
    time.sleep(1.0)
    assert started.interrupt() == []
    assert not (case.folder / "t.json").exists() and not list(store.glob("chunks/*.tmp"))
    write(2)
    status, out, err = case.run(*command)
    result = json.loads(out.splitlines()[-1])
    assert (status, result["n_read_failures"], result["n_ended"]) == (0, 0, 2), err


BENCHES: dict[str, tuple[str, ...]] = {
    "demo": ("demo", "--model", "llama-10m"),
    "grid": ("bench", "grid", "--model", "llama-tiny"),
    "serve": ("bench", "serve", "--model", "llama-tiny"),
    "ttft": ("bench", "ttft", "--model", "llama-tiny"),
}


@pytest.mark.parametrize("name", BENCHES)
def test_what_measures_leaves_nothing(
    name: str, tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They run in an empty folder, where parts would be kept."""
    pytest.importorskip("torch", reason="they run a model")
    monkeypatch.chdir(tmp_path)
    started = start(*BENCHES[name], "--out", tmp_path / "out")
    started.wait_for(lambda: bool(started.stderr.read_text()))
    time.sleep(0.2)
    started.interrupt()
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_while_the_command_line_is_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import cachetune.__main__ as entry

    class Interrupts:
        """Ctrl-C as soon as that module is looked for."""

        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name == "cachetune.cli.main":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "cachetune.cli.main")
    monkeypatch.setattr(sys, "meta_path", [Interrupts, *sys.meta_path])
    with pytest.raises(SystemExit) as stop:
        entry.main()
    assert stop.value.code == 130
    assert capsys.readouterr() == ("", "cachetune: interrupted\n")


def test_bench_quality_goes_on_where_it_stopped(run: Run, tmp_path: Path, start: Start) -> None:
    tasks, out = tmp_path / "tasks.jsonl", tmp_path / "quality.json"
    log, raw = tmp_path / "quality.json.partial.jsonl", tmp_path / "quality.raw.jsonl"
    draw = random.Random(0)
    with tasks.open("w") as f:
        for _ in range(N_CONTEXTS):
            chunks = [[draw.randrange(512) for _ in range(24)] for _ in range(3)]
            # With random weights and tied embeddings a token is followed by itself.
            record = {"task": "t", "chunks": chunks, "suffix": [1, 2]}
            f.write(json.dumps({**record, "answer_positions": [1], "answers": [2]}) + "\n")
    command = ("bench", "quality", "--model", "llama-tiny", "--tasks", tasks, "--out", out)
    started = start(*command)
    started.wait_for(lambda: len(contexts(log)) > 0)
    started.interrupt()
    done = contexts(log)
    assert 0 < len(done) < N_CONTEXTS
    assert {p.name for p in tmp_path.iterdir()} == {tasks.name, log.name}
    status, _, err = run(*command)
    assert status == 0, err
    assert out.exists() and not log.exists()
    assert contexts(raw)[: len(done)] == done
    assert sorted(contexts(raw)) == list(range(N_CONTEXTS))


def contexts(log: Path) -> list[int]:
    """In the order of the file, which holds nothing else but its head; a torn line counts not."""
    if not log.exists():
        return []
    return [json.loads(line)["context"] for line in log.read_text().split("\n")[1:-1]]


def test_a_full_disk_behind_stdout(case: Case, start: Start) -> None:
    started = start(*case.command(), stdout="/dev/full")
    assert started.process.wait(PATIENCE_S) == 2
    (line,) = started.stderr.read_text().splitlines()
    assert line.startswith("cachetune: the result must be written to stdout, got No space left")
