"""Good files in a folder, to be spoilt one at a time, and the commands that read them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachetune.core.hardware import HardwareProfile
from cachetune.core.plan import ReusePlan, TunedPlan
from cachetune.core.workload import Workload

Run = Callable[..., tuple[int, str, str]]
KINDS = ("workload", "plan", "profile")


def snapshot(folder: Path) -> dict[Path, bytes | None]:
    """Every path below `folder` with its bytes."""
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@dataclass
class Case:
    """The folder, and how to run a command line."""

    run: Run
    folder: Path

    def path(self, kind: str) -> Path:
        return self.folder / f"{kind}.json"

    def change(self, kind: str, at: str, value: object) -> None:
        """Set what the dotted `at` names in the file."""
        data = json.loads(self.path(kind).read_text())
        *parents, last = [int(p) if p.isdigit() else p for p in at.split(".")]
        place: Any = data
        for parent in parents:
            place = place[parent]
        place[last] = value
        self.path(kind).write_text(json.dumps(data))

    def command(self, name: str = "simulate", **options: object) -> list[object]:
        """A command line over the files; an option of None is left out."""
        files: Mapping[str, object] = {kind: self.path(kind) for kind in KINDS}
        if name == "tune":
            files = {"profile": files["profile"], "workload": files["workload"], "tier": "dram"}
        out: list[object] = [name]
        for option, value in {**files, **options}.items():
            if value is not None:
                out += [f"--{option.replace('_', '-')}", value]
        return out

    def refused(self, *command: object) -> str:
        """The line that refuses a command."""
        before = snapshot(self.folder)
        status, out, err = self.run(*(command or self.command()))
        assert (status, out) == (2, "")
        assert err.startswith("cachetune: ") and err.count("\n") == 1, err
        assert snapshot(self.folder) == before
        return err

    @classmethod
    def write(cls, run: Run, folder: Path, profile: HardwareProfile, workload: Workload) -> Case:
        """Files that fit one another."""
        case = cls(run, folder)
        profile.write(case.path("profile"))
        workload.write(case.path("workload"))
        TunedPlan(
            plan=ReusePlan(),
            hardware_fingerprint=profile.hardware_fingerprint,
            model_fingerprint=profile.model_fingerprint,
        ).write(case.path("plan"))
        return case
