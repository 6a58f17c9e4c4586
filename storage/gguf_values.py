"""Metadata values of a GGUF header, read from a bounded forward reader.

Owns: the value types of the format, the caps on what a header may ask for, and the rule that a
count or length is checked against the bytes left before anything is allocated for it.
Must not know what a key means, nor anything about tensors.
Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from pathlib import Path
from struct import Struct
from typing import IO, Any

import numpy as np

from edgert.errors import FormatError
from edgert.quant.formats import QuantFormat
from edgert.units import MIB, format_bytes

__all__ = ["ARRAY", "HEADER_MAX", "STRING", "HeaderReader", "read_metadata"]

# Real headers: 10 MB for a vocabulary of 262 k tokens with merges. The caps are what a damaged
# or hostile file can make the reader hold, not a limit anyone meets.
HEADER_MAX = 128 * MIB
_STRING_MAX = 16 * MIB  # one value; chat templates are the longest, some 100 KB
_KEY_MAX = 65_535  # bytes; the specification's limit
_ARRAY_MAX = 1 << 22  # elements; 8 times the longest list of merges seen
_KEY_COUNT_MAX = 1 << 16
_TENSOR_NAME_MAX = 255  # bytes; ggml itself stops at 63
_DIMS_MAX = 4
_CHUNK = 256 * 1024  # bytes of one read; 1 MiB was no faster on a 5.9 MB header

_U32 = Struct("<I")
_U64 = Struct("<Q")

# type id -> little-endian NumPy type of one element
_SCALARS = {
    0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "u1",
    10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_BOOL = 7
STRING = 8
ARRAY = 9
_KEY_BYTES_MIN = 8 + 1 + 4 + 1  # name length, name, type, smallest value


class HeaderReader:
    """Reads a file forward in chunks, and never past its end or `HEADER_MAX`.

    Every method that reads says `what` it is reading, so that a truncated file is reported by
    the thing that is cut. Raises `FormatError` with the offset.
    """

    def __init__(self, file: IO[bytes], path: Path, size: int, offset: int = 0) -> None:
        """`size`: where reading ends at the latest; `offset`: where it begins."""
        self.path = path
        self.size = size
        self._file = file
        self._limit = min(size, HEADER_MAX)
        self._chunk = b""
        self._base = offset  # of the chunk in the file
        self._at = 0  # position in the chunk

    @property
    def offset(self) -> int:
        """Bytes read so far: the offset of the next byte in the file."""
        return self._base + self._at

    @property
    def left(self) -> int:
        """Bytes that can still be read."""
        return self._limit - self.offset

    def error(self, what: str, offset: int | None = None) -> FormatError:
        """A `FormatError` at `offset`, or here."""
        return FormatError(self.path, what, self.offset if offset is None else offset)

    def take(self, nbytes: int, what: str) -> bytes:
        """The next `nbytes` bytes."""
        end = self._at + nbytes
        if end > len(self._chunk):
            self._refill(nbytes, what)
            end = nbytes
        piece = self._chunk[self._at : end]
        self._at = end
        return piece

    def u32(self, what: str) -> int:
        """The next 32-bit count."""
        return int(_U32.unpack(self.take(4, what))[0])

    def u64(self, what: str) -> int:
        """The next 64-bit count."""
        return int(_U64.unpack(self.take(8, what))[0])

    def string(self, what: str) -> str:
        """A length and a text; bytes that are not UTF-8 become U+FFFD."""
        return str(self._string_bytes(what, _STRING_MAX), "utf-8", "replace")

    def name(self, what: str, length_max: int = _KEY_MAX) -> str:
        """A length and a text that names something: not empty, valid UTF-8."""
        at = self.offset
        raw = self._string_bytes(what, length_max)
        try:
            text = str(raw, "utf-8")
        except UnicodeDecodeError:
            raise self.error(f"{what} is not valid UTF-8: {raw[:40]!r}", at) from None
        if not text:
            raise self.error(f"{what} is empty", at)
        return text

    def tensor_shape(self, what: str) -> tuple[str, list[int], int]:
        """The name of a tensor, its sizes, innermost first, and the offset behind its name."""
        name = self.name(f"the name of {what}", _TENSOR_NAME_MAX)
        what, at = f"tensor {name!r}", self.offset
        n_dims = self.u32(what)
        if not 1 <= n_dims <= _DIMS_MAX:
            raise self.error(f"{what} has {n_dims:,} dimensions, not 1 to {_DIMS_MAX}", at)
        return name, [self.u64(what) for _ in range(n_dims)], at

    def check_rows(self, name: str, columns: int, fmt: QuantFormat, at: int) -> None:
        """Refuse rows of `columns` weights that are not whole blocks of `fmt`."""
        if columns % fmt.block_size:
            raise self.error(
                f"tensor {name!r} has rows of {columns:,} weights, not a multiple of the "
                f"{fmt.block_size} of a {fmt.name} block",
                at,
            )

    def strings(self, count: int, what: str) -> list[str]:
        """`count` texts. This loop is the cost of opening a large vocabulary."""
        texts: list[str] = []
        append, unpack = texts.append, _U64.unpack_from
        while len(texts) < count:
            chunk, at = self._chunk, self._at
            end = len(chunk)
            safe = end - 8  # the last position a length can be read from
            try:
                for _ in range(count - len(texts)):
                    if at > safe:
                        break
                    body = at + 8
                    stop = body + unpack(chunk, at)[0]
                    if stop > end:
                        break
                    append(chunk[body:stop].decode())  # 0.3 us less than with an error handler
                    at = stop
            except UnicodeDecodeError:
                pass
            self._at = at
            if len(texts) < count:  # crosses the chunk or is not UTF-8: checked, read the slow way
                append(self.string(what))
        return texts

    def check_count(self, count: int, bytes_each: int, count_max: int, what: str) -> None:
        """Refuse a count that the rest of the file cannot hold, before anything is allocated."""
        if count > count_max or count * bytes_each > self.left:
            room = min(count_max, self.left // bytes_each)
            raise self.error(
                f"announces {count:,} {what}, but there is room for {room:,} at most; "
                "the file is damaged or truncated"
            )

    def _string_bytes(self, what: str, length_max: int) -> bytes:
        at = self.offset
        length = self.u64(what)
        if length > length_max:
            raise self.error(
                f"{what} says it is {length:,} bytes long, more than {length_max:,}; "
                "the file is damaged",
                at,
            )
        return self.take(length, what)

    def _refill(self, nbytes: int, what: str) -> None:
        if nbytes > self.left:
            if self._limit < self.size:
                raise self.error(f"the header is longer than {format_bytes(HEADER_MAX)}")
            raise self.error(
                f"the file ends inside {what}: {nbytes:,} bytes are needed, {self.left:,} are "
                "left; it is truncated, download or copy it again"
            )
        rest = self._chunk[self._at :]
        start = self._base + len(self._chunk)
        self._file.seek(start)
        want = min(max(_CHUNK, nbytes - len(rest)), self._limit - start)
        pieces = [rest]
        while want > 0:
            piece = self._file.read(want)
            if not piece:
                raise self.error(f"the file became shorter than {self.size:,} bytes while read")
            pieces.append(piece)
            want -= len(piece)
        self._base += self._at
        self._chunk, self._at = b"".join(pieces), 0


def read_metadata(reader: HeaderReader, n_keys: int) -> dict[str, Any]:
    """The `n_keys` key-value pairs that follow, in file order.

    Numbers and booleans become int, float or bool, texts str, arrays list[str] or a NumPy array
    in the machine's byte order. Raises `FormatError` on anything else.
    """
    reader.check_count(n_keys, _KEY_BYTES_MIN, _KEY_COUNT_MAX, "metadata keys")
    metadata: dict[str, Any] = {}
    for i in range(n_keys):
        at = reader.offset
        key = reader.name(f"the name of metadata key {i + 1} of {n_keys}")
        if key in metadata:
            raise reader.error(f"metadata key {key!r} appears twice", at)
        metadata[key] = _read_value(reader, key)
    return metadata


def _read_value(reader: HeaderReader, key: str) -> Any:
    what = f"the value of {key!r}"
    at = reader.offset
    type_id = reader.u32(what)
    if type_id == STRING:
        return reader.string(what)
    if type_id == ARRAY:
        return _read_array(reader, key)
    if type_id not in _SCALARS:
        raise reader.error(f"{what} has unknown type {type_id}", at)
    return _numbers(reader, type_id, 1, what)[0].item()


def _read_array(reader: HeaderReader, key: str) -> list[str] | np.ndarray[Any, Any]:
    what = f"the array {key!r}"
    at = reader.offset
    type_id = reader.u32(what)
    count = reader.u64(what)
    if type_id == STRING:
        reader.check_count(count, 8, _ARRAY_MAX, f"texts in the array {key!r}")
        return reader.strings(count, what)
    if type_id == ARRAY:
        raise reader.error(f"{what} is an array of arrays, which edgert does not read", at)
    if type_id not in _SCALARS:
        raise reader.error(f"{what} has elements of unknown type {type_id}", at)
    each = np.dtype(_SCALARS[type_id]).itemsize
    reader.check_count(count, each, _ARRAY_MAX, f"elements in the array {key!r}")
    return _numbers(reader, type_id, count, what)


def _numbers(reader: HeaderReader, type_id: int, count: int, what: str) -> np.ndarray[Any, Any]:
    """`count` elements as an array of the machine's byte order."""
    dtype = np.dtype(_SCALARS[type_id])
    at = reader.offset
    values = np.frombuffer(reader.take(count * dtype.itemsize, what), dtype)
    if type_id == _BOOL:
        if np.any(values > 1):
            raise reader.error(f"{what} is a boolean other than 0 and 1", at)
        return values.astype(np.bool_)
    return values.astype(dtype.newbyteorder("="))
