"""Checksums of a pack's data, and what was read compared with them.

Owns: which bytes are wrong, and what of the model lies there. Must not know why they were read.

Since version 2 a pack has one for each page: the CRC-32 of all data up to the end of that page. So
any run of whole pages, which is what a direct read is, is compared by itself in one call: summed on
from the checksum before it, it must give its own last one. zlib does 3 to 4 GB/s on one core, and
lets other threads run meanwhile.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgert.errors import FormatError, InputError
from edgert.storage.backend import Backend
from edgert.storage.manifest import TILE_ROWS, Extent, Manifest, TensorEntry
from edgert.storage.model_file import open_model_file, read_magic
from edgert.storage.pack import HEADER, MAGIC, PAGE, read_header
from edgert.units import KIB

__all__ = ["CheckedBackend", "Checksums", "checksum_bytes", "damaged", "read_checksums"]

_READ_BYTES = 256 * KIB  # of the index at a time
_NAMED = 3  # pieces in a message


@dataclass(frozen=True, slots=True)
class Checksums:
    """Those of the data from byte `start` of a file on: uint32 `values`, one for `step` bytes."""

    start: int
    step: int
    running: bool  # each is of all data up to its end; in version 1 of its own bytes alone
    values: npt.NDArray[np.uint32]

    def first_wrong(self, offset: int, view: memoryview) -> int | None:
        """Where in the file the first step begins whose bytes are wrong; None if there is none.

        `view`: the bytes from `offset` on, whole steps but at the end of the file.
        """
        first = (offset - self.start) // self.step
        if self.running:
            last = first + -(-len(view) // self.step) - 1
            if zlib.crc32(view, self._before(first)) == self.values[last]:
                return None
        for number, at in enumerate(range(0, len(view), self.step), first):
            if zlib.crc32(view[at : at + self.step], self._before(number)) != self.values[number]:
                return offset + at
        return None

    def fill(self, offset: int, view: memoryview) -> None:
        """Note the checksums of the bytes from `offset` on, whole steps; those before are known."""
        number = (offset - self.start) // self.step
        crc = self._before(number)
        for at in range(0, len(view), self.step):
            crc = zlib.crc32(view[at : at + self.step], crc)
            self.values[number] = crc
            number += 1

    def _before(self, number: int) -> int:
        return int(self.values[number - 1]) if self.running and number else 0


def checksum_bytes(manifest: Manifest) -> int:
    """Bytes in memory of the checksums of a pack of which single pages can be compared.

    Raises `InputError` for a GGUF, which has none, and a pack of version 1, whose checksums are of
    1 MiB each.
    """
    path = manifest.files[0]
    if manifest.checksum_bytes:
        return manifest.checksum_bytes
    if read_magic(path, len(MAGIC)) != MAGIC:
        raise InputError(
            f"{path} is no .edgert file, and has no checksums that could be verified; edgert pack "
            "makes one that has"
        )
    raise InputError(
        f"{path} is version 1 of the .edgert format, with one checksum for each MiB, so what "
        "is read of it cannot be verified piece by piece; pack the model again, or verify the "
        "whole file with edgert show --verify"
    )


def read_checksums(path: Path, values: npt.NDArray[np.uint32] | None = None) -> Checksums:
    """The checksums of the pack at `path`, in `values` if given. Raises as `read_pack`."""
    with open_model_file(path) as (file, size):
        header = read_header(file.read(HEADER.size), path, size)
        values = np.empty(header.n_sums, np.uint32) if values is None else values
        crc, left = 0, header.index_bytes - values.nbytes
        while left > 0:
            piece = file.read(min(_READ_BYTES, left))
            crc, left = zlib.crc32(piece, crc), left - len(piece) if piece else -1
        raw = values.view(np.uint8).data
        got = file.readinto(raw)  # type: ignore[attr-defined]
    if left < 0 or got != len(raw) or zlib.crc32(raw, crc) != header.index_crc:
        raise FormatError(
            path, "the index was changed since it was read; open it again", HEADER.size
        )
    return Checksums(header.data_offset, header.sum_step, header.version > 1, values)


class CheckedBackend:
    """The file of a pack, each read of which is compared with its checksums before it counts.

    `values`: uint32, one for each page of data, filled here and held as long as this. What does not
    match is a `FormatError` that names the tensor, the piece of it and the byte.
    """

    def __init__(self, inner: Backend, manifest: Manifest, values: npt.NDArray[np.uint32]) -> None:
        assert PAGE % inner.alignment == 0, inner.alignment
        self._inner = inner
        self._manifest = manifest
        self._sums = read_checksums(manifest.files[0], values)

    @property
    def paths(self) -> tuple[Path, ...]:
        """Names of the files."""
        return self._inner.paths

    @property
    def alignment(self) -> int:
        """A page."""
        return PAGE

    def size(self, file_index: int) -> int:
        """Bytes of a file."""
        return self._inner.size(file_index)

    def read_into(self, file_index: int, offset: int, view: memoryview) -> None:
        """As `Backend.read_into`; `FormatError` for bytes that are not those that were packed."""
        self._inner.read_into(file_index, offset, view)
        other = max(0, self._sums.start - offset)  # header and index have their own
        if other < len(view):
            wrong = self._sums.first_wrong(offset + other, view[other:])
            if wrong is not None:
                raise damaged(self._manifest, wrong, wrong + PAGE)

    def close(self) -> None:
        """Let go of the file."""
        self._inner.close()


# ---- what lies there ----------------------------------------------------------------------------


def damaged(manifest: Manifest, start: int, stop: int) -> FormatError:
    """The error for bytes `start` to `stop` of a pack that are not what was written."""
    found = [p for t in manifest.tensors.values() for p in _pieces(t, start, stop)]
    what = ", ".join(found[:_NAMED])
    what += f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    text = f"the bytes do not match their checksum in {what or 'padding'}; copy or pack it again"
    return FormatError(manifest.files[0], text, start)


def _pieces(tensor: TensorEntry, start: int, stop: int) -> Iterator[str]:
    """What of a tensor lies between two bytes of the file: name, and rows, part or expert."""
    is_stack = tensor.stride or tensor.matrices
    places = [(extent, f"part {i} of ") for i, extent in enumerate(tensor.parts)]
    if is_stack:
        experts = [tensor.matrix(i).extent for i in range(tensor.shape[0])]
        places = [(extent, f"expert {i} of ") for i, extent in enumerate(experts)]
    rows = prod(tensor.shape[:-1]) // (tensor.shape[0] if is_stack else 1)
    for extent, what in places or [(tensor.extent, "")]:
        low, high = max(start, extent.offset), min(stop, extent.offset + extent.nbytes)
        if low < high:
            yield _rows(tensor, rows, extent, low, high) + what + tensor.name


def _rows(tensor: TensorEntry, rows: int, extent: Extent, low: int, high: int) -> str:
    """Which of `rows` rows are in bytes `low` to `high` of the file; nothing of a vector."""
    if len(tensor.shape) == 1:
        return ""
    group = 1 if tensor.layout == "rows" else TILE_ROWS
    nbytes = extent.nbytes // -(-rows // group)
    first = (low - extent.offset) // nbytes * group
    last = min(rows, ((high - 1 - extent.offset) // nbytes + 1) * group) - 1
    return f"row {first} of " if first == last else f"rows {first} to {last} of "
