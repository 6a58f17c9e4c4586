"""What a model file holds and where: the parsed index, frozen.

Owns: extents, tensor entries and the manifest over one or several files (a split model).
Must not know how a file is read, nor what a tensor is for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from edgert.quant.formats import BASES, CODE_BITS, BaseFormat, QuantFormat

__all__ = ["TILE_ROWS", "Extent", "Manifest", "TensorEntry"]

TILE_ROWS = 16  # of the layout "tiles", which is that of memory (kernels_cpu/layout)


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of bytes in one of the manifest's files."""

    file_index: int
    offset: int  # bytes from the start of that file
    nbytes: int


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: `shape` in NumPy order, outermost first, rows last: (M, K) or (E, M, K).

    A GGUF holds rows one after another. A pack may hold them as compiled code wants them, in tiles
    of 16, and then the E matrices of a stack lie `stride` bytes apart: `extent` is the first.

    A nested matrix (one matrix of a format with codes) is in tiles too, but in `parts`, most
    significant bits first: part 0 holds the scales and `part_bits[0]` bits of each code, and so on.
    `extent` then has the offset of part 0 and the bytes of all parts. A base (`base`) is such a
    matrix with the first parts only, in a format of its own.

    In a mixed stack each of the E matrices, in tiles, has a format and an extent of its own
    (`matrices`); `format` is that of the first, `extent` has its offset and the bytes of all.
    """

    name: str
    format: QuantFormat
    shape: tuple[int, ...]
    extent: Extent
    layout: Literal["rows", "tiles", "nested", "mixed"] = "rows"
    stride: int = 0  # bytes from one matrix of a stack in tiles to the next
    parts: tuple[Extent, ...] = ()
    part_bits: tuple[int, ...] = ()  # together those of a code
    matrices: tuple[tuple[QuantFormat, Extent], ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all its weights in the file."""
        return self.extent.nbytes * (self.shape[0] if self.stride else 1)

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    @property
    def formats(self) -> tuple[QuantFormat, ...]:
        """Each of its formats once: one, or several of a mixed stack."""
        return tuple(dict.fromkeys(fmt for fmt, _ in self.matrices)) or (self.format,)

    @property
    def base_bits(self) -> tuple[int, ...]:
        """Widths that can be a base: those of the first parts together that have a kernel."""
        widths, bases = tuple(accumulate(self.part_bits)), BASES.get(self.format.name, {})
        is_whole = widths[-1:] == (CODE_BITS.get(self.format.name),)
        return tuple(b for b in widths if b in bases) if is_whole else ()

    def base_parts(self, bits: int) -> int:
        """How many of the first parts make the base of `bits` bits; 0 for 0."""
        return (0, *accumulate(self.part_bits)).index(bits)

    def split(self, bits: int) -> tuple[int, ...]:
        """Bits of a base, then of each part beside it."""
        return (bits, *self.part_bits[self.base_parts(bits) :])

    def base_format(self, bits: int) -> BaseFormat:
        """The format of the base of `bits` bits."""
        return BASES[self.format.name][bits]

    def base(self, bits: int) -> TensorEntry:
        """The matrix that the first parts of `bits` bits together are, in a format of its own."""
        count = self.base_parts(bits)
        parts, first = self.parts[:count], self.parts[0]
        whole = Extent(first.file_index, first.offset, sum(p.nbytes for p in parts))
        return TensorEntry(
            self.name, self.base_format(bits), self.shape, whole, "nested", 0, parts,
            self.part_bits[:count],
        )  # fmt: skip

    def part_rows(self, part: int, first: int, stop: int) -> Extent:
        """The extent of rows `first` to `stop` in a part: whole tiles, as in `rows`."""
        at = self.parts[part]
        return _tiles_of(at, self.shape[0], first, stop)

    def extents(self, first: int, stop: int) -> tuple[Extent, ...]:
        """All that must be read for rows `first` to `stop`: one extent, or one for each part."""
        if self.layout == "nested":
            return tuple(self.part_rows(i, first, stop) for i in range(len(self.parts)))
        return (self.rows(first, stop),)

    def rows(self, first: int, stop: int) -> Extent:
        """The extent of rows `first` to `stop`, all leading axes taken as one run of rows.

        In tiles, of a single matrix, whole tiles: `first` is a multiple of 16 and the last tile is
        filled up.
        """
        assert 0 <= first <= stop <= prod(self.shape[:-1]), (self.name, first, stop)
        at = self.extent
        if self.layout == "rows":
            row = self.format.row_bytes(self.shape[-1])
            return Extent(at.file_index, at.offset + first * row, (stop - first) * row)
        assert self.layout == "tiles" and len(self.shape) == 2, (self.name, self.layout, self.shape)
        return _tiles_of(at, self.shape[0], first, stop)

    def matrix(self, index: int) -> TensorEntry:
        """One matrix of a stack (E, M, K), as an entry of its own."""
        fmt, at = self.format, self.extent
        if self.layout == "rows":
            found = self.rows(index * self.shape[1], (index + 1) * self.shape[1])
            return TensorEntry(self.name, fmt, self.shape[1:], found)
        if self.matrices:
            fmt, found = self.matrices[index]
        else:
            found = Extent(at.file_index, at.offset + index * self.stride, at.nbytes)
        return TensorEntry(self.name, fmt, self.shape[1:], found, "tiles")


def _tiles_of(matrix: Extent, rows: int, first: int, stop: int) -> Extent:
    """The tiles of rows `first` to `stop` of a matrix of `rows` rows."""
    assert first % TILE_ROWS == 0 and 0 <= first <= stop <= rows, (rows, first, stop)
    tile = matrix.nbytes // -(-rows // TILE_ROWS)
    begin, end = first // TILE_ROWS, -(-stop // TILE_ROWS)
    return Extent(matrix.file_index, matrix.offset + begin * tile, (end - begin) * tile)


@dataclass(frozen=True, slots=True)
class Manifest:
    """The index of a model: metadata and tensors, with every extent checked against its file."""

    files: tuple[Path, ...]  # one, or all parts of a split model in order
    file_bytes: tuple[int, ...]
    metadata: Mapping[str, Any]  # str, int, float, bool, list[str] or a NumPy array
    tensors: Mapping[str, TensorEntry]  # in file order
    checksum_bytes: int = 0  # of the checksums of single pages, where a pack has them

    @property
    def base_bits(self) -> tuple[int, ...]:
        """Widths that some nested matrix has as a base."""
        return tuple(sorted({b for t in self.tensors.values() for b in t.base_bits}))

    def base(self, bits: int) -> Manifest:
        """The model in which each nested matrix is only its narrowest base of `bits` bits or more,
        and whole if it has none: another model, and lossy.
        """
        widths = {n: [b for b in t.base_bits if b >= bits] for n, t in self.tensors.items()}
        tensors = {n: t.base(widths[n][0]) if widths[n] else t for n, t in self.tensors.items()}
        return replace(self, tensors=MappingProxyType(tensors))

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, padding left out."""
        return sum(t.nbytes for t in self.tensors.values())
