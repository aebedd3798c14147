"""`GpuSheet`: what a GPU's data sheet says, and the sheets that ship with the package."""

from __future__ import annotations

import difflib
import json
import math
from functools import cache
from importlib.resources import files

from ..core.errors import ProfileError
from ..core.record import Record

FOLDER = files(__package__).joinpath("gpus")
"""Data sheets and fitted kernels that ship with the package."""


class GpuSheet(Record):
    """Peaks of one GPU, dense (not sparse) figures."""

    name: str
    bf16_flops: float
    """Tensor-core bf16 with fp32 accumulation, per second."""
    fp8_flops: float | None = None
    memory_bytes_per_s: float
    n_sms: int
    link_bytes_per_s: float
    """To another GPU of the node, one direction."""
    source: str

    def model_post_init(self, _context: object) -> None:
        """Peaks are above zero.

        Raises:
            ProfileError: one is not.
        """
        for name in ("bf16_flops", "memory_bytes_per_s", "n_sms", "link_bytes_per_s"):
            if getattr(self, name) <= 0:
                raise ProfileError(
                    f"{name} of {self.name} must be above zero",
                    values=str(getattr(self, name)),
                    remedy="correct the data sheet",
                )

    def peak_flops(self, dtype: str) -> float:
        """Matmul peak for operands of `dtype`, per second.

        Raises:
            ProfileError: this GPU has no unit for it.
        """
        if dtype in ("bfloat16", "float16"):
            return self.bf16_flops
        if dtype == "fp8" and self.fp8_flops is not None:
            return self.fp8_flops
        raise ProfileError(
            f"{self.name} must have a matmul unit for the dtype",
            values=repr(dtype),
            remedy="use bfloat16, or fp8 on a GPU that has it",
        )

    def distance(self, other: GpuSheet) -> float:
        """How unlike two GPUs are: root of the summed squared log ratios of their peaks."""
        pairs = (
            (self.bf16_flops, other.bf16_flops),
            (self.memory_bytes_per_s, other.memory_bytes_per_s),
            (self.n_sms, other.n_sms),
        )
        return math.sqrt(sum(math.log(a / b) ** 2 for a, b in pairs))


def gpu_sheet(name: str) -> GpuSheet:
    """The shipped sheet called `name`; case, spaces and dashes do not matter.

    Raises:
        ProfileError: no such GPU; names the nearest.
    """
    found = {key_of(n): s for n, s in gpu_sheets().items()}.get(key_of(name))
    if found is None:
        near = difflib.get_close_matches(key_of(name), [key_of(n) for n in gpu_sheets()], 3, 0.4)
        named = [n for n in gpu_sheets() if key_of(n) in near] or sorted(gpu_sheets())
        raise ProfileError(
            "the GPU must be one with a data sheet",
            values=repr(name),
            remedy=f"did you mean {', '.join(named)}? or give a GpuSheet of your own",
        )
    return found


@cache
def gpu_sheets() -> dict[str, GpuSheet]:
    """Shipped sheets by name."""
    data = json.loads(FOLDER.joinpath("sheets.json").read_text(encoding="utf-8"))
    return {row["name"]: GpuSheet.model_validate_json(json.dumps(row)) for row in data["gpus"]}


def key_of(name: str) -> str:
    """A GPU's name without what people write differently; also its file's name."""
    return "".join(c for c in name.casefold() if c.isalnum())
