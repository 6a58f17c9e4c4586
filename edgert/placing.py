"""The bytes of a file become the bytes of memory: repacked, copied, or put together from parts.

And taken apart again, for a pack that is being made.

Owns: the choice between them. Must not know where the bytes come from nor when.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgert.expert_records import RecordPart
from edgert.kernels_cpu.layout import repack, tile_count
from edgert.kernels_cpu.nested import Bits, move_bits, part_bytes, part_of, tiles_of
from edgert.kernels_cpu.places import are_same
from edgert.quant.formats import CODE_BITS, BaseFormat, QuantFormat
from edgert.storage.backend import ALIGNMENT, aligned_range
from edgert.storage.manifest import Manifest, TensorEntry

__all__ = [
    "place_addresses", "place_base", "place_part", "place_refined", "place_rows", "room_of",
    "split_parts",
]  # fmt: skip

_Bytes = npt.NDArray[np.uint8]


def place_rows(entry: TensorEntry, n_rows: int, raw: Sequence[_Bytes], out: _Bytes) -> None:
    """Write `n_rows` rows of a matrix to `out` in tiles; `raw` is what `entry.extents` names."""
    if entry.layout == "nested":
        n_blocks, parts = _blocks(entry, n_rows), _parts(entry, 0, raw)
        _put_together(n_blocks, parts, tiles_of(entry.format, out))
    elif entry.layout != "rows":
        out[:] = raw[0]
    else:
        repack(entry.format, raw[0], n_rows, entry.shape[-1], out)


def place_base(
    entry: TensorEntry, bits: int, n_rows: int, raw: Sequence[_Bytes], out: _Bytes
) -> None:
    """Write the base of `bits` bits of `n_rows` rows to `out`, in tiles of that base's format.

    `raw`: the first `entry.base_parts(bits)` parts of these rows, as the file holds them.
    """
    base = tiles_of(entry.base_format(bits), out)
    _put_together(_blocks(entry, n_rows), _parts(entry, 0, raw), base)


def place_refined(
    entry: TensorEntry, bits: int, n_rows: int, base: _Bytes, raw: Sequence[_Bytes], out: _Bytes
) -> None:
    """Write `n_rows` rows to `out` in tiles of the matrix' format, to the bit those of the source.

    `base`: the same rows as `place_base` wrote them; `raw`: their other parts as in the file.
    """
    held = tiles_of(entry.base_format(bits), base)
    rest = _parts(entry, entry.base_parts(bits), raw)
    move_bits(_blocks(entry, n_rows), [held, *rest], [tiles_of(entry.format, out)])


def place_addresses(base: int, raw: Sequence[_Bytes], out: _Bytes) -> None:
    """Write to `out` what `matmul_refined` takes: the address of a base, and those of `raw`."""
    out.view(np.int64)[:] = [base, *(part.ctypes.data for part in raw)]


def split_parts(
    entry: TensorEntry, numbers: Sequence[int], n_rows: int, tiles: _Bytes
) -> list[_Bytes]:
    """Parts `numbers`, as the file is to hold them, of `n_rows` rows in `tiles`."""
    n_blocks, fmt = _blocks(entry, n_rows), entry.format
    parts = []
    for i in numbers:
        bits, low = entry.part_bits[i], CODE_BITS[fmt.name] - sum(entry.part_bits[: i + 1])
        room = np.empty(part_bytes(fmt, bits, i == 0, n_blocks), np.uint8)
        parts.append(part_of(fmt, bits, low, room))
    move_bits(n_blocks, [tiles_of(fmt, tiles)], parts)
    return [part.data for part in parts]


def _put_together(n_blocks: int, parts: Sequence[Bits], out: Bits) -> None:
    """Tiles from parts that hold all their bits: one that lies as they do is copied."""
    if len(parts) == 1 and are_same(parts[0].places, out.places):
        out.data[:] = parts[0].data
    else:
        move_bits(n_blocks, parts, [out])


def _blocks(entry: TensorEntry, n_rows: int) -> int:
    return tile_count(n_rows) * (entry.shape[-1] // entry.format.block_size)


def _parts(entry: TensorEntry, first: int, raw: Sequence[_Bytes]) -> list[Bits]:
    """`raw` as the parts from number `first` on."""
    fmt: QuantFormat = entry.format.of if isinstance(entry.format, BaseFormat) else entry.format
    low, parts = CODE_BITS[fmt.name] - sum(entry.part_bits[:first]), []
    for bits, data in zip(entry.part_bits[first:], raw, strict=False):
        low -= bits
        parts.append(part_of(fmt, bits, low, data))
    return parts


def place_part(part: RecordPart, manifest: Manifest, raw: _Bytes, slot: _Bytes) -> None:
    """Write what was read of one expert to its place in the slot."""
    out = slot[part.start : part.start + part.nbytes]
    if part.tensor:
        place_rows(manifest.tensors[part.tensor], part.rows, [raw], out)
    else:
        out[:] = raw


def room_of(part: RecordPart, record_bytes: int, expert: int, slot: _Bytes) -> _Bytes | None:
    """Where in the slot a part of an expert is read to as it is; None if it has to be placed.

    Whole blocks are read, so what follows a part must be another block, or nothing of the record.
    """
    _, nbytes, skip = aligned_range(part.of(expert), ALIGNMENT)
    is_last = part.start + part.nbytes == record_bytes
    if part.tensor or skip or part.start % ALIGNMENT or not (is_last or nbytes == part.nbytes):
        return None
    return slot[part.start : part.start + nbytes]
