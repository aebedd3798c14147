"""`HardwareProfile`: what a machine does, measured; the file calibration makes and tuning reads."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from .errors import CacheTuneError, ProfileError
from .model_spec import ModelSpec
from .record import Document, Record


class Coefficient(Record):
    """One fitted number with its 95 % interval. `unit` is what it multiplies into seconds."""

    value: float = Field(ge=0)
    unit: str
    low: float
    high: float
    source: Literal["measured", "datasheet", "assumed"] = "measured"


class Tier(Record):
    """Where chunks can lie. `link_bytes_per_s` is shared by all its I/O workers."""

    medium: Literal["device", "dram", "file", "remote"]
    link_bytes_per_s: float = Field(gt=0)
    worker_bytes_per_s: float = Field(gt=0)
    read_latency_s: float = Field(ge=0)
    capacity_bytes: int | None = None
    limited: bool = False
    """True when a rate limiter makes a faster medium act as this tier; results say so."""
    rho: float | None = None
    """Transfer over recompute time per token, t_i / t_c (paper CacheTune, section 4.3)."""
    unbuffered: bool | None = None
    """For files: whether reads bypass the page cache."""


class Device(Record):
    """The machine, in words and counts that make up its fingerprint."""

    name: str
    kind: Literal["cpu", "cuda"]
    n_cores: int = Field(gt=0)
    memory_bytes: int = Field(gt=0)
    compute_threads: int = Field(gt=0)


class FitReport(Record):
    """How well one op kind is explained by its coefficients on the probes."""

    n_spans: int
    r2: float
    error_median: float
    """Median absolute relative error, a fraction."""


class Provenance(Record):
    """Where a number comes from: enough to make it again."""

    command: str
    commit: str
    machine: str
    versions: dict[str, str]
    date: str
    seed: int


class HardwareProfile(Document):
    """Tiers, fitted coefficients and their error, for one machine and one model."""

    document: ClassVar[str] = "profile"
    version: ClassVar[int] = 1
    error: ClassVar[type[CacheTuneError]] = ProfileError

    name: str
    device: Device
    model: ModelSpec
    model_fingerprint: str
    tiers: dict[str, Tier]
    coefficients: dict[str, Coefficient]
    """By `kind.feature`, see simulator/cost.py."""
    fits: dict[str, FitReport]
    provenance: Provenance

    @property
    def hardware_fingerprint(self) -> str:
        """Identity of the machine a plan was tuned for."""
        return self.device.fingerprint()

    def tier(self, name: str) -> Tier:
        """The tier called `name`.

        Raises:
            ProfileError: no such tier; lists those there are.
        """
        if name not in self.tiers:
            raise ProfileError(
                f"the tier must be one of {', '.join(sorted(self.tiers))}",
                values=repr(name),
                remedy="name one of them, or calibrate with that tier",
            )
        return self.tiers[name]
