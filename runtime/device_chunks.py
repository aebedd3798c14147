"""`DeviceMemory`: chunks in the memory of the devices themselves, as they are stored.

Blobs lie there as they lie in the file: pre-RoPE, rank order, one contiguous prefix per layer, each
pipeline stage's layers on its own device. Checksums are verified on the host when a chunk is put
there and not again: to verify later the host would have to copy the bytes back and wait, which is
what this tier saves, and they no longer pass what checksums guard against (disks, links, files that
others write). What a GPU's memory does to bits is left to its ECC; one without ECC would serve a
flipped bit unseen. In a dram tier that the chunk was demoted to, every read verifies again.

The allocator of a device may round a chunk up (torch's by up to 2 MiB per stage); a tier's capacity
counts blobs, so leave it that room. A chunk evicted while a request still reads it goes when the
last reader lets go of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..core.errors import CapacityError, StoreError
from .device import Device
from .kv_buffer import Place


@dataclass(frozen=True)
class DevicePart:
    """Some layers of a chunk on one device; `blobs` are uint8 `[layers * blob bytes]`."""

    layer_start: int
    layer_stop: int
    device: Device
    blobs: Tensor


@dataclass(frozen=True)
class DeviceChunk:
    """A chunk on its devices, in the order of its layers."""

    parts: tuple[DevicePart, ...]

    def part(self, layer_start: int, layer_stop: int) -> DevicePart:
        """The part that has all of these layers.

        Raises:
            StoreError: they lie on several devices.
        """
        for part in self.parts:
            if part.layer_start <= layer_start and layer_stop <= part.layer_stop:
                return part
        cuts = ", ".join(f"{p.layer_start}..{p.layer_stop}" for p in self.parts)
        raise StoreError(
            "what is read at once from a device tier must lie on one pipeline stage",
            values=f"layers {layer_start}..{layer_stop}, stages {cuts}",
            remedy="read each stage's layers by themselves",
        )

    def to_host(self, out: np.ndarray) -> None:
        """Copy all blobs to host memory, uint8 `[chunk bytes]`; the host waits."""
        at = 0
        for part in self.parts:
            host = part.device.to_host(part.blobs, "chunk demoted")
            out[at : at + host.numel()] = host.numpy()
            at += host.numel()


class DeviceMemory:
    """Where chunks are put on the devices.

    Args:
        places: layers and the device that holds them, asked anew for each chunk.
    """

    def __init__(self, places: Callable[[], Sequence[Place]]) -> None:
        self._places = places

    def hold(self, blobs: np.ndarray) -> DeviceChunk:
        """A chunk, uint8 `[chunk bytes]`, verified, on its devices; there when this returns.

        Raises:
            CapacityError: a device has no room left.
        """
        places = self._places()
        blob_bytes = blobs.nbytes // sum(n for n, _ in places)
        pages, parts, start = torch.from_numpy(blobs), [], 0
        for n_layers, device in places:
            stop = start + n_layers
            try:
                held = device.hold(pages[start * blob_bytes : stop * blob_bytes])
            except torch.OutOfMemoryError as e:
                raise CapacityError(
                    "chunks of a device tier must fit into its memory, beside weights and KV",
                    values=f"{device.name}: {str(e).splitlines()[0]}",
                    remedy="lower the tier's capacity_bytes, or the KV capacity",
                ) from None
            parts.append(DevicePart(start, stop, device, held))
            start = stop
        return DeviceChunk(tuple(parts))
