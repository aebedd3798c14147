"""Every single-bit flip of a small chunk file: header, first and last blob, each bit in turn.

Of values as they are, of FP8, and of codes of three bits, whose groups end at an odd place.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch
from cachetune.core.layout import blob_bytes, group_bytes
from cachetune.core.model_spec import PACKED_BITS, ModelSpec
from cachetune.kernels.packing import Per, pack, unpack
from cachetune.runtime.chunk_file import Geometry
from cachetune.runtime.chunk_store import ChunkCorrupt, ChunkStore
from torch import Tensor

from ..runtime import store_cases as cases
from .soak_log import SOAKS, Counts, Soak

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]

N_TOKENS = 21
"""One row group, which is filled up; the order of its tokens lies in the header."""


def regions(store: ChunkStore, n_bytes: int) -> list[tuple[int, int | None]]:
    """(byte of the file, its layer or None in the header) of the header and two blobs."""
    blob, n_layers = blob_bytes(store.model, N_TOKENS), store.model.n_layers
    header = n_bytes - n_layers * blob
    found: list[tuple[int, int | None]] = [(at, None) for at in range(header)]
    for layer in (0, n_layers - 1):
        start = header + layer * blob
        found += [(at, layer) for at in range(start, start + blob)]
    random.Random(0).shuffle(found)
    return found


def is_found(store: ChunkStore, key: str, layer: int | None) -> bool:
    """Whether reading the damaged file says so, from disk and on the way into RAM."""
    n = store.entry(key).n_tokens
    if layer is not None:
        try:
            store.read(key, layer, layer + 1, [n], cases.REQUEST, "disk")
            return False
        except ChunkCorrupt as e:
            if e.layer != layer:
                return False
    try:
        store.place(key, "dram")
    except ChunkCorrupt:
        return True
    store.discard(key)
    return False


def flips_round(store: ChunkStore, key: str, true: tuple[Tensor, Tensor], number: int) -> Counts:
    """All eight bits of this round's share of the bytes, which lie anywhere in the regions."""
    path = cases.chunk_file(store, key)
    good = path.read_bytes()
    payload = group_bytes(store.model)
    blob = blob_bytes(store.model, N_TOKENS)
    header = len(good) - store.model.n_layers * blob
    counts: Counts = {"header_flips": 0, "blob_flips": 0, "padding_flips": 0}
    fd = os.open(path, os.O_WRONLY)
    try:
        for at, layer in regions(store, len(good))[number :: SOAKS["bitflips"]]:
            padding = layer is not None and (at - header) % blob >= payload
            kind = "header" if layer is None else "padding" if padding else "blob"
            for bit in range(8):
                os.pwrite(fd, bytes([good[at] ^ 1 << bit]), at)
                if padding:  # behind the last checksum: no row lies there
                    assert holds(store, key, true), f"byte {at} bit {bit}"
                else:
                    assert is_found(store, key, layer), f"byte {at} bit {bit} went unseen"
                counts[f"{kind}_flips"] += 1
            os.pwrite(fd, good[at : at + 1], at)
    finally:
        os.close(fd)
        path.write_bytes(good)
    assert holds(store, key, true)
    return counts


def expected(model: ModelSpec, chunk: cases.Chunk) -> tuple[Tensor, Tensor]:
    """What reading gives back: K and V as they were put, or what the format makes of them."""
    k, v = chunk.k[:, chunk.order], chunk.v[:, chunk.order]
    if not model.is_packed:
        shape = Geometry.of(model)
        return shape.kept(k).to(k.dtype), shape.kept(v).to(v.dtype)
    return _packed(k, model, "channel"), _packed(v, model, "token")


def _packed(x: Tensor, model: ModelSpec, per: Per) -> Tensor:
    bits = PACKED_BITS[model.stored]
    return torch.stack([unpack(pack(layer, bits, per), x.dtype) for layer in x])


def holds(store: ChunkStore, key: str, true: tuple[Tensor, Tensor]) -> bool:
    """Whether the file gives that back."""
    return all(map(torch.equal, cases.read_all(store, key, "disk"), true))


def test_every_bit(soak: Soak, tmp_path: Path) -> None:
    native = cases.make_model("bfloat16")
    fp8, int3 = native.replace(stored="fp8"), native.replace(stored="int3", head_dim=16)
    models = (native, fp8, int3)
    stores = [cases.open_store(tmp_path / m.stored, m) for m in models]
    chunks = [cases.make_chunk(m, N_TOKENS) for m in models]
    keys = [cases.put(store, "a", chunk) for store, chunk in zip(stores, chunks, strict=True)]
    trues = [expected(m, chunk) for m, chunk in zip(models, chunks, strict=True)]

    def one_round(number: int) -> Counts:
        return {
            f"{store.model.stored}_{name}": count
            for store, key, true in zip(stores, keys, trues, strict=True)
            for name, count in flips_round(store, key, true, number).items()
        }

    soak.run("bitflips", "tests/soak/test_soak_bitflips.py", one_round)
    for store in stores:
        store.close()
