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
from edgert.kernels_cpu.nested import Part, move_bits, part_bytes
from edgert.quant.formats import BaseFormat
from edgert.storage.manifest import Manifest, TensorEntry

__all__ = [
    "place_addresses", "place_base", "place_part", "place_refined", "place_rows", "split_parts",
]  # fmt: skip

_Bytes = npt.NDArray[np.uint8]


def place_rows(entry: TensorEntry, n_rows: int, raw: Sequence[_Bytes], out: _Bytes) -> None:
    """Write `n_rows` rows of a matrix to `out` in tiles; `raw` is what `entry.extents` names."""
    if isinstance(entry.format, BaseFormat) and entry.layout == "nested":
        place_base(entry, entry.format.bits, n_rows, raw, out)
    elif entry.layout == "nested":
        place_refined(entry, entry.part_bits[0], n_rows, raw[0], raw[1:], out)
    elif entry.layout == "tiles":
        out[:] = raw[0]
    else:
        repack(entry.format, raw[0], n_rows, entry.shape[-1], out)


def place_base(
    entry: TensorEntry, bits: int, n_rows: int, raw: Sequence[_Bytes], out: _Bytes
) -> None:
    """Write the base of `bits` bits of `n_rows` rows to `out`, in tiles of `BASES[bits]`.

    `raw`: the first `entry.base_parts(bits)` parts of these rows, as the file holds them.
    """
    if len(raw) == 1:
        out[:] = raw[0]
        return
    move_bits(_blocks(entry, n_rows), _parts(entry, 0, raw), [Part(out, 8 - bits, bits)])


def place_refined(
    entry: TensorEntry, bits: int, n_rows: int, base: _Bytes, raw: Sequence[_Bytes], out: _Bytes
) -> None:
    """Write `n_rows` rows to `out` in tiles of Q8_0, to the bit those of the source.

    `base`: the same rows as `place_base` wrote them; `raw`: their other parts as in the file.
    """
    rest = _parts(entry, entry.base_parts(bits), raw)
    move_bits(_blocks(entry, n_rows), [Part(base, 8 - bits, bits), *rest], [Part(out, 0, 8)])


def place_addresses(base: int, raw: Sequence[_Bytes], out: _Bytes) -> None:
    """Write to `out` what `matmul_refined` takes: the address of a base, and those of `raw`."""
    out.view(np.int64)[:] = [base, *(part.ctypes.data for part in raw)]


def split_parts(
    entry: TensorEntry, numbers: Sequence[int], n_rows: int, tiles: _Bytes
) -> list[_Bytes]:
    """Parts `numbers`, as the file is to hold them, of `n_rows` rows in `tiles` of Q8_0."""
    n_blocks = _blocks(entry, n_rows)
    parts = []
    for i in numbers:
        bits, low = entry.part_bits[i], 8 - sum(entry.part_bits[: i + 1])
        parts.append(Part(np.empty(part_bytes(bits, low, n_blocks), np.uint8), low, bits))
    move_bits(n_blocks, [Part(tiles, 0, 8)], parts)
    return [part.data for part in parts]


def _blocks(entry: TensorEntry, n_rows: int) -> int:
    return tile_count(n_rows) * (entry.shape[-1] // entry.format.block_size)


def _parts(entry: TensorEntry, first: int, raw: Sequence[_Bytes]) -> list[Part]:
    """`raw` as the parts from number `first` on."""
    low, parts = 8 - sum(entry.part_bits[:first]), []
    for bits, data in zip(entry.part_bits[first:], raw, strict=False):
        low -= bits
        parts.append(Part(data, low, bits))
    return parts


def place_part(part: RecordPart, manifest: Manifest, raw: _Bytes, slot: _Bytes) -> None:
    """Write what was read of one expert to its place in the slot."""
    out = slot[part.start : part.start + part.nbytes]
    if part.tensor:
        place_rows(manifest.tensors[part.tensor], part.rows, [raw], out)
    else:
        out[:] = raw
