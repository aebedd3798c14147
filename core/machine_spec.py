"""`MachineSpec`: this GPU, that disk, that network; composed from rows of the catalogue."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from .catalogue import (
    Catalogue,
    DiskRow,
    DramRow,
    Figure,
    GpuRow,
    LinkRow,
    NetworkRow,
    Price,
)
from .errors import ProfileError
from .record import Record

DEFAULT_DRAM = {"pcie3-x16": "ddr4-3200", "pcie4-x16": "ddr4-3200", "c2c": "lpddr5x-grace"}
"""By host link, of the same age; ddr5-4800 beside the others."""


class MachineSpec(Record):
    """One replica's machine: `n_gpus` of a kind behind one host."""

    gpu: GpuRow
    n_gpus: int = Field(ge=1)
    link: LinkRow
    dram: DramRow
    dram_limit_bytes: int | None = Field(default=None, gt=0)
    """Of the whole host; None takes the row's capacity for each GPU."""
    disk: DiskRow | None = None
    n_disks: int = Field(default=1, ge=1)
    network: NetworkRow | None = None

    @property
    def name(self) -> str:
        """In words: `2 x H100-SXM, pcie5-x16, ddr5-4800, nvme-gen4, 25g-rdma`."""
        gpu = self.gpu.name if self.n_gpus == 1 else f"{self.n_gpus} x {self.gpu.name}"
        disk = self.disk.name if self.disk else "no disk"
        if self.disk and self.n_disks > 1:
            disk = f"{self.n_disks} x {disk}"
        rest = [self.link.name, self.dram.name, disk]
        return ", ".join([gpu, *rest, *([self.network.name] if self.network else [])])

    @property
    def memory_bytes(self) -> Figure:
        """Of one GPU."""
        return self.gpu.memory_bytes

    @property
    def dram_bytes(self) -> int:
        """Of the host, all GPUs together."""
        if self.dram_limit_bytes is not None:
            return self.dram_limit_bytes
        return int(self.dram.capacity_bytes.value) * self.n_gpus

    @property
    def disk_bytes(self) -> int:
        """Of all disks; 0 without one."""
        return int(self.disk.capacity_bytes.value) * self.n_disks if self.disk else 0

    def prices(self) -> Iterator[tuple[str, int, Price]]:
        """(row, number of it, price) of all rows that have one.

        Raises:
            ProfileError: the GPU has none.
        """
        if self.gpu.price is None:
            raise ProfileError(
                "a cost needs a price per GPU-hour",
                values=f"none with a date and source for {self.gpu.name}",
                remedy=f"pass --price {self.gpu.name}=USD_PER_H",
            )
        yield self.gpu.name, self.n_gpus, self.gpu.price
        if self.disk and self.disk.price:
            yield self.disk.name, self.n_disks, self.disk.price
        if self.network and self.network.price:
            yield self.network.name, 1, self.network.price

    @property
    def usd_per_h(self) -> float:
        """Rows without a price come with the rented host; raises as `prices` does."""
        return sum(n * price.usd_per_h for _, n, price in self.prices())

    def provenance(self) -> list[dict[str, object]]:
        """Every figure of the machine: row, name, value, kind, source."""
        found: list[dict[str, object]] = []
        for row in (self.gpu, self.link, self.dram, self.disk, self.network):
            if row is None:
                continue
            for field in type(row).model_fields:
                value = getattr(row, field)
                if isinstance(value, Figure):
                    found.append({"row": row.name, "figure": field, **value.model_dump()})
                elif isinstance(value, Price):
                    figure = {"row": row.name, "figure": "price_usd_per_h"}
                    source = f"{value.source}, {value.as_of}, {value.terms}"
                    found.append({**figure, "value": value.usd_per_h, "kind": "price"})
                    found[-1]["source"] = source
        return found


def compose(
    catalogue: Catalogue,
    gpu: str,
    *,
    n_gpus: int = 1,
    link: str | None = None,
    dram: str | None = None,
    dram_limit_bytes: int | None = None,
    disk: str | None = "nvme-gen4",
    n_disks: int = 1,
    network: str | None = None,
) -> MachineSpec:
    """A machine from names; what is left out is what usually goes with the GPU.

    Raises:
        ProfileError: an unknown name, with the nearest.
    """
    row = catalogue.gpu(gpu)
    host = catalogue.link(link or row.link)
    return MachineSpec(
        gpu=row,
        n_gpus=n_gpus,
        link=host,
        dram=catalogue.dram(dram or DEFAULT_DRAM.get(host.name, "ddr5-4800")),
        dram_limit_bytes=dram_limit_bytes,
        disk=catalogue.disk(disk) if disk else None,
        n_disks=n_disks,
        network=catalogue.network(network) if network else None,
    )
