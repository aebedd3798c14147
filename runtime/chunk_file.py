"""The chunk file: a header, then one blob of checksummed row groups per layer.

    header   32 bytes fixed | JSON meta | order int32 [N] | zeros to 4 KiB
    blob     group 0 | group 1 | ... | zeros to 4 KiB                       (one per layer)
    group    K [32, HK, D] | V [32, HK, D] | xxh3 of both     (or packed: packed_groups.py)

Row i of a blob is token `order[i]` of the chunk; the last group is filled up with zeros. A
checksum is seeded with the key, the order, the layer and the group number, so a group that lies in
the wrong place, or that is read with another order, fails like one with a flipped bit. Sizes come
from core/layout.py. Little endian throughout.
"""

from __future__ import annotations

import errno
import json
import os
import struct
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_64, xxh3_64_intdigest

from ..core.errors import StoreError
from ..core.layout import ALIGN_BYTES, GROUP_TOKENS, group_bytes
from ..core.model_spec import ModelSpec
from ..core.units import ceil_div, round_up
from .device import CPU, Device
from .packed_groups import PackedGroups, fill_groups

CHUNK_SUFFIX = ".chunk"
TEMP_SUFFIX = ".tmp"
MAGIC = b"CTCHUNK\0"
FORMAT_VERSION = 2
"""Version 1 had checksums that did not know of the order."""
FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
_FIXED = struct.Struct("<8sIIIIQ")
_CHECKSUM = struct.Struct("<Q")
_CHECKSUM_AT = _FIXED.size - _CHECKSUM.size
_ORDER_ALIGN = 64


class ChunkCorrupt(StoreError):
    """The bytes of a chunk are not what was written: flipped, cut off, swapped or missing.

    `layer` and `group` are None when the whole file or its header is bad.
    """

    def __init__(
        self, key: str, why: str, layer: int | None = None, group: int | None = None
    ) -> None:
        self.key = key
        self.layer = layer
        self.group = group
        where = "" if layer is None else f" layer {layer}"
        super().__init__(
            "every row read from the chunk store must match its checksum",
            values=f"chunk {key}{where}: {why}",
            remedy="discard the chunk and encode it again",
        )


@dataclass(frozen=True)
class ChunkMeta:
    """What a chunk file says of itself. `shape` is (layers, kv heads, head dim)."""

    key: str
    content_id: str
    n_tokens: int
    model_fingerprint: str
    shape: tuple[int, int, int]
    dtype: str
    kind: Literal["isolated", "prefix"]
    chain: str
    order_name: str
    tenant_id: str
    tier: str


def encode_header(meta: ChunkMeta, order: np.ndarray) -> bytes:
    """The header with `order` int32 [N], padded to 4 KiB."""
    text = json.dumps(asdict(meta), sort_keys=True).encode()
    order_at = round_up(_FIXED.size + len(text), _ORDER_ALIGN)
    size = round_up(order_at + 4 * meta.n_tokens, ALIGN_BYTES)
    data = bytearray(size)
    _FIXED.pack_into(data, 0, MAGIC, FORMAT_VERSION, size, len(text), meta.n_tokens, 0)
    data[_FIXED.size : _FIXED.size + len(text)] = text
    data[order_at : order_at + 4 * meta.n_tokens] = order.astype("<i4").tobytes()
    _CHECKSUM.pack_into(data, _CHECKSUM_AT, _header_checksum(data))
    return bytes(data)


def _header_size(start: bytes, key: str, file_bytes: int) -> int:
    """Bytes of the header whose first `ALIGN_BYTES` (or fewer) are `start`.

    Raises:
        ChunkCorrupt: no chunk file, another format version, or longer than the file.
    """
    if len(start) < _FIXED.size:
        raise ChunkCorrupt(key, f"the file ends after {len(start)} bytes")
    size: int
    magic, version, size, n_text, n_tokens, _ = _FIXED.unpack_from(start)
    if magic != MAGIC or version != FORMAT_VERSION:
        raise ChunkCorrupt(key, f"not a chunk file of format {FORMAT_VERSION}")
    need = round_up(round_up(_FIXED.size + n_text, _ORDER_ALIGN) + 4 * n_tokens, ALIGN_BYTES)
    if size != need or size > file_bytes:
        raise ChunkCorrupt(key, f"header of {size} bytes in a file of {file_bytes}")
    return size


def decode_header(data: bytes, key: str) -> tuple[ChunkMeta, np.ndarray]:
    """Meta and order (int32 [N]) of a whole header.

    Raises:
        ChunkCorrupt: cut off, a checksum that does not match, or the header of another chunk.
    """
    if _header_size(data, key, len(data)) != len(data):
        raise ChunkCorrupt(key, f"a header of {len(data)} bytes")
    *_, n_text, n_tokens, stored = _FIXED.unpack_from(data)
    if _header_checksum(data) != stored:
        raise ChunkCorrupt(key, "the header's checksum does not match")
    fields = json.loads(data[_FIXED.size : _FIXED.size + n_text])
    meta = ChunkMeta(**{**fields, "shape": tuple(fields["shape"])})
    if meta.key != key:
        raise ChunkCorrupt(key, f"the file holds chunk {meta.key}")
    order_at = round_up(_FIXED.size + n_text, _ORDER_ALIGN)
    return meta, np.frombuffer(data, dtype="<i4", count=n_tokens, offset=order_at)


def read_header(path: Path) -> tuple[ChunkMeta, np.ndarray, int]:
    """Meta, order int32 [N] and header bytes of a chunk file, verified.

    Raises:
        ChunkCorrupt: cut off, another chunk's, or a checksum that does not match.
        OSError: the file cannot be read.
    """
    key = path.name.removesuffix(CHUNK_SUFFIX)
    with path.open("rb", buffering=0) as f:
        start = f.read(ALIGN_BYTES)
        size = _header_size(start, key, os.fstat(f.fileno()).st_size)
        data = start + f.read(size - len(start))
    if len(data) != size:
        raise ChunkCorrupt(key, f"the file ends after {len(data)} bytes")
    return *decode_header(data, key), size


def header_size(start: bytes) -> int:
    """What the header that begins with `start` says of its size in bytes, unverified."""
    return int(_FIXED.unpack_from(start)[2]) if len(start) >= _FIXED.size else len(start)


def other_version(path: Path) -> int | None:
    """The format version of a sound header that is not of ours; None for anything else.

    The fixed part and its checksum are the same in every version.
    """
    with path.open("rb", buffering=0) as f:
        start = f.read(_FIXED.size)
        if len(start) < _FIXED.size:
            return None
        magic, version, size, *_, stored = _FIXED.unpack(start)
        data = start + f.read(max(0, size - len(start)))
    known = magic != MAGIC or version == FORMAT_VERSION
    return None if known or _header_checksum(data) != stored else int(version)


def write_chunk(path: Path, header: bytes, blobs: np.ndarray) -> None:
    """Write a chunk file whole or not at all, safe on disk when this returns.

    Raises:
        StoreError: no space, no permission; nothing is left behind.
    """
    temp = temp_path(path)
    fd = -1
    try:
        fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        for part in (memoryview(header), blobs.data):
            while part:
                part = part[os.write(fd, part) :]
        os.fsync(fd)
        if hasattr(os, "posix_fadvise"):
            # Kept in the page cache, a fresh chunk would be faster to read than an old one.
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.rename(temp, path)
        sync_folder(path.parent)
    except OSError as e:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        raise cannot_write(path.parent, e) from None
    finally:
        if fd >= 0:
            os.close(fd)
        with suppress(OSError):
            temp.unlink(missing_ok=True)


def temp_path(path: Path) -> Path:
    """Where a chunk file is written before it is whole."""
    return path.with_name(f".{path.name}{TEMP_SUFFIX}")


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` safe on disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def cannot_write(folder: Path, e: OSError) -> StoreError:
    """The error for a folder that refuses to be written to."""
    full = e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "free space or discard chunks" if full else "choose a folder you may write to"
    return StoreError(
        "the chunk store must be able to write", values=f"{folder}: {e.strerror}", remedy=remedy
    )


def _header_checksum(data: bytes | bytearray) -> int:
    state = xxh3_64(bytes(data[:_CHECKSUM_AT]))
    state.update(bytes(data[_FIXED.size :]))
    return state.intdigest()


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of one model's blobs, in bytes and elements."""

    n_layers: int
    n_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    """Of the model's K and V."""
    element_dtype: torch.dtype
    """As what the bytes of a group are looked at: `dtype`, FP8, or uint8 where codes lie."""
    group_bytes: int
    packed: PackedGroups | None = None
    """How codes lie in a group; None where values lie there."""

    @staticmethod
    def of(model: ModelSpec) -> Geometry:
        """The geometry of `model`."""
        dtype: torch.dtype = getattr(torch, model.dtype)
        packed = PackedGroups.of(model) if model.is_packed else None
        element = torch.uint8 if packed else FP8 if model.stored == "fp8" else dtype
        shape = model.n_layers, model.n_kv_heads, model.head_dim
        return Geometry(*shape, dtype, element, group_bytes(model), packed)

    def kept(self, values: Tensor) -> Tensor:
        """K or V as a store that keeps values has them; what FP8 cannot hold saturates."""
        if self.element_dtype == FP8:
            values = values.clamp(-FP8_MAX, FP8_MAX)
        return values.to(self.element_dtype)

    def read_bytes(self, n_rows: int) -> int:
        """`core.layout.read_bytes` for this model, without its look-ups."""
        n_bytes = -(-n_rows // GROUP_TOKENS) * self.group_bytes
        return -(-n_bytes // ALIGN_BYTES) * ALIGN_BYTES

    def groups(self, elements: Tensor, at_byte: int, n_groups: int) -> Tensor:
        """View [G, 2, 32, HK, D] of the groups that start at `at_byte`; axis 1 is K, V."""
        row, item_bytes = self.n_kv_heads * self.head_dim, self.element_dtype.itemsize
        return elements.as_strided(
            (n_groups, 2, GROUP_TOKENS, self.n_kv_heads, self.head_dim),
            (self.group_bytes // item_bytes, GROUP_TOKENS * row, row, self.head_dim, 1),
            at_byte // item_bytes,
        )


def chunk_seed(key: str, order: np.ndarray) -> int:
    """Checksum seed of a chunk whose rows lie in `order`, integers [N]; below 2^63, so adding
    layer and group cannot wrap."""
    return xxh3_64_intdigest(key.encode() + order.astype("<i4").tobytes()) >> 1


def layer_seed(seed: int, layer: int) -> int:
    """Seed of group 0 of `layer`; group g adds g."""
    return seed + (layer << 32)


def first_bad_group(
    data: memoryview, at_byte: int, groups: range, group_size: int, seed: int
) -> int | None:
    """First of `groups` whose checksum fails; `at_byte` is group 0, `seed` that of the layer."""
    payload = group_size - _CHECKSUM.size
    unpack = _CHECKSUM.unpack_from
    at = at_byte + groups.start * group_size
    for group in groups:
        end = at + payload
        if xxh3_64_intdigest(data[at:end], seed + group) != unpack(data, end)[0]:
            return group
        at += group_size
    return None


def check_values(model: ModelSpec, k: Tensor, v: Tensor, order: Tensor) -> None:
    """Check that K and V are what the model's encoder makes of as many tokens as `order` has.

    Raises:
        StoreError: shapes or dtype are not the model's.
    """
    shape, n = Geometry.of(model), order.numel()
    want = (shape.n_layers, n, shape.n_kv_heads, shape.head_dim)
    if n == 0 or tuple(k.shape) != want or tuple(v.shape) != want:
        raise StoreError(
            "K and V of a chunk must be [layers, tokens, kv heads, head dim] with a token or "
            "more, and the order must have one number per token",
            values=f"K {tuple(k.shape)}, V {tuple(v.shape)}, order {tuple(order.shape)}, "
            f"model {want}",
            remedy="store what this model's encoder returns",
        )
    if k.dtype != shape.dtype or v.dtype != shape.dtype:
        raise StoreError(
            f"K and V must have the model's dtype {model.dtype}",
            values=f"{k.dtype} and {v.dtype}",
            remedy="convert them, or open a store for that dtype",
        )


def check_order(order: Tensor) -> Tensor:
    """`order` as int64 [N] on the CPU.

    Raises:
        StoreError: it is no permutation.
    """
    n = order.numel()
    order = order.detach().to("cpu", torch.int64, copy=True)
    if n == 0 or order.dim() != 1 or not torch.equal(order.sort().values, torch.arange(n)):
        raise StoreError(
            f"the order must name each of the {n} tokens once, and one or more",
            values=f"{order.unique().numel()} different numbers",
            remedy="pass a permutation, such as an argsort",
        )
    return order


def fill_blobs(
    shape: Geometry, blobs: Tensor, k: Tensor, v: Tensor, order: Tensor, device: Device = CPU
) -> None:
    """Write rows in stored order into zeroed blobs, all but the checksums.

    All tensors are on `device`, which packs; the bytes are the same on every device.

    Args:
        blobs: uint8 [layers * blob bytes].
        k: keys before RoPE, [layers, N, HK, D] in token order.
        v: values, same shape.
        order: int64 [N]; stored row i is token `order[i]`.
    """
    n_groups, blob = ceil_div(order.numel(), GROUP_TOKENS), shape.read_bytes(order.numel())
    elements = blobs.view(shape.element_dtype)
    for layer, pair in enumerate(zip(k, v, strict=True)):
        rows_k, rows_v = (x.index_select(0, order) for x in pair)
        if shape.packed is not None:
            shape.packed.fill(elements, layer * blob, rows_k, rows_v, device.pack)
        else:
            groups = shape.groups(elements, layer * blob, n_groups)
            fill_groups(groups[:, 0], shape.kept(rows_k))
            fill_groups(groups[:, 1], shape.kept(rows_v))


def seal_blobs(shape: Geometry, seed: int, blobs: np.ndarray, n_tokens: int) -> None:
    """Write the checksums of a chunk of that seed into all its blobs, uint8 [chunk bytes].

    Raises:
        StoreError: they are of another size.
    """
    n_groups, blob = ceil_div(n_tokens, GROUP_TOKENS), shape.read_bytes(n_tokens)
    if blobs.nbytes != shape.n_layers * blob:
        raise StoreError(
            f"the blobs of {n_tokens} tokens must take {shape.n_layers * blob} bytes",
            values=f"{blobs.nbytes} bytes",
            remedy="store what `fill_blobs` makes for this model",
        )
    view = blobs.data
    for layer in range(shape.n_layers):
        start, first = layer_seed(seed, layer), layer * blob
        for group in range(n_groups):
            end = first + shape.group_bytes - _CHECKSUM.size
            _CHECKSUM.pack_into(view, end, xxh3_64_intdigest(view[first:end], start + group))
            first += shape.group_bytes
