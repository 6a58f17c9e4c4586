"""Making a pack: a model's weights in the order and layout in which they are used.

Owns: where each tensor goes in the file, which ones are quantised again, which nested. Must not
know how the bytes are made (pack_pieces.py), written or checked (storage/pack_writer.py).

The order is that of the forward pass, so that streaming reads forwards. Matrices are in tiles, the
experts of a layer one record each; vectors stay rows, and so does the embedding, of which single
rows are read. With tied embeddings the head is placed from those rows, as it is from a GGUF: it is
read once, while a second copy would be a quarter of a small model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgert.errors import InputError, UnsupportedError
from edgert.kernels_cpu.layout import matrix_bytes
from edgert.kernels_cpu.plane_fit import quantize_planes
from edgert.models.tensors import TensorNeed, TensorRole, check_tensors
from edgert.opening import open_model
from edgert.pack_pieces import write_pieces
from edgert.pack_splits import Splits, nothing_nested, read_splits, split_of
from edgert.quant.formats import BY_NAME, PLANES, PlaneFormat, QuantFormat
from edgert.quant.quantize import quantize_ref
from edgert.storage.backend import FileBackend
from edgert.storage.gguf import metadata_bytes
from edgert.storage.manifest import Extent, Manifest, TensorEntry
from edgert.storage.pack import MAGIC, PAGE, PART, encode_index, part_bytes
from edgert.storage.pack_writer import PackWriter, data_offset_of
from edgert.units import align_up

__all__ = ["check_output", "pack_model"]

Progress = Callable[[str, int, int], object]  # what, done, to do

_EIGHT_BITS = BY_NAME["Q8_0"]

# What a plane format is for: most of the weights. The router decides which experts run.
_QUANTISED = frozenset({
    TensorRole.Q_PROJ, TensorRole.K_PROJ, TensorRole.V_PROJ, TensorRole.O_PROJ,
    TensorRole.GATE_PROJ, TensorRole.UP_PROJ, TensorRole.DOWN_PROJ,
})  # fmt: skip


def pack_model(
    source: str | Path,
    out: str | Path,
    *,
    type_name: str = "keep",
    nested: str | None = None,
    refine: bool = True,
    force: bool = False,
    formats: Mapping[str, QuantFormat | Sequence[QuantFormat]] | None = None,
    importance: Mapping[str, npt.NDArray[np.float32]] | None = None,
    on_progress: Progress | None = None,
) -> Manifest:
    """Write the GGUF model `source` as the pack `out`, verify it, and return its manifest.

    `type_name`: "keep" for the very weights of the source, a plane format ("P3_128") for the
    matrices of attention and feed-forward, or "Q8_0" for those in 16 or 32 bits and the head; both
    are lossy. `nested`: the bits of the parts in which codes of a matrix are kept, most significant
    first: "4+4" for codes of 8 bits (Q8_0), "4+2" of 6 (Q6_K), "4+1" of 5 (Q5_0, Q5_1, Q5_K),
    "3+1" of 4 (Q4_0, Q4_1, Q4_K), several with commas between, or "auto"; other matrices are kept
    whole. The weights stay the same, and the first parts alone are a model as well.
    `refine=False` rounds to nearest instead of searching scales: half the time, for measurements.
    `force` replaces `out`.
    `formats`: tensor by tensor, by name, instead of `type_name`; of a stack of experts one for all
    or one for each. `importance`: what the error of each column of a tensor counts, of a stack
    [columns] or [experts, columns] (`quantize_planes`). `on_progress` gets "pack" or "verify" and
    bytes of data.

    Memory: under 300 MiB whatever the model. An interrupted run leaves `out`.partial, which the
    same call continues; `out` itself is whole or not there. Raises `InputError` (the output exists,
    is the source, cannot be made), `EdgertError` (disk full), and as `load` does for the source.
    """
    source, out = Path(source), Path(out)
    fmt, splits = _format(type_name), read_splits(nested, type_name)
    opened = open_model(source)
    manifest = opened.manifest
    check_output(manifest, out, force)
    needs = check_tensors(opened.spec, manifest.tensors)
    if formats is None:
        formats = {} if fmt is None else _quantised(needs, manifest, fmt)
    importance = importance or {}
    placed, data_bytes = _placed(needs, manifest, formats, splits)
    if splits and not any(entry.parts for entry in placed):
        matrices = [e.format for e in placed if needs[e.name].kind == "matrix"]
        raise InputError(f"{source} {nothing_nested(matrices, splits)}")
    n_keys, metadata = metadata_bytes(manifest.files[0])
    start = data_offset_of(len(encode_index(n_keys, metadata, placed)), data_bytes)
    index = encode_index(n_keys, metadata, [_moved(entry, start) for entry in placed])
    stamp = repr([(s.st_size, s.st_mtime_ns) for s in (p.stat() for p in manifest.files)])
    stamp += " ".join(
        f"{name} {sha256(each.tobytes()).hexdigest()}" for name, each in importance.items()
    )
    with PackWriter(out, index, data_bytes, f"{stamp} {refine}".encode()) as writer:
        backend = FileBackend(manifest.files, file_bytes=manifest.file_bytes)
        try:
            requantise = partial(_requantised, refine=refine, importance=importance)
            write_pieces(writer, placed, manifest, backend, requantise, data_bytes, on_progress)
        finally:
            backend.close()
        writer.finish(on_progress and (lambda done, total: on_progress("verify", done, total)))
    return open_model(out).manifest


def _requantised(
    target: TensorEntry,
    index: int,
    weights: npt.NDArray[np.float32],
    refine: bool,
    importance: Mapping[str, npt.NDArray[np.float32]],
) -> npt.NDArray[np.uint8]:
    """Weights [rows, columns] of matrix `index` of a tensor in the format of `target`."""
    fmt = target.format
    if isinstance(fmt, PlaneFormat):
        counts = importance.get(target.name)
        if counts is not None and counts.ndim == 2:
            counts = counts[index]
        return quantize_planes(fmt, weights, counts, refine=refine)
    return quantize_ref(fmt, weights)


def _quantised(
    needs: Mapping[str, TensorNeed], manifest: Manifest, fmt: QuantFormat
) -> dict[str, QuantFormat]:
    """What `fmt` is for: most of the weights; of eight bits those that have more, in rows of whole
    blocks (files of 8 bits keep others in 16, too).
    """
    found = [n for n in needs.values() if n.role in _QUANTISED and len(n.shape) > 1]
    if fmt is _EIGHT_BITS:
        found += [n for n in needs.values() if n.role is TensorRole.LM_HEAD]
        found = [n for n in found if manifest.tensors[n.name].format.is_float]
        found = [n for n in found if n.shape[-1] % fmt.block_size == 0]
    return {n.name: fmt for n in found}


def _format(type_name: str) -> QuantFormat | None:
    if type_name == "keep":
        return None
    if type_name == _EIGHT_BITS.name:
        return _EIGHT_BITS
    if type_name not in PLANES:
        raise InputError(f"{type_name!r} is not keep, Q8_0 or one of {' '.join(PLANES)}")
    return PLANES[type_name]


def check_output(manifest: Manifest, out: Path, force: bool) -> None:
    """Raise `InputError` where no pack of this model may be written to `out`."""
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
    formats: Mapping[str, QuantFormat | Sequence[QuantFormat]],
    splits: Splits,
) -> tuple[list[TensorEntry], int]:
    """The tensors in file order, with offsets from the start of the data, and its bytes."""
    entries: list[TensorEntry] = []
    at = 0
    record: list[list[TensorEntry]] = []
    for need in needs.values():
        source, chosen = manifest.tensors[need.name], formats.get(need.name, ())
        each = [chosen] if isinstance(chosen, QuantFormat) else chosen or [source.format]
        if need.kind == "expert_matrix":
            each = [*each] * (need.shape[0] if len(each) == 1 else 1)
            record.append([_target(need, source, fmt) for fmt in each])
            if len(record) == 3:
                stack, nbytes = _recorded(record, at)
                entries += stack
                at += nbytes
                record = []
            continue
        entry = _target(need, source, each[0])
        split = split_of(entry.format, splits)
        if split and need.kind == "matrix":
            entry = _nested(entry, split)
        entries.append(_moved(entry, at))
        last = (entry.parts or (entry.extent,))[-1]
        at += align_up(last.offset + last.nbytes, PAGE)
    assert not record
    return entries, at


def _target(need: TensorNeed, source: TensorEntry, found: QuantFormat) -> TensorEntry:
    """What becomes of a tensor, or of one matrix of a stack; its extent begins at 0."""
    if need.shape[-1] % found.block_size:
        other = f"; P{found.bits}_32 has groups of 32" if isinstance(found, PlaneFormat) else ""
        raise UnsupportedError(
            f"tensor {need.name!r} has rows of {need.shape[-1]:,} weights, not a multiple of "
            f"the {found.block_size} of {found.name}{other}"
        )
    if need.kind in ("vector", "embedding"):
        return replace(source, extent=Extent(0, 0, source.extent.nbytes))
    extent = Extent(0, 0, matrix_bytes(found, *source.shape[-2:]))
    return TensorEntry(source.name, found, source.shape, extent, "tiles")


def _recorded(stacks: Sequence[Sequence[TensorEntry]], at: int) -> tuple[list[TensorEntry], int]:
    """Gate, up and down of a layer, each expert by expert, as one record for each expert; and the
    bytes of all.
    """
    begin, placed = at, []
    for record in zip(*stacks, strict=True):
        moved = []
        for matrix in record:
            moved.append(_moved(matrix, at))
            at += align_up(matrix.extent.nbytes, PART)
        at = align_up(at, PAGE)
        placed.append(moved)
    if all(len({m.format for m in stack}) == 1 for stack in stacks):
        stride = (at - begin) // len(placed)
        return [replace(first, stride=stride) for first in placed[0]], at - begin
    found = []
    for stack in zip(*placed, strict=True):
        first, matrices = stack[0], tuple((m.format, m.extent) for m in stack)
        whole = Extent(0, first.extent.offset, sum(m.extent.nbytes for m in stack))
        found.append(replace(first, extent=whole, layout="mixed", matrices=matrices))
    return found, at - begin


def _nested(entry: TensorEntry, split: tuple[int, ...]) -> TensorEntry:
    """A matrix in parts, one after another from 0 on."""
    parts: list[Extent] = []
    at = 0
    for i, bits in enumerate(split):
        parts.append(Extent(0, at, part_bytes(entry.format, bits, i == 0, *entry.shape)))
        at += align_up(parts[-1].nbytes, PAGE)
    whole = Extent(0, 0, sum(part.nbytes for part in parts))
    return replace(entry, extent=whole, layout="nested", parts=tuple(parts), part_bits=split)


def _moved(entry: TensorEntry, by: int) -> TensorEntry:
    def moved(at: Extent) -> Extent:
        return Extent(0, at.offset + by, at.nbytes)

    parts = tuple(moved(part) for part in entry.parts)
    matrices = tuple((fmt, moved(extent)) for fmt, extent in entry.matrices)
    return replace(entry, extent=moved(entry.extent), parts=parts, matrices=matrices)
