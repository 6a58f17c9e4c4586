"""Making a pack: a model's weights in the order and layout in which they are used.

Owns: where each tensor goes in the file, which ones are quantised again, and making their bytes
piece by piece. Must not know how the file is written or checked (storage/pack_writer.py).

The order is that of the forward pass, so that streaming reads forwards. Matrices are in tiles, the
experts of a layer one record each; vectors stay rows, and so does the embedding, of which single
rows are read. With tied embeddings the head is placed from those rows, as it is from a GGUF: it is
read once, while a second copy would be a quarter of a small model.

A nested matrix lies part by part. Each part is made from the rows anew, so that nothing but pieces
is ever held: the source is read as often as there are parts.
"""

from __future__ import annotations

import mmap
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgert.errors import InputError, UnsupportedError
from edgert.kernels_cpu.layout import TILE_ROWS, matrix_bytes, repack
from edgert.kernels_cpu.plane_fit import quantize_planes
from edgert.models.tensors import TensorNeed, TensorRole, check_tensors
from edgert.opening import open_model
from edgert.placing import split_part
from edgert.quant.formats import BASES, PLANES, PlaneFormat, QuantFormat
from edgert.quant.reference import dequantize_ref
from edgert.storage.backend import FileBackend, aligned_range
from edgert.storage.gguf import metadata_bytes
from edgert.storage.manifest import Extent, Manifest, TensorEntry
from edgert.storage.pack import (
    MAGIC,
    NESTED_FORMAT,
    PAGE,
    PART,
    PARTS_MAX,
    encode_index,
    part_bytes,
)
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
    part: int | None = None  # of a nested matrix


def pack_model(
    source: str | Path,
    out: str | Path,
    *,
    type_name: str = "keep",
    nested: str | None = None,
    refine: bool = True,
    force: bool = False,
    formats: Mapping[str, PlaneFormat] | None = None,
    importance: Mapping[str, npt.NDArray[np.float32]] | None = None,
    on_progress: Progress | None = None,
) -> Manifest:
    """Write the GGUF model `source` as the pack `out`, verify it, and return its manifest.

    `type_name`: "keep" for the very weights of the source, or a plane format ("P3_128") for the
    matrices of attention and feed-forward, which is lossy. `nested`: the bits of the parts in which
    matrices of Q8_0 are kept, most significant first ("4+4"): the same weights, of which the first
    parts alone are a model as well. `refine=False` rounds to nearest
    instead of searching scales: half the time, for measurements. `force` replaces `out`.
    `formats`: tensor by tensor, by name, instead of `type_name`; `importance`: what the error of
    each column of a tensor counts (`quantize_planes`). `on_progress` gets "pack" or "verify" and
    bytes of data.

    Memory: under 300 MiB whatever the model. An interrupted run leaves `out`.partial, which the
    same call continues; `out` itself is whole or not there. Raises `InputError` (the output exists,
    is the source, cannot be made), `EdgertError` (disk full), and as `load` does for the source.
    """
    source, out = Path(source), Path(out)
    fmt, split = _format(type_name), _split(nested, type_name)
    opened = open_model(source)
    manifest = opened.manifest
    _check_output(manifest, out, force)
    needs = check_tensors(opened.spec, manifest.tensors)
    if formats is None:
        wanted = [n.name for n in needs.values() if n.role in _QUANTISED and len(n.shape) > 1]
        formats = {} if fmt is None else dict.fromkeys(wanted, fmt)
    importance = importance or {}
    placed, data_bytes = _placed(needs, manifest, formats, split)
    if split and not any(entry.parts for entry in placed):
        raise InputError(f"{source} has no matrix in {NESTED_FORMAT.name} that could be nested")
    n_keys, metadata = metadata_bytes(manifest.files[0])
    start = data_offset_of(len(encode_index(n_keys, metadata, placed)), data_bytes)
    index = encode_index(n_keys, metadata, [_moved(entry, start) for entry in placed])
    stamp = repr([(s.st_size, s.st_mtime_ns) for s in (p.stat() for p in manifest.files)])
    stamp += " ".join(f"{name} {values.tobytes().hex()}" for name, values in importance.items())
    with PackWriter(out, index, data_bytes, f"{stamp} {refine}".encode()) as writer:
        pieces = list(_pieces(placed, manifest))
        backend = FileBackend(manifest.files, file_bytes=manifest.file_bytes)
        try:

            def make(piece: _Piece, staging: _Bytes) -> _Bytes:
                return _made(piece, staging, backend, refine, importance)

            _write(writer, pieces, make, data_bytes, on_progress)
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


def _split(nested: str | None, type_name: str) -> tuple[int, ...]:
    """The bits of each part of a nested matrix; () when none is nested."""
    if nested is None:
        return ()
    if type_name != "keep":
        raise InputError(f"matrices cannot be both nested and {type_name}; choose one")
    parts = nested.split("+")
    bits = tuple(int(part) for part in parts if part.isdecimal() and int(part) > 0)
    widths = [sum(bits[: i + 1]) for i in range(len(bits))]
    if len(bits) != len(parts) or sum(bits) != 8 or not 2 <= len(bits) <= PARTS_MAX:
        raise InputError(f"{nested!r} is not 2 to {PARTS_MAX} numbers that make 8, as 4+4 or 3+1+4")
    if not any(width in BASES for width in widths):
        bases = " or ".join(map(str, BASES))
        raise InputError(f"no first parts of {nested!r} make the {bases} bits of a base")
    return bits


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
    needs: dict[str, TensorNeed],
    manifest: Manifest,
    formats: Mapping[str, PlaneFormat],
    split: tuple[int, ...],
) -> tuple[list[TensorEntry], int]:
    """The tensors in file order, with offsets from the start of the data, and its bytes."""
    entries: list[TensorEntry] = []
    at = 0
    record: list[TensorEntry] = []
    for need in needs.values():
        entry = _target(need, manifest.tensors[need.name], formats.get(need.name))
        if need.kind == "expert_matrix":
            record.append(entry)
            if len(record) == 3:
                stack, nbytes = _recorded(record, at)
                entries += stack
                at += nbytes
                record = []
            continue
        if split and need.kind == "matrix" and entry.format is NESTED_FORMAT:
            entry = _nested(entry, split)
        entries.append(_moved(entry, at))
        last = (entry.parts or (entry.extent,))[-1]
        at += align_up(last.offset + last.nbytes, PAGE)
    assert not record
    return entries, at


def _target(need: TensorNeed, source: TensorEntry, fmt: PlaneFormat | None) -> TensorEntry:
    """What becomes of a tensor; its extent begins at 0."""
    found: QuantFormat = source.format
    if fmt is not None:
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


def _nested(entry: TensorEntry, split: tuple[int, ...]) -> TensorEntry:
    """A matrix in parts, one after another from 0 on."""
    parts: list[Extent] = []
    at = 0
    for i, bits in enumerate(split):
        parts.append(Extent(0, at, part_bytes(bits, i == 0, *entry.shape)))
        at += align_up(parts[-1].nbytes, PAGE)
    whole = Extent(0, 0, sum(part.nbytes for part in parts))
    return replace(entry, extent=whole, layout="nested", parts=tuple(parts), part_bits=split)


def _moved(entry: TensorEntry, by: int) -> TensorEntry:
    def moved(at: Extent) -> Extent:
        return Extent(0, at.offset + by, at.nbytes)

    parts = tuple(moved(part) for part in entry.parts)
    return replace(entry, extent=moved(entry.extent), parts=parts)


# ---- making the bytes ---------------------------------------------------------------------------


def _pieces(placed: Sequence[TensorEntry], manifest: Manifest) -> Iterator[_Piece]:
    """Everything to write, in file order."""
    i = 0
    while i < len(placed):
        if not placed[i].stride:
            source = manifest.tensors[placed[i].name]
            for part in range(len(placed[i].parts)) or (None,):
                yield from _cut(source, placed[i], 0, part)
            i += 1
            continue
        for expert in range(placed[i].shape[0]):
            for target in placed[i : i + 3]:
                yield from _cut(manifest.tensors[target.name], target, expert)
        i += 3


def _cut(
    source: TensorEntry, target: TensorEntry, index: int, part: int | None = None
) -> Iterator[_Piece]:
    """One matrix of a tensor, or a part of it, in pieces of whole tiles; a vector is one row."""
    rows, columns = (1, *target.shape)[-2:]
    row_bytes = source.format.row_bytes(columns)
    step = max(1, _PIECE_BYTES // row_bytes)
    if target.format is not source.format:
        step = max(1, min(step, _PIECE_WEIGHTS // columns))
    if target.layout != "rows":
        step = align_up(step, TILE_ROWS)
    extent = target.extent if part is None else target.parts[part]
    start = extent.offset + index * target.stride
    for first in range(0, rows, step):
        count = min(step, rows - first)
        before = _bytes_of(target, first, part) if first else 0
        yield _Piece(source, target, index * rows + first, count, start + before, part)


def _bytes_of(target: TensorEntry, rows: int, part: int | None) -> int:
    columns = target.shape[-1]
    if part is not None:
        return part_bytes(target.part_bits[part], part == 0, rows, columns)
    if target.layout == "rows":
        return rows * target.format.row_bytes(columns)
    return matrix_bytes(target.format, rows, columns)


def _write(
    writer: PackWriter,
    pieces: Sequence[_Piece],
    make_in: Callable[[_Piece, _Bytes], _Bytes],
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
        return make_in(piece, local.staging)

    pool = ThreadPoolExecutor(_THREADS, "edgert-pack")
    made: deque[tuple[_Piece, Future[_Bytes]]] = deque()
    try:
        for piece in pieces:
            if piece.offset + _bytes_of(piece.target, piece.rows, piece.part) <= writer.position:
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


def _made(
    piece: _Piece,
    staging: _Bytes,
    backend: FileBackend,
    refine: bool,
    importance: Mapping[str, npt.NDArray[np.float32]],
) -> _Bytes:
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
        raw = quantize_planes(
            target.format, weights, importance.get(target.name), refine=refine
        ).reshape(-1)
    tiles = np.empty(matrix_bytes(target.format, piece.rows, columns), np.uint8)
    repack(target.format, raw, piece.rows, columns, tiles)
    return tiles if piece.part is None else split_part(target, piece.part, piece.rows, tiles)
