"""The `.edgert` file: its byte map, read and written. FORMAT.md is the contract.

Owns: the header, the index and everything about them that is checked before it is believed. Must
not know what a tensor is for, nor how its bytes are made (edgert/pack.py).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from struct import Struct
from types import MappingProxyType
from typing import IO, Literal

from edgert.errors import FormatError, UnsupportedError
from edgert.quant.formats import (
    BY_TYPE_ID,
    CODE_BITS,
    PLANES,
    PlaneFormat,
    QuantFormat,
    format_of,
    part_block_bytes,
)
from edgert.storage.gguf_values import HEADER_MAX, HeaderReader, read_metadata
from edgert.storage.manifest import TILE_ROWS, Extent, Manifest, TensorEntry
from edgert.storage.model_file import open_model_file
from edgert.units import MIB, align_up, format_bytes

__all__ = [
    "HEADER", "MAGIC", "PAGE", "PARTS_MAX", "VERSION",
    "PackHeader", "encode_header", "encode_index", "part_bytes", "read_header", "read_pack",
    "tiles_bytes", "type_id_of",
]  # fmt: skip

# The first byte has its high bit set and the last is a newline: what a transfer as text would
# change is noticed.
MAGIC = b"\x89EDGERT\n"
BYTE_ORDER = 0x0A0B0C0D
VERSION = 2
OLD_CHUNK_BYTES = MIB  # of data for each checksum in version 1, which is read but not written
PAGE = 4096  # tensors and records begin at multiples of it; of data for each checksum
PART = 64  # gate, up and down of a record do at multiples of this
# By their number in the file.
LAYOUTS: tuple[Literal["rows", "tiles", "nested", "mixed"], ...] = (
    "rows", "tiles", "nested", "mixed",
)  # fmt: skip
PARTS_MAX = 4
PLANE_TYPES = 4096  # type ids of plane formats: this + 256 * bits + group

_SUM_STEPS = {1: OLD_CHUNK_BYTES, VERSION: PAGE}  # by version

HEADER = Struct("<8sIIQQQIIIQI")
_SUM = Struct("<I")
_PART = Struct("<IQQ")  # bits of a part or format of a matrix, offset, bytes
_READ_BYTES = 256 * 1024  # of the index at a time: what a budget must hold beside the result
_TENSORS_MAX = 1 << 17
_MATRICES_MAX = 1 << 20  # matrices of stacks counted one by one
_TENSOR_BYTES_MIN = 8 + 1 + 4 + 8 + 4 + 4 + 4 + 24
_NBYTES_MAX = 2**63 - 1

# Bytes a block grows by in tiles: six-bit scales are kept as bytes.
_GROWTH = {"Q3_K": 4, "Q4_K": 4, "Q5_K": 4, "IQ4_XS": 2}


@dataclass(frozen=True, slots=True)
class PackHeader:
    """What the first 64 bytes say, checked against the file."""

    version: int
    file_bytes: int
    index_bytes: int
    data_offset: int
    index_crc: int

    @property
    def sum_step(self) -> int:
        """Bytes of data for each checksum; the last may have fewer."""
        return _SUM_STEPS[self.version]

    @property
    def n_sums(self) -> int:
        """Number of checksums of the data."""
        return -(-(self.file_bytes - self.data_offset) // self.sum_step)


def type_id_of(fmt: QuantFormat) -> int:
    """The number of a format in the tensor table: GGML's, or that of a plane format."""
    if isinstance(fmt, PlaneFormat):
        return PLANE_TYPES + 256 * fmt.bits + fmt.block_size
    return fmt.type_id


_PLANE_OF = {type_id_of(f): f for f in PLANES.values()}
assert not _PLANE_OF.keys() & BY_TYPE_ID.keys()


def tiles_bytes(fmt: QuantFormat, rows: int, columns: int) -> int:
    """Bytes of a matrix in tiles; the last tile is filled up."""
    block = fmt.block_bytes + _GROWTH.get(fmt.name, 0)
    return align_up(rows, TILE_ROWS) * (columns // fmt.block_size) * block


def part_bytes(fmt: QuantFormat, bits: int, is_first: bool, rows: int, columns: int) -> int:
    """Bytes of a part of a nested matrix: its codes, and in the first part the scales."""
    blocks = align_up(rows, TILE_ROWS) * (columns // fmt.block_size)
    return blocks * part_block_bytes(fmt, bits, is_first)


# ---- writing ------------------------------------------------------------------------------------


def encode_header(file_bytes: int, index: bytes, data_offset: int) -> bytes:
    """The 64 bytes of the header. `index`: all of it, checksums of the data included."""
    fields = (
        MAGIC, BYTE_ORDER, VERSION, file_bytes, len(index), data_offset, PAGE,
        zlib.crc32(index), 0, 0,
    )  # fmt: skip
    raw = HEADER.pack(*fields, 0)[:-4]
    return raw + _SUM.pack(zlib.crc32(raw))


def encode_index(n_keys: int, metadata: bytes, tensors: Iterable[TensorEntry]) -> bytes:
    """The index without the checksums that end it. `metadata`: keys and values as GGUF has them."""
    entries = [_encode_entry(t) for t in tensors]
    counts = n_keys.to_bytes(8, "little") + len(entries).to_bytes(8, "little")
    return counts + metadata + b"".join(entries)


def _encode_entry(tensor: TensorEntry) -> bytes:
    name = tensor.name.encode()
    sizes = tensor.shape[::-1]
    return b"".join(
        [
            len(name).to_bytes(8, "little"),
            name,
            len(sizes).to_bytes(4, "little"),
            *(size.to_bytes(8, "little") for size in sizes),
            type_id_of(tensor.format).to_bytes(4, "little"),
            LAYOUTS.index(tensor.layout).to_bytes(4, "little"),
            max(1, len(tensor.parts), len(tensor.matrices)).to_bytes(4, "little"),
            tensor.extent.offset.to_bytes(8, "little"),
            tensor.extent.nbytes.to_bytes(8, "little"),
            tensor.stride.to_bytes(8, "little"),
            *(
                _PART.pack(bits, part.offset, part.nbytes)
                for bits, part in zip(tensor.part_bits, tensor.parts, strict=True)
            ),
            *(_PART.pack(type_id_of(fmt), m.offset, m.nbytes) for fmt, m in tensor.matrices),
        ]
    )


# ---- reading ------------------------------------------------------------------------------------


def read_pack(path: str | Path) -> Manifest:
    """The manifest of the pack at `path`: header and index, no tensor data.

    Raises `ModelError` (missing, a folder), `FormatError` (bytes that break the format, with file
    and offset), `UnsupportedError` (newer version, other byte order, a format edgert does not run).
    """
    path = Path(path)
    with open_model_file(path) as (file, size):
        raw = _read(file, path, min(size, HEADER.size))
        header = read_header(raw, path, size)
        end = HEADER.size + header.index_bytes
        crc = 0
        for at in range(HEADER.size, end, _READ_BYTES):
            crc = zlib.crc32(_read(file, path, min(_READ_BYTES, end - at)), crc)
        if crc != header.index_crc:
            raise FormatError(
                path, "the index does not match its checksum; copy or pack it again", HEADER.size
            )
        index = HeaderReader(file, path, end - 4 * header.n_sums, HEADER.size)
        metadata, tensors = _read_index(index, header)
    if index.left:
        raise index.error(
            f"{index.left:,} bytes lie between the tensor table and "
            f"{header.n_sums:,} checksums of 4 bytes"
        )
    return Manifest(
        files=(path,), file_bytes=(size,), metadata=MappingProxyType(metadata),
        tensors=MappingProxyType(tensors),
        checksum_bytes=4 * header.n_sums if header.sum_step == PAGE else 0,
    )  # fmt: skip


def _read(file: IO[bytes], path: Path, nbytes: int) -> bytes:
    """The next bytes of the file, all of them."""
    pieces = []
    while nbytes > 0:
        piece = file.read(nbytes)
        if not piece:
            raise FormatError(path, f"the file became shorter by {nbytes:,} bytes while read")
        pieces.append(piece)
        nbytes -= len(piece)
    return b"".join(pieces)


def read_header(raw: bytes, path: Path, size: int) -> PackHeader:
    """The header in `raw`, the first bytes of a file of `size` bytes. Raises as `read_pack`."""
    if raw[: len(MAGIC)] != MAGIC:
        raise FormatError(path, f"is not an .edgert file: it begins with {raw[:8]!r}", 0)
    if len(raw) < HEADER.size:
        raise FormatError(path, f"the header ends after {len(raw)} of {HEADER.size} bytes", 0)
    fields = HEADER.unpack(raw)
    _, order, version, file_bytes, index_bytes, data_offset, chunk, index_crc, flags = fields[:9]
    if order == int.from_bytes(BYTE_ORDER.to_bytes(4, "little"), "big"):
        raise UnsupportedError(f"{path} was written big-endian; edgert reads little-endian files")
    if zlib.crc32(raw[:-4]) != fields[-1]:
        raise FormatError(path, "the header does not match its checksum; copy or pack it again", 0)
    if order != BYTE_ORDER:
        raise FormatError(path, f"the byte order mark is {order:#x}, not {BYTE_ORDER:#x}", 8)
    if version not in _SUM_STEPS or flags or fields[9]:
        raise UnsupportedError(
            f"{path} is version {version} of the .edgert format with flags {flags:#x}; this edgert "
            f"reads versions 1 to {VERSION} without flags; pack the model again or update edgert"
        )
    step = _SUM_STEPS[version]
    if chunk != step:
        raise FormatError(path, f"checksums cover {chunk:,} bytes each, not {step:,}", 40)
    if file_bytes != size:
        raise FormatError(
            path, f"the file is {size:,} bytes long, not {file_bytes:,}; copy or pack it again", 16
        )
    end = HEADER.size + index_bytes
    if end > size or data_offset != align_up(end, PAGE) or data_offset > size:
        raise FormatError(
            path, f"an index up to byte {end:,} and data from {data_offset:,} of {size:,}", 24
        )
    if size % PAGE:
        raise FormatError(path, f"{size:,} bytes are no multiple of {PAGE:,}", 16)
    header = PackHeader(version, file_bytes, index_bytes, data_offset, index_crc)
    rest = index_bytes - 4 * header.n_sums
    if not 0 <= rest <= HEADER_MAX - HEADER.size:
        most = format_bytes(HEADER_MAX)
        text = f"the index has {rest:,} bytes beside its checksums; the most is {most}"
        raise FormatError(path, text, 24)
    return header


def _read_index(
    reader: HeaderReader, header: PackHeader
) -> tuple[dict[str, object], dict[str, TensorEntry]]:
    n_keys = reader.u64("the number of metadata keys")
    n_tensors = reader.u64("the number of tensors")
    reader.check_count(n_tensors, _TENSOR_BYTES_MIN, _TENSORS_MAX, "tensors")
    metadata = read_metadata(reader, n_keys)
    reader.check_count(n_tensors, _TENSOR_BYTES_MIN, _TENSORS_MAX, "tensors")
    tensors: dict[str, TensorEntry] = {}
    for i in range(n_tensors):
        at = reader.offset
        entry = _read_entry(reader, f"tensor {i + 1} of {n_tensors}")
        if entry.name in tensors:
            raise reader.error(f"tensor {entry.name!r} appears twice", at)
        tensors[entry.name] = entry
    _check_extents(reader.path, header, tensors)
    return metadata, tensors


def _read_entry(reader: HeaderReader, what: str) -> TensorEntry:
    name, sizes, at = reader.tensor_shape(what)
    what = f"tensor {name!r}"
    fmt = _format(reader, name)
    if 0 in sizes or prod(sizes) * (fmt.block_bytes + 4) * TILE_ROWS > _NBYTES_MAX:
        raise reader.error(f"{what} has the impossible shape {sizes}", at)
    reader.check_rows(name, sizes[0], fmt, at)
    layout, n_parts = reader.u32(what), reader.u32(what)
    least, most = {2: (2, PARTS_MAX), 3: (1, _MATRICES_MAX)}.get(layout, (1, 1))
    if layout >= len(LAYOUTS) or not least <= n_parts <= most:
        raise UnsupportedError(
            f"{reader.path}: {name!r} has layout {layout} in {n_parts} parts, "
            "which this edgert does not read; update edgert or pack the model again"
        )
    at = reader.offset
    extent = Extent(0, reader.u64(what), reader.u64(what))
    entry = TensorEntry(
        name, fmt, tuple(reversed(sizes)), extent, LAYOUTS[layout], reader.u64(what)
    )
    if entry.layout == "mixed":
        return _read_mixed(reader, entry, n_parts, at)
    if entry.layout == "nested":
        found = [(reader.u32(what), reader.u64(what), reader.u64(what)) for _ in range(n_parts)]
        parts = tuple(Extent(0, offset, nbytes) for _, offset, nbytes in found)
        entry = replace(entry, parts=parts, part_bits=tuple(bits for bits, _, _ in found))
        _check_parts(reader, entry, at)
    else:
        _check_entry(reader, entry, at)
    return entry


def _read_mixed(reader: HeaderReader, entry: TensorEntry, count: int, at: int) -> TensorEntry:
    """The formats and places of the matrices of a mixed stack, checked as they are read."""
    what, shape = f"tensor {entry.name!r}", entry.shape
    if len(shape) != 3 or count != shape[0]:
        raise reader.error(f"{what} of shape {shape} is mixed of {count:,} matrices", at)
    reader.check_count(count, _PART.size, _MATRICES_MAX, f"matrices of {what}")
    matrices = []
    for i in range(count):
        fmt, offset, nbytes = _format(reader, entry.name), reader.u64(what), reader.u64(what)
        reader.check_rows(entry.name, shape[-1], fmt, at)
        wanted = tiles_bytes(fmt, *shape[1:])
        if nbytes != wanted or offset % PART:
            raise reader.error(
                f"matrix {i} of {what} has {nbytes:,} bytes of {fmt.name} at {offset:,}, "
                f"not {wanted:,} at a multiple of {PART}", at,
            )  # fmt: skip
        matrices.append((fmt, Extent(0, offset, nbytes)))
    first, total = matrices[0], sum(extent.nbytes for _, extent in matrices)
    whole = entry.extent
    if (entry.format, whole.offset, whole.nbytes, entry.stride) != (
        first[0], first[1].offset, total, 0,
    ):  # fmt: skip
        raise reader.error(f"{what} is not what its matrices are", at)
    return replace(entry, matrices=tuple(matrices))


def _format(reader: HeaderReader, name: str) -> QuantFormat:
    type_id = reader.u32(f"tensor {name!r}")
    if type_id in _PLANE_OF:
        return _PLANE_OF[type_id]
    try:
        return format_of(type_id)
    except UnsupportedError as error:
        raise UnsupportedError(f"{reader.path}: {name!r}: {error}") from None


def _check_entry(reader: HeaderReader, entry: TensorEntry, at: int) -> None:
    """Size, stride and alignment are those that shape, format and layout ask for."""
    shape, extent, stride = entry.shape, entry.extent, entry.stride
    stacked = entry.layout == "tiles" and len(shape) == 3
    if entry.layout == "rows":
        nbytes = entry.format.nbytes(shape)
    elif len(shape) in (2, 3):
        nbytes = tiles_bytes(entry.format, *shape[-2:])
    else:
        raise reader.error(f"tensor {entry.name!r} of shape {shape} cannot be in tiles", at)
    if extent.nbytes != nbytes:
        raise reader.error(
            f"tensor {entry.name!r} has {extent.nbytes:,} bytes in {entry.layout}, not {nbytes:,}",
            at,
        )
    aligned = extent.offset % (PART if stacked else PAGE) == 0 and stride % PAGE == 0
    if not aligned or (stride < nbytes if stacked else stride != 0):
        raise reader.error(
            f"tensor {entry.name!r} lies at {extent.offset:,} with a stride of {stride:,} bytes",
            at,
        )


def _check_parts(reader: HeaderReader, entry: TensorEntry, at: int) -> None:
    """As `_check_entry`, of a nested matrix."""
    what, bits = f"tensor {entry.name!r}", entry.part_bits
    if entry.format.name not in CODE_BITS or len(entry.shape) != 2:
        raise reader.error(f"{what} of shape {entry.shape} in {entry.format.name} is nested", at)
    if min(bits) < 1 or not entry.base_bits:
        raise reader.error(f"{what} has parts of {' + '.join(map(str, bits))} bits", at)
    for i, part in enumerate(entry.parts):
        nbytes = part_bytes(entry.format, bits[i], i == 0, *entry.shape)
        if part.nbytes != nbytes or part.offset % PAGE:
            raise reader.error(
                f"part {i} of {what} has {part.nbytes:,} bytes at {part.offset:,}, "
                f"not {nbytes:,} at a multiple of {PAGE:,}", at,
            )  # fmt: skip
    whole, first = entry.extent, entry.parts[0]
    wanted = (first.offset, sum(p.nbytes for p in entry.parts), 0)
    if (whole.offset, whole.nbytes, entry.stride) != wanted:
        raise reader.error(f"{what} is not where its parts are", at)


def _extents(entry: TensorEntry) -> Sequence[Extent]:
    """What a tensor takes of the file; of a stack in tiles, its first matrix."""
    return entry.parts or [extent for _, extent in entry.matrices] or (entry.extent,)


def _check_extents(path: Path, header: PackHeader, tensors: Mapping[str, TensorEntry]) -> None:
    """Every matrix inside the data, and no two of them over the same bytes."""
    spans: list[tuple[int, int, str]] = []
    for entry, extent in ((e, x) for e in tensors.values() for x in _extents(e)):
        count = entry.shape[0] if entry.stride else 1
        at, nbytes = extent.offset, extent.nbytes
        end = at + (count - 1) * entry.stride + nbytes
        if at < header.data_offset or end > header.file_bytes:
            raise FormatError(
                path,
                f"tensor {entry.name!r} reaches from byte {at:,} to {end:,}, "
                f"the data from {header.data_offset:,} to {header.file_bytes:,}",
                at,
            )
        if len(spans) + count > _MATRICES_MAX:
            raise FormatError(path, f"more than {_MATRICES_MAX:,} matrices")
        spans += [(at + i * entry.stride, nbytes, entry.name) for i in range(count)]
    spans.sort()
    for (at, nbytes, name), (after, _, other) in zip(spans, spans[1:], strict=False):
        if at + nbytes > after:
            raise FormatError(path, f"tensors {name!r} and {other!r} overlap", after)
