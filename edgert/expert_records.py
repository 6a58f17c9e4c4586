"""What an expert is in a slot, and in which requests it is read.

Owns: the record of a layer's experts and its parts. Pure. Must not know how many slots there are
(plan.py), who reads the parts nor how they are placed (placing.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgert.errors import UnsupportedError
from edgert.kernels_cpu.layout import TILE_ROWS, matrix_bytes, tile_bytes
from edgert.kernels_cpu.matmul import takes_quantized_input
from edgert.models.spec import ModelSpec
from edgert.models.tensors import TensorNeed
from edgert.quant.formats import QuantFormat
from edgert.storage.backend import ALIGNMENT
from edgert.storage.manifest import Extent, Manifest, TensorEntry
from edgert.units import align_up

__all__ = ["ExpertRecord", "RecordPart", "expert_records"]


@dataclass(frozen=True, slots=True)
class RecordPart:
    """What one request reads of an expert: rows of gate, up or down, or a run of packed bytes."""

    tensor: str  # "" where the file holds what the slot will
    rows: int
    start: int  # in the slot
    nbytes: int  # in the slot
    extent: Extent  # of expert 0
    stride: int  # bytes in the file from one expert to the next

    def of(self, expert: int) -> Extent:
        """The extent of one expert."""
        first = self.extent
        return Extent(first.file_index, first.offset + expert * self.stride, first.nbytes)


@dataclass(frozen=True, slots=True)
class ExpertRecord:
    """The experts of one layer: formats, shapes, and where the parts lie in a slot."""

    tensors: tuple[str, str, str]  # gate, up, down
    formats: tuple[QuantFormat, QuantFormat, QuantFormat]
    up_offset: int
    down_offset: int
    nbytes: int
    parts: tuple[RecordPart, ...]  # each of a size that is read at once


def expert_records(
    spec: ModelSpec, needs: dict[str, TensorNeed], manifest: Manifest, size: int
) -> tuple[ExpertRecord, ...]:
    """The experts of each layer, read in parts of about `size` bytes."""
    records = []
    for layer in range(spec.num_hidden_layers if spec.is_moe else 0):
        names = tuple(f"blk.{layer}.ffn_{part}_exps.weight" for part in ("gate", "up", "down"))
        formats = tuple(manifest.tensors[n].format for n in names)
        sizes = [
            align_up(matrix_bytes(f, *needs[n].shape[1:]), 64)
            for f, n in zip(formats, names, strict=True)
        ]
        if takes_quantized_input(formats[0]) != takes_quantized_input(formats[1]):
            raise UnsupportedError(
                f"{names[0]} is {formats[0].name} and {names[1]} is {formats[1].name}: "
                "gate and up of an expert must both be quantised or both be floating point"
            )
        starts = (0, sizes[0], sizes[0] + sizes[1])
        entries = [manifest.tensors[n] for n in names]
        if _is_packed(entries, starts, sum(sizes)):
            parts = _packed_parts(entries[0], sum(sizes), size)
        else:
            cut = (_row_parts(e, start, size) for e, start in zip(entries, starts, strict=True))
            parts = [part for found in cut for part in found]
        records.append(
            ExpertRecord(
                (names[0], names[1], names[2]),
                (formats[0], formats[1], formats[2]),
                starts[1],
                starts[2],
                sum(sizes),
                tuple(parts),
            )
        )
    return tuple(records)


def _row_parts(entry: TensorEntry, start: int, size: int) -> list[RecordPart]:
    """One matrix of an expert, whose place in the slot is `start`, in runs of whole tiles."""
    rows, columns = entry.shape[1:]
    first, group = entry.matrix(0), tile_bytes(entry.format, columns)
    groups = -(-rows // TILE_ROWS)
    step = TILE_ROWS * -(-groups // -(-groups * group // size))
    in_tiles = entry.layout == "tiles"
    row_bytes = group // TILE_ROWS if in_tiles else entry.format.row_bytes(columns)
    parts = []
    for row in range(0, rows, step):
        count = min(step, rows - row)
        nbytes = matrix_bytes(entry.format, count, columns)
        extent = Extent(
            first.file_index,
            first.offset + row * row_bytes,
            nbytes if in_tiles else count * row_bytes,
        )
        at = start + row // TILE_ROWS * group
        stride = entry.stride if in_tiles else first.nbytes
        parts.append(RecordPart(entry.name, count, at, nbytes, extent, stride))
    return parts


def _packed_parts(first: TensorEntry, nbytes: int, size: int) -> list[RecordPart]:
    """A record that lies in the file as in its slot, in runs of whole pages."""
    at = first.matrix(0)
    step = align_up(-(-nbytes // -(-nbytes // size)), ALIGNMENT)
    return [
        RecordPart(
            "", 0, start, min(step, nbytes - start),
            Extent(at.file_index, at.offset + start, min(step, nbytes - start)), first.stride,
        )
        for start in range(0, nbytes, step)
    ]  # fmt: skip


def _is_packed(entries: Sequence[TensorEntry], starts: Sequence[int], nbytes: int) -> bool:
    """True when gate, up and down of an expert lie in the file as in its slot, `nbytes` in all."""
    first = entries[0]
    return all(
        e.layout == "tiles"
        and nbytes <= e.stride == first.stride
        and e.extent.file_index == first.extent.file_index
        and e.extent.offset == first.extent.offset + start
        for e, start in zip(entries, starts, strict=True)
    )
