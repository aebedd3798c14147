"""Rounds of a soak, one row each in `build/soak/`, so that an interrupted run goes on."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "soak"

SOAKS = {"kills": 600, "fuzz_simulated": 2000, "fuzz_real": 600, "load": 30, "bitflips": 128}
"""Rounds of a full run, by name."""

FAILURES_MAX = 10
"""After so many failed rounds a soak stops: one cause is likely behind all."""

Counts = dict[str, float]
"""What a round counted. Names that end in `_max` are maxima, all others add up."""


def code_version() -> str:
    """`git describe`; with changes to Python files, a hash of these in place of `-dirty`."""
    commit = _git("describe", "--always", "--abbrev=12").decode().strip() or "unknown"
    changed = _git("diff", "HEAD", "--", "*.py")
    for name in _git("ls-files", "-o", "-z", "--exclude-standard", "--", "*.py").split(b"\0"):
        if name:
            changed += name + (ROOT / os.fsdecode(name)).read_bytes()
    return f"{commit}-{hashlib.sha256(changed).hexdigest()[:8]}" if changed else commit


def _git(*arguments: str) -> bytes:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return b""
    return done.stdout


class SoakLog:
    """The rows of one soak. Those of another version of the code are kept and not counted."""

    def __init__(self, name: str, version: str, folder: Path = FOLDER) -> None:
        self.name = name
        self.version = version
        self.path = folder / f"{name}.jsonl"
        self._rows = {r["round"]: r for r in self._read() if r["version"] == version}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The last row of each round, by round."""
        return [self._rows[n] for n in sorted(self._rows)]

    def is_done(self, number: int) -> bool:
        """Whether the round has passed; one that failed is run again."""
        row = self._rows.get(number)
        return row is not None and row["outcome"] == "passed"

    def append(self, number: int, outcome: str, seconds: float, counts: Counts) -> None:
        """Write a row, on disk when this returns."""
        row = {
            "round": number,
            "outcome": outcome,
            "seconds": round(seconds, 3),
            "counts": counts,
            "version": self.version,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
            f.flush()
            os.fsync(f.fileno())
        self._rows[number] = row

    def _read(self) -> list[dict[str, Any]]:
        """All rows; a last line that is torn is cut off the file, so that the next starts clean."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.truncate(self.path, len(whole))
        return [json.loads(line) for line in whole.splitlines()]


@dataclass(frozen=True)
class Soak:
    """Runs the rounds of soaks as the options of pytest ask for."""

    version: str
    rounds: int | None = None
    """Most rounds of each; None runs all of `SOAKS`."""
    replay: int | None = None
    folder: Path = FOLDER

    def run(self, name: str, test: str, one_round: Callable[[int], Counts]) -> None:
        """All rounds of a soak that have not passed yet; fails with those that fail.

        Args:
            name: of the soak, one of `SOAKS`.
            test: its id for pytest, to print with a round that fails.
            one_round: what a round does, from its number; raises when something is wrong.
        """
        if self.replay is not None:
            print(f"{name} round {self.replay}: {one_round(self.replay)}")
            return
        log = SoakLog(name, self.version, self.folder)
        failed: list[str] = []
        for number in self._todo(name, log):
            start = time.monotonic()
            try:
                counts = one_round(number)
            except Exception as e:
                log.append(number, f"failed: {e!r}"[:500], time.monotonic() - start, {})
                failed.append(f"round {number}: {e!r}\n  replay: pytest {test} --replay {number}")
                if len(failed) == FAILURES_MAX:
                    break
            else:
                log.append(number, "passed", time.monotonic() - start, counts)
        assert not failed, f"{len(failed)} rounds of {name} failed\n" + "\n".join(failed)

    def _todo(self, name: str, log: SoakLog) -> Sequence[int]:
        n_rounds = SOAKS[name] if self.rounds is None else min(self.rounds, SOAKS[name])
        return [n for n in range(n_rounds) if not log.is_done(n)]


def summary_of(version: str, folder: Path = FOLDER) -> dict[str, Any]:
    """Counts of every soak under this version, and all rows behind them."""
    soaks = {name: _summed(SoakLog(name, version, folder), n) for name, n in SOAKS.items()}
    return {
        "version": version,
        "complete": all(s["passed"] + s["failed"] == s["of"] for s in soaks.values()),
        "seconds": round(sum(s["seconds"] for s in soaks.values()), 1),
        "soaks": soaks,
    }


def _summed(log: SoakLog, n_rounds: int) -> dict[str, Any]:
    rows = [r for r in log.rows if r["round"] < n_rounds]
    names = sorted({name for r in rows for name in r["counts"]})
    counts: Counts = {}
    for name in names:
        values = [r["counts"].get(name, 0) for r in rows]
        counts[name] = max(values) if name.endswith("_max") else round(sum(values), 3)
    bad = [r for r in rows if r["outcome"] != "passed"]
    return {
        "of": n_rounds,
        "passed": len(rows) - len(bad),
        "failed": len(bad),
        "failures": [f"round {r['round']} {r['outcome']}" for r in bad],
        "seconds": round(sum(r["seconds"] for r in rows), 1),
        "counts": counts,
        "columns": ["round", "seconds", *names],
        "rows": [
            [r["round"], r["seconds"], *(r["counts"].get(name, 0) for name in names)] for r in rows
        ],
    }


def summary_text(summary: dict[str, Any]) -> str:
    """JSON that is short to look at: one line per row of a soak's table."""
    lines: list[str] = []

    def held(row: Sequence[Any]) -> str:
        lines.append(json.dumps(row, separators=(",", ":")))
        return f"@{len(lines) - 1}@"

    soaks = {
        name: {**s, "columns": held(s["columns"]), "rows": [held(r) for r in s["rows"]]}
        for name, s in summary["soaks"].items()
    }
    text = json.dumps({**summary, "soaks": soaks}, indent=1)
    return re.sub(r'"@(\d+)@"', lambda m: lines[int(m[1])], text) + "\n"
