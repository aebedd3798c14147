"""Long benchmarks in parts: each is written when it is done, and not measured again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

KEPT = Path("build/bench/parts")


class Parts:
    """The parts of one benchmark under one set of settings.

    Args:
        name: of the benchmark.
        settings: whatever would make a part another measurement, as JSON values.
        names: all parts, in their order.
        wanted: those to be measured now, by comma; empty for all.

    Raises:
        CacheTuneError: a part that there is not.
    """

    def __init__(
        self, name: str, settings: Mapping[str, Any], names: Sequence[str], wanted: str = ""
    ) -> None:
        from ..core.errors import CacheTuneError

        text = json.dumps(settings, sort_keys=True)
        self.folder = KEPT / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
        self.names = tuple(names)
        self.wanted = tuple(w.strip() for w in wanted.split(",") if w.strip()) or self.names
        unknown = [w for w in self.wanted if w not in self.names]
        if unknown:
            raise CacheTuneError(
                "--parts must name parts of this benchmark",
                values=", ".join(unknown),
                remedy=f"choose from {', '.join(self.names)}",
            )

    def kept(self, part: str) -> dict[str, Any] | None:
        """A part that was measured before."""
        path = self.folder / f"{part}.json"
        if not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def measure(self, part: str, how: Callable[[], dict[str, Any]], *, fresh: bool) -> None:
        """Measure a wanted part unless it is there; what it was made by is kept with it."""
        from ..core.record import write_atomic
        from .console import note

        if not fresh and self.kept(part) is not None:
            note(f"{part}: measured before; --fresh measures again")
            return
        found = how()
        write_atomic(self.folder / f"{part}.json", (json.dumps(found) + "\n").encode())

    def all(self) -> dict[str, dict[str, Any]]:
        """Every part that there is, by name."""
        found = {part: self.kept(part) for part in self.names}
        return {part: data for part, data in found.items() if data is not None}

    def missing(self) -> list[str]:
        """Parts that have not been measured."""
        return [part for part in self.names if self.kept(part) is None]
