"""What a model file holds and where: the parsed index, frozen.

Owns: extents, tensor entries and the manifest over one or several files (a split model).
Must not know how a file is read, nor what a tensor is for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from edgert.quant.formats import QuantFormat

__all__ = ["Extent", "Manifest", "TensorEntry"]


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of bytes in one of the manifest's files."""

    file_index: int
    offset: int  # bytes from the start of that file
    nbytes: int


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: `shape` in NumPy order, outermost first, rows last: (M, K) or (E, M, K)."""

    name: str
    format: QuantFormat
    shape: tuple[int, ...]
    extent: Extent

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    def rows(self, first: int, stop: int) -> Extent:
        """The extent of rows `first` to `stop`, all leading axes taken as one run of rows."""
        row = self.format.row_bytes(self.shape[-1])
        assert 0 <= first <= stop <= prod(self.shape[:-1]), (self.name, first, stop)
        at = self.extent
        return Extent(at.file_index, at.offset + first * row, (stop - first) * row)


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
        return sum(t.extent.nbytes for t in self.tensors.values())
