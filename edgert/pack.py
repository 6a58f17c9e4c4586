"""Making a pack: a model's weights in the order and layout in which they are used.

Owns: where each tensor goes in the file, which ones are quantised again, and making their bytes
piece by piece. Must not know how the file is written or checked (storage/pack_writer.py).

The order is that of the forward pass, so that streaming reads forwards. Matrices are in tiles, the
experts of a layer one record each; vectors stay rows, and so does the embedding, of which single
rows are read. With tied embeddings the head is placed from those rows, as it is from a GGUF: it is
read once, while a second copy would be a quarter of a small model.
"""

from __future__ import annotations

import mmap
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgert.errors import InputError, UnsupportedError
from edgert.kernels_cpu.layout import TILE_ROWS, matrix_bytes, repack
from edgert.kernels_cpu.plane_fit import quantize_planes
from edgert.models.spec import ModelSpec
from edgert.models.tensors import TensorNeed, TensorRole, check_tensors
from edgert.opening import open_model
from edgert.quant.formats import PLANES, PlaneFormat, QuantFormat
from edgert.quant.reference import dequantize_ref
from edgert.storage.backend import FileBackend, aligned_range
from edgert.storage.gguf import metadata_bytes
from edgert.storage.manifest import Extent, Manifest, TensorEntry
from edgert.storage.pack import MAGIC, PAGE, PART, encode_index
from edgert.storage.pack_writer import PackWriter, data_offset_of
from edgert.units import MIB, align_up

__all__ = ["pack_model"]

Progress = Callable[[str, int, int], object]  # what, done, to do
_Bytes = npt.NDArray[np.uint8]

_PIECE_BYTES = 2 * MIB  # of the source made at a time
_PIECE_WEIGHTS = 1 << 18  # when quantising: some 30 MiB of float64 temporaries for each thread
_THREADS = 2  # that make pieces, while a third writes
_AHEAD = 4  # pieces made and not written

# What a plane format is for: most of the weights. The router decides which experts run.
_QUANTISED = frozenset({
    TensorRole.Q_PROJ, TensorRole.K_PROJ, TensorRole.V_PROJ, TensorRole.O_PROJ,
    TensorRole.GATE_PROJ, TensorRole.UP_PROJ, TensorRole.DOWN_PROJ,
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Piece:
    """Consecutive rows of one matrix, and where their bytes go in the data."""

    source: TensorEntry
    target: TensorEntry
    first_row: int  # of all rows of the source
    rows: int
    offset: int


def pack_model(
    source: str | Path,
    out: str | Path,
    *,
    type_name: str = "keep",
    refine: bool = True,
    force: bool = False,
    on_progress: Progress | None = None,
) -> Manifest:
    """Write the GGUF model `source` as the pack `out`, verify it, and return its manifest.

    `type_name`: "keep" for the very weights of the source, or a plane format ("P3_128") for the
    matrices of attention and feed-forward, which is lossy. `refine=False` rounds to nearest
    instead of searching scales: half the time, for measurements. `force` replaces `out`.
    `on_progress` gets "pack" or "verify" and bytes of data.

    Memory: under 300 MiB whatever the model. An interrupted run leaves `out`.partial, which the
    same call continues; `out` itself is whole or not there. Raises `InputError` (the output exists,
    is the source, cannot be made), `EdgertError` (disk full), and as `load` does for the source.
    """
    source, out = Path(source), Path(out)
    fmt = _format(type_name)
    opened = open_model(source)
    manifest = opened.manifest
    _check_output(manifest, out, force)
    needs = check_tensors(opened.spec, manifest.tensors)
    placed, data_bytes = _placed(opened.spec, needs, manifest, fmt)
    n_keys, metadata = metadata_bytes(manifest.files[0])
    start = data_offset_of(len(encode_index(n_keys, metadata, placed)), data_bytes)
    index = encode_index(n_keys, metadata, [_moved(entry, start) for entry in placed])
    stamp = repr([(s.st_size, s.st_mtime_ns) for s in (p.stat() for p in manifest.files)])
    with PackWriter(out, index, data_bytes, f"{stamp} {refine}".encode()) as writer:
        pieces = list(_pieces(placed, manifest))
        backend = FileBackend(manifest.files, file_bytes=manifest.file_bytes)
        try:
            _write(writer, pieces, backend, refine, data_bytes, on_progress)
        finally:
            backend.close()
        writer.finish(on_progress and (lambda done, total: on_progress("verify", done, total)))
    return open_model(out).manifest


def _format(type_name: str) -> PlaneFormat | None:
    if type_name == "keep":
        return None
    if type_name not in PLANES:
        raise InputError(f"{type_name!r} is not keep or one of {' '.join(PLANES)}")
    return PLANES[type_name]


def _check_output(manifest: Manifest, out: Path, force: bool) -> None:
    source = manifest.files[0]
    with open(source, "rb") as file:
        if file.read(len(MAGIC)) == MAGIC:
            raise InputError(f"{source} is an .edgert file already; pack the GGUF it came from")
    if out.is_dir():
        raise InputError(f"{out} is a folder; name a file in it with -o")
    if not out.exists():
        return
    if any(out.samefile(path) for path in manifest.files):
        raise InputError(f"{out} is the model itself; name another file with -o")
    if not force:
        raise InputError(f"{out} exists; --force replaces it")


# ---- where everything goes ----------------------------------------------------------------------


def _placed(
    spec: ModelSpec, needs: dict[str, TensorNeed], manifest: Manifest, fmt: PlaneFormat | None
) -> tuple[list[TensorEntry], int]:
    """The tensors in file order, with offsets from the start of the data, and its bytes."""
    entries: list[TensorEntry] = []
    at = 0
    record: list[TensorEntry] = []
    for need in needs.values():
        entry = _target(need, manifest.tensors[need.name], fmt)
        if need.kind == "expert_matrix":
            record.append(entry)
            if len(record) == 3:
                stack, nbytes = _recorded(record, at)
                entries += stack
                at += nbytes
                record = []
            continue
        entries.append(_moved(entry, at))
        at += align_up(entry.extent.nbytes, PAGE)
    assert not record
    return entries, at


def _target(need: TensorNeed, source: TensorEntry, fmt: PlaneFormat | None) -> TensorEntry:
    """What becomes of a tensor; its extent begins at 0."""
    found: QuantFormat = source.format
    if fmt is not None and need.role in _QUANTISED and len(need.shape) > 1:
        found = fmt
        if need.shape[-1] % fmt.block_size:
            raise UnsupportedError(
                f"tensor {need.name!r} has rows of {need.shape[-1]:,} weights, not a multiple of "
                f"the {fmt.block_size} of {fmt.name}; P{fmt.bits}_32 has groups of 32"
            )
    if need.kind in ("vector", "embedding"):
        return replace(source, extent=Extent(0, 0, source.extent.nbytes))
    extent = Extent(0, 0, matrix_bytes(found, *source.shape[-2:]))
    return TensorEntry(source.name, found, source.shape, extent, "tiles")


def _recorded(parts: Sequence[TensorEntry], at: int) -> tuple[list[TensorEntry], int]:
    """Gate, up and down of a layer as one record for each expert, and the bytes of all."""
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + align_up(part.extent.nbytes, PART))
    stride = align_up(starts[-1], PAGE)
    stack = [
        replace(_moved(part, at + start), stride=stride)
        for part, start in zip(parts, starts, strict=False)
    ]
    return stack, stride * parts[0].shape[0]


def _moved(entry: TensorEntry, by: int) -> TensorEntry:
    at = entry.extent
    return replace(entry, extent=Extent(0, at.offset + by, at.nbytes))


# ---- making the bytes ---------------------------------------------------------------------------


def _pieces(placed: Sequence[TensorEntry], manifest: Manifest) -> Iterator[_Piece]:
    """Everything to write, in file order."""
    i = 0
    while i < len(placed):
        if not placed[i].stride:
            yield from _cut(manifest.tensors[placed[i].name], placed[i], 0)
            i += 1
            continue
        for expert in range(placed[i].shape[0]):
            for target in placed[i : i + 3]:
                yield from _cut(manifest.tensors[target.name], target, expert)
        i += 3


def _cut(source: TensorEntry, target: TensorEntry, index: int) -> Iterator[_Piece]:
    """One matrix of a tensor in pieces of whole tiles; a vector is one row."""
    rows, columns = (1, *target.shape)[-2:]
    row_bytes = source.format.row_bytes(columns)
    step = max(1, _PIECE_BYTES // row_bytes)
    if target.format is not source.format:
        step = max(1, min(step, _PIECE_WEIGHTS // columns))
    if target.layout == "tiles":
        step = align_up(step, TILE_ROWS)
    start = target.extent.offset + index * target.stride
    for first in range(0, rows, step):
        count = min(step, rows - first)
        before = _bytes_of(target, first) if first else 0
        yield _Piece(source, target, index * rows + first, count, start + before)


def _bytes_of(target: TensorEntry, rows: int) -> int:
    columns = target.shape[-1]
    if target.layout == "rows":
        return rows * target.format.row_bytes(columns)
    return matrix_bytes(target.format, rows, columns)


def _write(
    writer: PackWriter,
    pieces: Sequence[_Piece],
    backend: FileBackend,
    refine: bool,
    data_bytes: int,
    on_progress: Progress | None,
) -> None:
    """Make pieces in threads and append them in order, from where the writer is."""
    longest = max(p.rows * p.source.format.row_bytes(p.source.shape[-1]) for p in pieces)
    local = threading.local()

    def make(piece: _Piece) -> _Bytes:
        if not hasattr(local, "staging"):
            room = mmap.mmap(-1, align_up(longest, PAGE) + PAGE)
            local.staging = np.frombuffer(room, np.uint8)
        return _made(piece, backend, local.staging, refine)

    pool = ThreadPoolExecutor(_THREADS, "edgert-pack")
    made: deque[tuple[_Piece, Future[_Bytes]]] = deque()
    try:
        for piece in pieces:
            if piece.offset + _bytes_of(piece.target, piece.rows) <= writer.position:
                continue  # a run before this one wrote it
            made.append((piece, pool.submit(make, piece)))
            if len(made) > _AHEAD:
                _append(writer, *made.popleft())
                if on_progress:
                    on_progress("pack", writer.position, data_bytes)
        while made:
            _append(writer, *made.popleft())
        writer.append(memoryview(bytes(data_bytes - writer.position)))
    finally:
        pool.shutdown(cancel_futures=True)


def _append(writer: PackWriter, piece: _Piece, made: Future[_Bytes]) -> None:
    """Write a piece, and zeros up to it; without what a run before this one wrote of it."""
    if piece.offset > writer.position:
        writer.append(memoryview(bytes(piece.offset - writer.position)))
    writer.append(made.result()[writer.position - piece.offset :].data)


def _made(piece: _Piece, backend: FileBackend, staging: _Bytes, refine: bool) -> _Bytes:
    """The bytes of a piece as they go into the file."""
    source, target, columns = piece.source, piece.target, piece.source.shape[-1]
    extent = source.rows(piece.first_row, piece.first_row + piece.rows)
    offset, nbytes, skip = aligned_range(extent, backend.alignment)
    backend.read_into(extent.file_index, offset, staging[:nbytes].data)
    raw = staging[skip : skip + extent.nbytes]
    if target.layout == "rows":
        return raw.copy()
    if isinstance(target.format, PlaneFormat) and target.format is not source.format:
        weights = dequantize_ref(source.format, raw).reshape(piece.rows, columns)
        raw = quantize_planes(target.format, weights, refine=refine).reshape(-1)
    out = np.empty(_bytes_of(target, piece.rows), np.uint8)
    repack(target.format, raw, piece.rows, columns, out)
    return out
