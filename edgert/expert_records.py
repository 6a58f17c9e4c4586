"""What an expert is in a slot, and in which requests it is read.

Owns: the record of a layer's experts and its parts. Pure. Must not know how many slots there are
(plan.py), who reads the parts nor how they are placed (placing.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgert.errors import UnsupportedError
from edgert.kernels_cpu.layout import TILE_ROWS, matrix_bytes, tile_bytes
from edgert.kernels_cpu.matmul import takes_quantized_input
from edgert.models.spec import ModelSpec
from edgert.models.tensors import TensorNeed
from edgert.quant.formats import QuantFormat
from edgert.storage.backend import ALIGNMENT
from edgert.storage.manifest import Extent, Manifest, TensorEntry
from edgert.units import align_up

__all__ = ["ExpertRecord", "LayerExperts", "RecordPart", "expert_records", "record_sizes"]


@dataclass(frozen=True, slots=True)
class RecordPart:
    """What one request reads of an expert: rows of gate, up or down, or a run of packed bytes."""

    tensor: str  # "" where the file holds what the slot will
    rows: int
    start: int  # in the slot
    nbytes: int  # in the slot
    extent: Extent  # of expert 0, where experts are alike
    stride: int  # bytes in the file from one expert to the next; 0 where they are not

    def of(self, expert: int) -> Extent:
        """The extent of one expert."""
        first = self.extent
        return Extent(first.file_index, first.offset + expert * self.stride, first.nbytes)


@dataclass(frozen=True, slots=True)
class ExpertRecord:
    """An expert: formats of gate, up and down, and where the parts lie in a slot."""

    formats: tuple[QuantFormat, QuantFormat, QuantFormat]
    up_offset: int
    down_offset: int
    nbytes: int
    parts: tuple[RecordPart, ...]  # each of a size that is read at once


@dataclass(frozen=True, slots=True)
class LayerExperts:
    """The experts of one layer."""

    tensors: tuple[str, str, str]  # gate, up, down
    records: tuple[ExpertRecord, ...]  # one for all experts, or one for each

    def record(self, expert: int) -> ExpertRecord:
        """What one expert is."""
        return self.records[expert if len(self.records) > 1 else 0]

    def extents(self, expert: int) -> list[Extent]:
        """What to read of one expert, each at once."""
        return [part.of(expert) for part in self.record(expert).parts]


def expert_records(
    spec: ModelSpec, needs: dict[str, TensorNeed], manifest: Manifest, size: int
) -> tuple[LayerExperts, ...]:
    """The experts of each layer, read in parts of about `size` bytes.

    Raises `UnsupportedError` where experts of a layer would need their inputs in two forms.
    """
    layers = []
    for layer in range(spec.num_hidden_layers if spec.is_moe else 0):
        gate, up, down = (f"blk.{layer}.ffn_{part}_exps.weight" for part in ("gate", "up", "down"))
        entries = [manifest.tensors[name] for name in (gate, up, down)]
        _check_inputs(entries)
        count = spec.num_experts if any(e.matrices for e in entries) else 1
        strides = [0 if count > 1 else _stride(entry) for entry in entries]
        layers.append(
            LayerExperts(
                (gate, up, down),
                tuple(_record(entries, strides, expert, size) for expert in range(count)),
            )
        )
    return tuple(layers)


def record_sizes(experts: Sequence[LayerExperts], spec: ModelSpec) -> npt.NDArray[np.int64]:
    """Bytes that each expert takes of a slot, whole pages: [layers, experts]."""
    found = np.empty((len(experts), spec.num_experts), np.int64)
    for sizes, layer in zip(found, experts, strict=True):
        sizes[:] = [align_up(record.nbytes, ALIGNMENT) for record in layer.records]
    return found


def _stride(entry: TensorEntry) -> int:
    """Bytes in the file from one expert to the next, of experts that are alike."""
    return entry.stride or entry.extent.nbytes // entry.shape[0]


def _check_inputs(entries: Sequence[TensorEntry]) -> None:
    """All that read the same input want it quantised, or all as it is."""
    gate, up, down = entries
    for readers in ((gate, up), (down,)):
        kinds = {takes_quantized_input(f): (f, e) for e in readers for f in e.formats}
        if len(kinds) > 1:
            first, second = (f"{e.name} has {f.name}" for f, e in kinds.values())
            raise UnsupportedError(
                f"{first} and {second}: what reads the same input in the experts of a layer must "
                "all be quantised or all be floating point"
            )


def _record(
    stacks: Sequence[TensorEntry], strides: Sequence[int], expert: int, size: int
) -> ExpertRecord:
    """One expert of a layer; parts of the first lead to those of others by the strides."""
    gate, up, down = entries = [entry.matrix(expert) for entry in stacks]
    sizes = [align_up(matrix_bytes(e.format, *e.shape), 64) for e in entries]
    starts = (0, sizes[0], sizes[0] + sizes[1])
    parts: list[RecordPart] = []
    if _is_packed(entries, strides, starts, sum(sizes)):
        parts = _packed_parts(gate, strides[0], sum(sizes), size)
    else:
        for entry, stride, start in zip(entries, strides, starts, strict=True):
            parts += _row_parts(entry, stride, start, size)
    formats = (gate.format, up.format, down.format)
    return ExpertRecord(formats, starts[1], starts[2], sum(sizes), tuple(parts))


def _row_parts(entry: TensorEntry, stride: int, start: int, size: int) -> list[RecordPart]:
    """One matrix of an expert, whose place in the slot is `start`, in runs of whole tiles."""
    rows, columns = entry.shape
    group = tile_bytes(entry.format, columns)
    groups = -(-rows // TILE_ROWS)
    step = TILE_ROWS * -(-groups // -(-groups * group // size))
    parts = []
    for row in range(0, rows, step):
        count = min(step, rows - row)
        nbytes = matrix_bytes(entry.format, count, columns)
        at = start + row // TILE_ROWS * group
        extent = entry.rows(row, row + count)
        parts.append(RecordPart(entry.name, count, at, nbytes, extent, stride))
    return parts


def _packed_parts(first: TensorEntry, stride: int, nbytes: int, size: int) -> list[RecordPart]:
    """A record that lies in the file as in its slot, in runs of whole pages."""
    at = first.extent
    step = align_up(-(-nbytes // -(-nbytes // size)), ALIGNMENT)
    return [
        RecordPart(
            "", 0, start, min(step, nbytes - start),
            Extent(at.file_index, at.offset + start, min(step, nbytes - start)), stride,
        )
        for start in range(0, nbytes, step)
    ]  # fmt: skip


def _is_packed(
    entries: Sequence[TensorEntry], strides: Sequence[int], starts: Sequence[int], nbytes: int
) -> bool:
    """True when gate, up and down of an expert lie in the file as in its slot, `nbytes` in all."""
    first = entries[0].extent
    return all(
        e.layout == "tiles"
        and stride == strides[0]
        and (nbytes <= stride or not stride)
        and e.extent.file_index == first.file_index
        and e.extent.offset == first.offset + start
        for e, stride, start in zip(entries, strides, starts, strict=True)
    )
