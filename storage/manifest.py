"""What a model file holds and where: the parsed index, frozen.

Owns: extents, tensor entries and the manifest over one or several files (a split model).
Must not know how a file is read, nor what a tensor is for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

from edgert.quant.formats import QuantFormat

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
    """

    name: str
    format: QuantFormat
    shape: tuple[int, ...]
    extent: Extent
    layout: Literal["rows", "tiles"] = "rows"
    stride: int = 0  # bytes from one matrix of a stack in tiles to the next

    @property
    def nbytes(self) -> int:
        """Bytes of all its weights in the file."""
        return self.extent.nbytes * (self.shape[0] if self.stride else 1)

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return prod(self.shape)

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
        assert first % TILE_ROWS == 0 and len(self.shape) == 2, (self.name, first, self.shape)
        tile = at.nbytes // -(-self.shape[0] // TILE_ROWS)
        begin, end = first // TILE_ROWS, -(-stop // TILE_ROWS)
        return Extent(at.file_index, at.offset + begin * tile, (end - begin) * tile)

    def matrix(self, index: int) -> Extent:
        """The extent of one matrix of a stack (E, M, K)."""
        at = self.extent
        if self.layout == "tiles":
            return Extent(at.file_index, at.offset + index * self.stride, at.nbytes)
        return self.rows(index * self.shape[1], (index + 1) * self.shape[1])


@dataclass(frozen=True, slots=True)
class Manifest:
    """The index of a model: metadata and tensors, with every extent checked against its file."""

    files: tuple[Path, ...]  # one, or all parts of a split model in order
    file_bytes: tuple[int, ...]
    metadata: Mapping[str, Any]  # str, int, float, bool, list[str] or a NumPy array
    tensors: Mapping[str, TensorEntry]  # in file order

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, padding left out."""
        return sum(t.nbytes for t in self.tensors.values())
