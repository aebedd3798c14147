"""The hardware catalogue: GPUs, host links, memory, disks, networks; each value with its source.

A `Figure` says whether it was measured, is a data sheet's, or is assumed. A user's JSON file in the
same shape is laid over the shipped rows: what it gives replaces, what it leaves out stays. A bare
number stands for a figure of kind `user`.

    catalogue = load_catalogue("ours.json")
    catalogue.gpu("h100 sxm").memory_bytes.value
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import Field

from .errors import CacheTuneError, ProfileError
from .record import Document, Record, parse_json

FOLDER = files(__package__).joinpath("catalogue_data")
KINDS = ("gpus", "links", "drams", "disks", "networks")


class Figure(Record):
    """One number; its unit is the end of the field's name."""

    value: float = Field(gt=0)
    kind: Literal["measured", "spec", "assumed", "user"]
    source: str


class Price(Record):
    """Dollars per hour of one unit, as they were on a day."""

    usd_per_h: float = Field(gt=0)
    as_of: str
    source: str
    terms: str = "on demand"


class GpuPeaks(Record):
    """Data sheet of a GPU of your own, dense figures; shipped GPUs have simulator/gpus."""

    bf16_flops: float = Field(gt=0)
    fp8_flops: float | None = Field(default=None, gt=0)
    memory_bytes_per_s: float = Field(gt=0)
    n_sms: int = Field(gt=0)
    link_bytes_per_s: float = Field(gt=0)


class GpuRow(Record):
    """One kind of GPU."""

    name: str
    vendor: str
    memory_bytes: Figure
    link: str
    """Host link it usually has."""
    matmul_flops: Figure | None = None
    """Best bf16 matmul anybody measured, per second."""
    price: Price | None = None
    peaks: GpuPeaks | None = None


class LinkRow(Record):
    """Host to GPU, one way unless said."""

    name: str
    raw_bytes_per_s: Figure
    h2d_bytes_per_s: Figure
    d2h_bytes_per_s: Figure
    duplex_bytes_per_s: Figure
    """Both ways together."""
    copy_overhead_s: Figure
    """Each copy, whatever its size."""


class DramRow(Record):
    """Memory of the host."""

    name: str
    read_bytes_per_s: Figure
    capacity_bytes: Figure


class DiskRow(Record):
    """One disk, or an array read as one."""

    name: str
    read_bytes_per_s: Figure
    write_bytes_per_s: Figure
    read_latency_s: Figure
    read_iops: Figure
    capacity_bytes: Figure
    queue_depth: int = Field(gt=0)
    price: Price | None = None
    """Of one disk; None where the price of the GPU covers its host."""


class NetworkRow(Record):
    """To a store that replicas share."""

    name: str
    raw_bits_per_s: Figure
    read_bytes_per_s: Figure
    latency_s: Figure
    price: Price | None = None


Row = TypeVar("Row", GpuRow, LinkRow, DramRow, DiskRow, NetworkRow)


class Catalogue(Document):
    """Rows by name."""

    document: ClassVar[str] = "catalogue"
    version: ClassVar[int] = 1
    error: ClassVar[type[CacheTuneError]] = ProfileError

    gpus: dict[str, GpuRow]
    links: dict[str, LinkRow]
    drams: dict[str, DramRow]
    disks: dict[str, DiskRow]
    networks: dict[str, NetworkRow]

    def gpu(self, name: str) -> GpuRow:
        """The GPU called `name`; case, spaces and dashes do not matter.

        Raises:
            ProfileError: no such row; names the nearest.
        """
        return _find(self.gpus, name, "GPU")

    def link(self, name: str) -> LinkRow:
        """The host link called `name`; raises as `gpu` does."""
        return _find(self.links, name, "host link")

    def dram(self, name: str) -> DramRow:
        """The host memory called `name`; raises as `gpu` does."""
        return _find(self.drams, name, "host memory")

    def disk(self, name: str) -> DiskRow:
        """The disk called `name`; raises as `gpu` does."""
        return _find(self.disks, name, "disk")

    def network(self, name: str) -> NetworkRow:
        """The network called `name`; raises as `gpu` does."""
        return _find(self.networks, name, "network")

    def rows(self) -> Iterable[tuple[str, Record]]:
        """(kind, row) of everything, in the order of the files."""
        for kind in KINDS:
            for row in getattr(self, kind).values():
                yield kind.removesuffix("s"), row


def key_of(name: str) -> str:
    """A name without what people write differently."""
    return "".join(c for c in name.casefold() if c.isalnum())


def nearest(name: str, names: Iterable[str], n: int = 3) -> list[str]:
    """Names most like `name`: those it is a part of first, then by spelling."""
    by_key = {key_of(known): known for known in names}
    key = key_of(name)
    part = [known for k, known in by_key.items() if key and (key in k or k in key)]
    close = [by_key[k] for k in difflib.get_close_matches(key, list(by_key), n, 0.4)]
    return list(dict.fromkeys([*part, *close]))[:n]


def _find(rows: Mapping[str, Row], name: str, what: str) -> Row:
    found = {key_of(known): row for known, row in rows.items()}.get(key_of(name))
    if found is not None:
        return found
    near = nearest(name, rows)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(rows)};"
    raise ProfileError(
        f"the {what} must be one of the catalogue",
        values=repr(name),
        remedy=f"{hint} `cachetune catalogue list` prints all; whatif, replay and tune fleet take "
        "your own by --catalogue",
    )


def load_catalogue(override: str | Path | None = None) -> Catalogue:
    """The shipped catalogue, or it with a user's file laid over it.

    Raises:
        ProfileError: the file cannot be read, is not JSON, has an unknown key or a wrong value.
    """
    if override is None:
        return _shipped()
    try:
        given = parse_json(Path(override).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else str(e)
        raise ProfileError(
            "the catalogue file must be readable JSON", values=f"{override}: {reason}"
        ) from None
    if not isinstance(given, dict) or not all(isinstance(v, dict) for v in _kinds(given)):
        raise ProfileError(
            f"{override} must hold objects by kind",
            values=f"{type(given).__name__}",
            remedy=f"kinds are {', '.join(KINDS)}; rows by name",
        )
    given.pop("schema_version", None)
    return _validated(_laid_over(_raw(), given, f"{override}"), str(override))


def _kinds(given: dict[str, Any]) -> list[Any]:
    return [v for k, v in given.items() if k != "schema_version"]


def _laid_over(base: dict[str, Any], given: dict[str, Any], source: str) -> dict[str, Any]:
    merged = dict(base)
    for kind, rows in given.items():
        known = {key_of(n): n for n in base.get(kind, {})}
        merged[kind] = dict(base.get(kind, {}))
        for name, row in rows.items():
            name = known.get(key_of(name), name)
            old = merged[kind].get(name, {"name": name})
            merged[kind][name] = {**old, **_figures(row, kind, source)}
    return merged


def _figures(row: Any, kind: str, source: str) -> dict[str, Any]:
    """Bare numbers become figures, a bare price a price of no date."""
    if not isinstance(row, dict):
        raise ProfileError(f"each row of {kind} in {source} must be an object", values=repr(row))
    numbers = {k for k, v in row.items() if isinstance(v, int | float) and k != "queue_depth"}
    figures = {k: {"value": row[k], "kind": "user", "source": source} for k in numbers - {"price"}}
    if "price" in numbers:
        price = {"usd_per_h": row["price"], "as_of": "not said", "source": source, "terms": "user"}
        figures["price"] = price
    return {**row, **figures}


def _validated(data: dict[str, Any], source: str) -> Catalogue:
    return Catalogue.parse(json.dumps({"schema_version": Catalogue.version, **data}), source)


@cache
def _raw() -> dict[str, Any]:
    data: dict[str, Any] = {}
    for kind in KINDS:
        data |= json.loads(FOLDER.joinpath(f"{kind}.json").read_text(encoding="utf-8"))
    return data


@cache
def _shipped() -> Catalogue:
    return _validated(_raw(), "the shipped catalogue")
