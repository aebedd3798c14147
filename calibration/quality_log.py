"""The raw tallies of a quality run on disk, one line per context, so that a run can be resumed.

The first line says what is measured; a file of another measurement is refused, not overwritten.
A line that a crash cut short is dropped and its context is asked again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..core.errors import CacheTuneError, WorkloadError
from ..core.record import append_line, canonical_json, write_atomic
from .quality import Arm, Tally

Found = tuple[str, int, list[Tally]]


class QualityLog:
    """Append-only file of (task, context, tallies).

    Args:
        path: made if it is not there.
        identity: model, tasks and seed; two runs with the same one ask the same questions.

    Raises:
        WorkloadError: the file holds another run's lines.
        CacheTuneError: it cannot be written.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.found: list[Found] = []
        """What is in the file, in its order."""
        head = canonical_json(identity)
        lines = _lines(path) or [head]
        if lines[0] != head:
            raise WorkloadError(
                "a run can only be resumed with the model, tasks and seed it began with",
                values=f"{path} begins with {lines[0][:120]}, this run is {head}",
                remedy="remove that file, or choose another --out",
            )
        kept = [head]
        for line in lines[1:]:
            try:
                self.found.append(_parse(line))
            except (ValueError, KeyError, TypeError):
                continue
            kept.append(line)
        write_atomic(path, ("\n".join(kept) + "\n").encode())

    def has(self, task: str, context: int) -> bool:
        """Whether a context has been asked."""
        return any(found[:2] == (task, context) for found in self.found)

    def add(self, found: Found) -> None:
        """Keep a context's tallies, in the file when this returns."""
        task, context, tallies = found
        rows = [[*_key(t.arm), round(t.share, 6), *t.counts] for t in tallies]
        line = canonical_json({"task": task, "context": context, "rows": rows})
        append_line(self.path, line)
        self.found.append(found)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return []
    except OSError as e:
        raise CacheTuneError(
            "the file of raw counts must be readable",
            values=f"{path}: {e.strerror}",
            remedy="choose another --out",
        ) from None


def _key(arm: Arm) -> tuple[str, str, float]:
    return arm.policy, arm.selector, arm.ratio


def _parse(line: str) -> Found:
    data = json.loads(line)
    tallies = []
    for policy, selector, ratio, share, *counts in data["rows"]:
        right_cross, n_cross, right_local, n_local, right, n = counts
        tallies.append(
            Tally(
                Arm(policy, selector, ratio),
                share,
                (right_cross, n_cross, right_local, n_local, right, n),
            )
        )
    return data["task"], data["context"], tallies
