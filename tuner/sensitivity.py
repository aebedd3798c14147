"""What if: one thing of a candidate or of its traffic changed, the rest and the requests the same.

changes("disk=hdd-7200, shared=0.5, stored=int4", question, candidate, catalogue)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.catalogue import Catalogue
from ..core.errors import CacheTuneError
from ..core.machine_spec import DEFAULT_DRAM
from ..core.record import made
from ..core.units import GIB
from .attainment import Attainment
from .candidate import Candidate
from .question import Question
from .trial import Estimate, Trial
from .whatif import task_of

KNOBS = (
    "gpu", "n_gpus", "stages", "link", "dram", "dram_gib", "disk", "network", "policy", "stored",
    "weights", "ratio", "shared", "eviction",
)  # fmt: skip
ALSO = {"format": "stored"}
"""Options of the command under another name than the knob's."""


@dataclass(frozen=True)
class Change:
    """One question of the kind: what if `knob` were `value`?"""

    text: str
    knob: str
    value: str

    def apply(
        self, question: Question, candidate: Candidate, catalogue: Catalogue
    ) -> tuple[Question, Candidate]:
        """Both, changed.

        Raises:
            CacheTuneError: a value that the knob cannot have; unknown names with the nearest.
        """
        if self.knob == "shared":
            traffic = _replaced(question.traffic, self, shared=_number(self))
            return question.replace(traffic=traffic), candidate
        machine = candidate.machine
        if self.knob in ("policy", "stored", "eviction"):
            candidate = _replaced(candidate, self, **{self.knob: self.value})
        elif self.knob == "ratio":
            candidate = _replaced(candidate, self, recompute_ratio=_number(self))
        elif self.knob == "weights":
            engine = _replaced(candidate.engine, self, weights=self.value)
            candidate = _replaced(candidate, self, engine=engine)
        elif self.knob == "dram_gib":
            changed = _replaced(machine, self, dram_limit_bytes=_bytes(self))
            candidate = _replaced(candidate, self, machine=changed)
        elif self.knob == "n_gpus":
            n_gpus = candidate.stages * _count(self)
            changed = _replaced(machine, self, n_gpus=n_gpus)
            candidate = candidate.replace(machine=changed)
        elif self.knob == "stages":
            n_stages, per_stage = _count(self), candidate.gpus_per_stage
            changed = _replaced(machine, self, n_gpus=n_stages * per_stage)
            candidate = _replaced(candidate, self, stages=n_stages, machine=changed)
        elif self.knob == "gpu":
            row = catalogue.gpu(self.value)
            link = catalogue.link(row.link)
            dram = catalogue.dram(DEFAULT_DRAM.get(link.name, "ddr5-4800"))
            candidate = candidate.replace(machine=machine.replace(gpu=row, link=link, dram=dram))
        else:
            part = None if self.value == "none" else getattr(catalogue, self.knob)(self.value)
            changed = _replaced(machine, self, **{self.knob: part})
            candidate = _replaced(candidate, self, machine=changed)
        return question, candidate


def changes(text: str) -> list[Change]:
    """`knob=value` pairs, by commas.

    Raises:
        CacheTuneError: an unknown knob, or no value.
    """
    found = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        knob, _, value = (p.strip() for p in part.partition("="))
        knob = ALSO.get(knob, knob)
        if knob not in KNOBS or not value:
            raise CacheTuneError(
                f"a what-if must be one of {', '.join(KNOBS)}, with a value",
                values=repr(part),
                remedy="for example disk=hdd-7200,shared=0.5,stored=int4",
            )
        found.append(Change(part, knob, value))
    return found


def default_changes(candidate: Candidate) -> list[Change]:
    """The questions people ask first, those that would change this candidate."""
    asked = ["shared=0.5", "shared=0"]
    if candidate.reuses:
        asked += [f"disk={d}" for d in ("hdd-7200", "sata-ssd", "nvme-gen5")]
        asked += [f"stored={s}" for s in ("bf16", "int8", "int4")]
        asked += ["ratio=0.05", "ratio=0.3", "dram=ddr4-3200"]
        disk = candidate.machine.disk
        now = {f"stored={candidate.stored}", f"disk={disk.name if disk else 'none'}"}
        asked = [a for a in asked if a not in now]
    asked += ["weights=fp8"] if candidate.engine.weights != "fp8" else []
    return changes(",".join(asked))


def check_changes(
    asked: Sequence[Change], question: Question, chosen: Sequence[Candidate], catalogue: Catalogue
) -> None:
    """A value that no candidate can take is told before any of them is simulated.

    Raises:
        CacheTuneError: what the first candidate says of it.
    """
    for change in asked:
        refused = [split([change], question, c, catalogue)[1] for c in chosen]
        if all(refused):
            change.apply(question, chosen[0], catalogue)


def split(
    asked: Sequence[Change], question: Question, candidate: Candidate, catalogue: Catalogue
) -> tuple[list[Change], list[dict[str, Any]]]:
    """Changes that the candidate can take, and an effect that says why not for each other."""
    able, unable = [], []
    for change in asked:
        try:
            change.apply(question, candidate, catalogue)
            able.append(change)
        except CacheTuneError as e:
            unable.append(_unknown(change, candidate.fingerprint(), str(e)))
    return able, unable


def _unknown(change: Change, fingerprint: str, why_not: str) -> dict[str, Any]:
    empty = {"ratio": None, "low": None, "high": None}
    return {"what": change.text, "fingerprint": fingerprint, **empty, "why_not": why_not}


def tasks(
    asked: Sequence[Change], question: Question, candidate: Candidate, catalogue: Catalogue
) -> list[dict[str, Any]]:
    """One task per change, without the fleet for the target: capacities are compared.

    The kernels are the same ones, so that their errors cancel, but those of another GPU.
    """
    alone = question.replace(target_rps=None)
    return [
        task_of(
            *change.apply(alone.replace(kernel_band=change.knob == "gpu"), candidate, catalogue)
        )
        for change in asked
    ]


def effects(
    asked: Sequence[Change],
    rows: Sequence[Mapping[str, Any]],
    base: Mapping[str, Any],
    attainment: float,
) -> list[dict[str, Any]]:
    """Capacity with each change over that without, on the same requests, with a 95 % interval."""
    found = []
    for change, row in zip(asked, rows, strict=True):
        unknown = row["why_not"]
        if not unknown and row["at_least"] and base["at_least"]:
            unknown = "runs are too short to show the capacity of either, with it or without"
        if unknown:
            effect = _unknown(change, row["fingerprint"], unknown)
        else:
            seeds = [seed for seed in base["seeds"] if seed in row["seeds"]]
            one, other = (
                Attainment(map(Trial.of, r["trials"]), attainment, seeds) for r in (row, base)
            )
            estimate = one.over(other)
            low: float = estimate.low
            high: float | None = estimate.high
            if change.knob == "gpu":
                low, high = _with_kernels(estimate, row, base)
            effect = {
                "what": change.text,
                "fingerprint": row["fingerprint"],
                "ratio": estimate.value,
                "low": low,
                "high": high,
                "capacity_rps": row["capacity_rps"],
                "usd_per_mtok": row["usd_per_mtok"],
                "ttft_ms_p99": row["at_capacity"]["ttft_ms_p99"],
                "why_not": "",
            }
        found.append(effect)
    return found


def _with_kernels(
    ratio: Estimate, row: Mapping[str, Any], base: Mapping[str, Any]
) -> tuple[float, float | None]:
    """Ends of a ratio with the kernels of both GPUs, which err independently; None: no end."""

    def kernels(of: Mapping[str, Any], end: str) -> float:
        return float(of[f"kernels_{end}_rps"] / of["capacity_rps"])

    down = min(ratio.low / ratio.value, 1.0), kernels(row, "low"), 1 / kernels(base, "high")
    up = max(ratio.high / ratio.value, 1.0), kernels(row, "high"), kernels(base, "low")
    below = 0.0
    if min(down) > 0:
        below = ratio.value * math.exp(-math.hypot(*map(math.log, down)))
    if min(up) <= 0:
        return below, None
    return below, ratio.value * math.exp(math.hypot(*map(math.log, up)))


def _number(change: Change) -> float:
    try:
        return float(change.value)
    except ValueError:
        raise CacheTuneError(f"{change.knob} must be a number", values=repr(change.value)) from None


def _bytes(change: Change) -> int:
    number = _number(change)
    if not 0 < number < 1e9:
        raise CacheTuneError(f"{change.knob} must be above zero", values=repr(change.value))
    return int(number * GIB)


def _count(change: Change) -> int:
    number = _number(change)
    if not 1 <= number <= 64 or number != int(number):
        raise CacheTuneError(f"{change.knob} must be 1 to 64", values=repr(change.value))
    return int(number)


def _replaced(record: Any, change: Change, **fields: Any) -> Any:
    return made(record.replace, f"what if {change.text}", **fields)
