"""Making a pack's bytes: tensors cut into pieces, each read, repacked and appended in its turn.

A nested matrix lies part by part. All parts of some rows are made at once, and the later ones kept
until the earlier ones of the whole matrix are written; where that would be too much, the rows are
read again for each part.

Owns: the pieces, and the threads that make them. Must not know where tensors go in the file
(pack.py).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgert.kernels_cpu.layout import TILE_ROWS, matrix_bytes, repack
from edgert.placing import split_parts
from edgert.quant.reference import dequantize_ref
from edgert.storage.arena import Arena
from edgert.storage.backend import FileBackend, aligned_range
from edgert.storage.manifest import Manifest, TensorEntry
from edgert.storage.pack import PAGE, part_bytes
from edgert.storage.pack_writer import PackWriter
from edgert.units import MIB, align_up

__all__ = ["write_pieces"]

Progress = Callable[[str, int, int], object]  # what, done, to do
_Bytes = npt.NDArray[np.uint8]
Requantise = Callable[[TensorEntry, int, npt.NDArray[np.float32]], _Bytes]  # by target, matrix
_Made = dict[int | None, _Bytes]  # by part

_PIECE_BYTES = 2 * MIB  # of the source made at a time
_PIECE_WEIGHTS = 1 << 18  # when quantising: some 30 MiB of float64 temporaries for each thread
_THREADS = 2  # that make pieces, while a third writes
_AHEAD = 4  # pieces made and not written
_KEPT_BYTES = 96 * MIB  # of later parts of a matrix


@dataclass(frozen=True, slots=True)
class _Piece:
    """Consecutive rows of one matrix, and where their bytes go in the data."""

    source: TensorEntry
    target: TensorEntry
    index: int  # of the matrix in the source
    first_row: int  # of all rows of the source
    rows: int
    offset: int
    part: int | None = None  # of a nested matrix
    last_part: int = -1  # the last one that is made with it


def _pieces(placed: Sequence[TensorEntry], manifest: Manifest) -> Iterator[_Piece]:
    """Everything to write, in file order."""
    i = 0
    while i < len(placed):
        if not placed[i].stride and not placed[i].matrices:
            source = manifest.tensors[placed[i].name]
            for part in range(len(placed[i].parts)) or (None,):
                yield from _cut(source, placed[i], 0, part)
            i += 1
            continue
        for expert in range(placed[i].shape[0]):
            for target in placed[i : i + 3]:
                yield from _cut(manifest.tensors[target.name], target.matrix(expert), expert)
        i += 3


def _cut(
    source: TensorEntry, target: TensorEntry, index: int, part: int | None = None
) -> Iterator[_Piece]:
    """A matrix, number `index` of the source, or a part of it, in pieces of whole tiles; a vector
    is one row.
    """
    rows, columns = (1, *target.shape)[-2:]
    row_bytes = source.format.row_bytes(columns)
    step = max(1, _PIECE_BYTES // row_bytes)
    if target.format is not source.format:
        step = max(1, min(step, _PIECE_WEIGHTS // columns))
    if target.layout != "rows":
        step = align_up(step, TILE_ROWS)
    extent = target.extent if part is None else target.parts[part]
    together = sum(p.nbytes for p in target.parts[1:]) <= _KEPT_BYTES
    last = -1 if part is None else len(target.parts) - 1 if together else part
    for first in range(0, rows, step):
        count = min(step, rows - first)
        before = _bytes_of(target, first, part) if first else 0
        at = extent.offset + before
        yield _Piece(source, target, index, index * rows + first, count, at, part, last)


def _bytes_of(target: TensorEntry, rows: int, part: int | None) -> int:
    columns = target.shape[-1]
    if part is not None:
        return part_bytes(target.format, target.part_bits[part], part == 0, rows, columns)
    if target.layout == "rows":
        return rows * target.format.row_bytes(columns)
    return matrix_bytes(target.format, rows, columns)


def write_pieces(
    writer: PackWriter,
    placed: Sequence[TensorEntry],
    manifest: Manifest,
    backend: FileBackend,
    requantise: Requantise,
    data_bytes: int,
    on_progress: Progress | None,
) -> None:
    """Make the tensors' bytes in threads and append them in order, from where the writer is.

    `requantise` makes weights [rows, columns] of a matrix those of a tensor in another format.
    """
    pieces = list(_pieces(placed, manifest))
    longest = max(p.rows * p.source.format.row_bytes(p.source.shape[-1]) for p in pieces)
    local, room = threading.local(), align_up(longest, PAGE) + PAGE
    arena = Arena(_THREADS * room)
    staging = [arena.take(f"piece {i}", room, PAGE) for i in range(_THREADS)]

    def make(piece: _Piece) -> _Made:
        if not hasattr(local, "staging"):
            local.staging = staging.pop()
        return _made(piece, backend, local.staging, requantise)

    pool = ThreadPoolExecutor(_THREADS, "edgert-pack")
    made: deque[tuple[_Piece, Future[_Made]]] = deque()
    kept: dict[tuple[str, int], Future[_Made]] = {}  # what has parts that are still to be written
    try:
        for piece in pieces:
            if piece.offset + _bytes_of(piece.target, piece.rows, piece.part) <= writer.position:
                continue  # a run before this one wrote it
            rows = (piece.target.name, piece.first_row)
            future = kept.pop(rows, None) or pool.submit(make, piece)
            if piece.part is not None and piece.part < piece.last_part:
                kept[rows] = future
            made.append((piece, future))
            if len(made) > _AHEAD:
                _append(writer, *made.popleft())
                if on_progress:
                    on_progress("pack", writer.position, data_bytes)
        while made:
            _append(writer, *made.popleft())
        writer.append(memoryview(bytes(data_bytes - writer.position)))
    finally:
        pool.shutdown(cancel_futures=True)
        arena.close()


def _append(writer: PackWriter, piece: _Piece, made: Future[_Made]) -> None:
    """Write a piece, and zeros up to it; without what a run before this one wrote of it."""
    if piece.offset > writer.position:
        writer.append(memoryview(bytes(piece.offset - writer.position)))
    data = made.result().pop(piece.part)
    writer.append(data[writer.position - piece.offset :].data)


def _made(piece: _Piece, backend: FileBackend, staging: _Bytes, requantise: Requantise) -> _Made:
    """The bytes of a piece as they go into the file, and of the other parts that it is to make."""
    source, target, columns = piece.source, piece.target, piece.source.shape[-1]
    extent = source.rows(piece.first_row, piece.first_row + piece.rows)
    offset, nbytes, skip = aligned_range(extent, backend.alignment)
    backend.read_into(extent.file_index, offset, staging[:nbytes].data)
    raw = staging[skip : skip + extent.nbytes]
    if target.layout == "rows":
        return {None: raw.copy()}
    if target.format is not source.format:
        weights = dequantize_ref(source.format, raw).reshape(piece.rows, columns)
        raw = requantise(target, piece.index, weights).reshape(-1)
    tiles = np.empty(matrix_bytes(target.format, piece.rows, columns), np.uint8)
    repack(target.format, raw, piece.rows, columns, tiles)
    if piece.part is None:
        return {None: tiles}
    numbers = range(piece.part, piece.last_part + 1)
    return dict(zip(numbers, split_parts(target, numbers, piece.rows, tiles), strict=True))
