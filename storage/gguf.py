"""The index of a GGUF model: header and tensor table to a `Manifest` of checked extents.

Owns: versions 2 and 3, little-endian, one file or a split model opened by its first part.
Must not know what a tensor or key is for (except `general.alignment` and `split.*`), and reads
no tensor data. Whatever the bytes are, the outcome is a manifest that is safe to read by, or a
`ModelError` or `UnsupportedError`; README.md lists what is refused.
Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from edgert.errors import FormatError, ModelError, UnsupportedError
from edgert.quant.formats import format_of
from edgert.storage.gguf_values import HeaderReader, read_metadata
from edgert.storage.manifest import Extent, Manifest, TensorEntry
from edgert.storage.model_file import open_model_file
from edgert.units import align_up

__all__ = ["metadata_bytes", "read_gguf"]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_TENSORS_MAX = 1 << 17  # 94 layers of 128 experts in separate tensors are 36 k
_TENSOR_BYTES_MIN = 8 + 1 + 4 + 8 + 4 + 8  # name length, name, dimensions, one size, type, offset
_ALIGNMENT_MAX = 1 << 20
_ALIGNMENT_DEFAULT = 32
_NBYTES_MAX = 2**63 - 1
_PARTS_MAX = 99_999
_PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True, slots=True)
class _Part:
    """One file's index."""

    path: Path
    size: int
    metadata: dict[str, Any]
    tensors: dict[str, TensorEntry]


def read_gguf(path: str | Path) -> Manifest:
    """The manifest of the model at `path`; of a split model, of all its parts.

    Shapes: a GGUF lists the fastest axis first, a manifest last (NumPy order).
    Raises: `ModelError` (missing, a folder, a missing part), `FormatError` (bytes that break the
    format, with file and offset), `UnsupportedError` (big-endian, version, tensor type).
    """
    path = Path(path)
    first = _read_part(path, 0)
    number, count = _split_keys(first)
    if count <= 1:
        return _manifest([first])
    if number != 0:
        raise ModelError(
            f"{path} is part {number + 1} of {count} of a split model; open the first part: "
            f"{_part_path(path, 0, count).name}"
        )
    parts = [first]
    for i in range(1, count):
        parts.append(_read_next_part(path, i, count))
    total = first.metadata.get("split.tensors.count")
    found = sum(len(p.tensors) for p in parts)
    if total is not None and total != found:
        raise FormatError(path, f"the {count} parts hold {found:,} tensors, not {total:,}")
    return _manifest(parts)


def metadata_bytes(path: Path) -> tuple[int, bytes]:
    """The number of metadata keys of a GGUF file, and their bytes as they lie in it.

    Raises as `read_gguf`, which has read this file already.
    """
    with open_model_file(path) as (file, size):
        reader = HeaderReader(file, path, size)
        _check_version(reader)
        reader.u64("the number of tensors")
        n_keys = reader.u64("the number of metadata keys")
        begin = reader.offset
        read_metadata(reader, n_keys)
        end = reader.offset
        return n_keys, HeaderReader(file, path, size, begin).take(end - begin, "the metadata")


def _manifest(parts: list[_Part]) -> Manifest:
    tensors: dict[str, TensorEntry] = {}
    for part in parts:
        for name, entry in part.tensors.items():
            if name in tensors:
                raise FormatError(part.path, f"tensor {name!r} is in an earlier part as well")
            tensors[name] = entry
    return Manifest(
        files=tuple(p.path for p in parts),
        file_bytes=tuple(p.size for p in parts),
        metadata=MappingProxyType(parts[0].metadata),
        tensors=MappingProxyType(tensors),
    )


# ---- split models -------------------------------------------------------------------------


def _split_keys(part: _Part) -> tuple[int, int]:
    """(number from 0, count) of a part; (0, 1) for a file that is not split."""
    count = part.metadata.get("split.count", 0)
    number = part.metadata.get("split.no", 0)
    for key, value in (("split.count", count), ("split.no", number)):
        if type(value) is not int or not 0 <= value <= _PARTS_MAX:
            raise FormatError(part.path, f"{key} is {value!r}, not a number up to {_PARTS_MAX:,}")
    if number and number >= count:
        raise FormatError(part.path, f"split.no is {number} of {count} parts")
    return number, max(count, 1)


def _part_path(path: Path, number: int, count: int) -> Path:
    """Where part `number` (from 0) lies: next to `path`, by its name."""
    match = _PART_NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise ModelError(
            f"{path} is one of {count} parts of a split model, but its name does not end in "
            f"-NNNNN-of-{count:05}.gguf, so the other parts cannot be found; rename them back"
        )
    return path.with_name(f"{match['stem']}-{number + 1:05}-of-{count:05}.gguf")


def _read_next_part(first: Path, number: int, count: int) -> _Part:
    path = _part_path(first, number, count)
    if not path.exists():
        raise ModelError(
            f"{path} is missing: part {number + 1} of {count} of the model; "
            "put all parts into one folder"
        )
    part = _read_part(path, number)
    if _split_keys(part) != (number, count):
        found, of = _split_keys(part)
        raise FormatError(
            path, f"says it is part {found + 1} of {of}, its name says {number + 1} of {count}"
        )
    return part


# ---- one file -----------------------------------------------------------------------------


def _read_part(path: Path, file_index: int) -> _Part:
    with open_model_file(path) as (file, size):
        return _read_header(HeaderReader(file, path, size), file_index)


def _read_header(reader: HeaderReader, file_index: int) -> _Part:
    _check_version(reader)
    n_tensors = reader.u64("the number of tensors")
    n_keys = reader.u64("the number of metadata keys")
    reader.check_count(n_tensors, _TENSOR_BYTES_MIN, _TENSORS_MAX, "tensors")
    metadata = read_metadata(reader, n_keys)
    alignment = _alignment(reader, metadata)
    reader.check_count(n_tensors, _TENSOR_BYTES_MIN, _TENSORS_MAX, "tensors")
    table: dict[str, TensorEntry] = {}
    for i in range(n_tensors):
        at = reader.offset
        entry = _read_entry(reader, f"tensor {i + 1} of {n_tensors}", file_index, alignment)
        if entry.name in table:
            raise reader.error(f"tensor {entry.name!r} appears twice", at)
        table[entry.name] = entry
    data = align_up(reader.offset, alignment)
    tensors = {name: _placed(entry, data) for name, entry in table.items()}
    _check_extents(reader, tensors)
    return _Part(reader.path, reader.size, metadata, tensors)


def _check_version(reader: HeaderReader) -> None:
    path = reader.path
    magic = reader.take(min(4, reader.size), "the magic number")
    if magic == _MAGIC[::-1]:
        raise UnsupportedError(f"{path} is a big-endian GGUF; edgert reads little-endian ones")
    if magic != _MAGIC:
        raise FormatError(path, f"is not a GGUF model: it begins with {magic!r}, not {_MAGIC!r}", 0)
    version = reader.u32("the version")
    if version in _VERSIONS:
        return
    if version and version & 0xFFFF == 0:  # a small number with its bytes reversed
        raise UnsupportedError(
            f"{path} is a big-endian GGUF; edgert reads little-endian ones, "
            "convert it with gguf_convert_endian of the gguf package"
        )
    if version == 0:
        raise FormatError(path, "the version is 0", 4)
    what = "older" if version == 1 else "newer"
    raise UnsupportedError(
        f"{path} is GGUF version {version}, {what} than the versions edgert reads "
        f"({_VERSIONS[0]} and {_VERSIONS[1]})"
    )


def _alignment(reader: HeaderReader, metadata: Mapping[str, Any]) -> int:
    value = metadata.get("general.alignment", _ALIGNMENT_DEFAULT)
    if type(value) is not int or not 0 < value <= _ALIGNMENT_MAX or value & (value - 1):
        raise FormatError(
            reader.path,
            f"general.alignment is {value!r}, not a power of two up to {_ALIGNMENT_MAX:,}",
        )
    return value


def _read_entry(reader: HeaderReader, what: str, file_index: int, alignment: int) -> TensorEntry:
    """One row of the table; its extent still counts from the start of the data."""
    name, sizes, at = reader.tensor_shape(what)
    what = f"tensor {name!r}"
    type_id = reader.u32(what)
    try:
        fmt = format_of(type_id)
    except UnsupportedError as error:
        raise UnsupportedError(f"{reader.path}: {name!r}: {error}") from None
    parameters = 1
    for size in sizes:
        parameters *= size
        if size == 0 or parameters * fmt.block_bytes > _NBYTES_MAX:
            raise reader.error(f"{what} has the impossible shape {sizes}", at)
    reader.check_rows(name, sizes[0], fmt, at)
    at = reader.offset
    offset = reader.u64(what)
    if offset % alignment:
        raise reader.error(f"{what} lies at {offset:,}, not a multiple of {alignment}", at)
    shape = tuple(reversed(sizes))
    return TensorEntry(name, fmt, shape, Extent(file_index, offset, fmt.nbytes(shape)))


def _placed(entry: TensorEntry, data: int) -> TensorEntry:
    at = entry.extent
    extent = Extent(at.file_index, data + at.offset, at.nbytes)
    return TensorEntry(entry.name, entry.format, entry.shape, extent)


def _check_extents(reader: HeaderReader, tensors: Mapping[str, TensorEntry]) -> None:
    """Every extent inside the file, and no two of them over the same bytes."""
    last_name, last_end = "", 0
    for entry in sorted(tensors.values(), key=lambda t: t.extent.offset):
        at = entry.extent
        end = at.offset + at.nbytes
        if end > reader.size:
            raise FormatError(
                reader.path,
                f"tensor {entry.name!r} ends at byte {end:,}, the file at {reader.size:,}; "
                "it is truncated, download or copy it again",
                at.offset,
            )
        if at.offset < last_end:
            raise FormatError(
                reader.path, f"tensors {last_name!r} and {entry.name!r} overlap", at.offset
            )
        last_name, last_end = entry.name, end
