"""`EncodedKv`: K before RoPE and V of encoded tokens, on the devices that computed them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .chunk_file import Geometry, fill_blobs
from .device import Device

INGEST = "ingest"
"""Why the host waits."""


@dataclass(frozen=True)
class EncodedPart:
    """Layers of one device: K and V, `[layers, N, HK, D]` each, there."""

    device: Device
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class EncodedKv:
    """All layers, in order: a part for each stage of the pipeline."""

    parts: tuple[EncodedPart, ...]

    @property
    def on_host(self) -> bool:
        """Whether they were computed in host memory."""
        return self.parts[0].device.kind == "cpu"

    @cached_property
    def host_k(self) -> Tensor:
        """K, `[L, N, HK, D]`, on the host; downloaded at its first use."""
        return _joined([p.device.to_host(p.k, INGEST) for p in self.parts])

    @cached_property
    def host_v(self) -> Tensor:
        """V, likewise."""
        return _joined([p.device.to_host(p.v, INGEST) for p in self.parts])

    def tokens(self, start: int, stop: int) -> EncodedKv:
        """Views of tokens `start .. stop`."""
        cut = slice(start, stop)
        return EncodedKv(tuple(EncodedPart(p.device, p.k[:, cut], p.v[:, cut]) for p in self.parts))

    def wait(self) -> None:
        """Return when they are computed."""
        for part in self.parts:
            part.device.synchronise(INGEST)

    def blobs(self, shape: Geometry, order: Tensor) -> np.ndarray:
        """A chunk's blobs in stored order, uint8 `[chunk bytes]` on the host, without checksums.

        Each device gathers and packs its own layers; nothing else is downloaded.

        Args:
            order: int64 `[N]`, on the host; stored row i is token `order[i]`.
        """
        blob, found = shape.read_bytes(order.numel()), []
        for part in self.parts:
            device = part.device
            blobs = device.empty((part.k.shape[0] * blob,), torch.uint8).zero_()
            fill_blobs(shape, blobs, part.k, part.v, device.upload(order), device)
            found.append(device.to_host(blobs, INGEST))
        return _joined(found).numpy()


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
