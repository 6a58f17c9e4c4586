"""The parts in which an expert is read: together they are the record, however finely it is cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgert.expert_records import LayerExperts, expert_records
from edgert.kernels_cpu.layout import matrix_bytes, repack_ref
from edgert.models.spec import spec_from_manifest
from edgert.models.tensors import check_tensors
from edgert.pack import pack_model
from edgert.placing import place_part, room_of
from edgert.storage.backend import ALIGNMENT
from edgert.storage.gguf import read_gguf
from edgert.storage.manifest import Manifest
from edgert.storage.pack import read_pack

SIZES = [1, 5000, 20_000, 1 << 20]  # a tile at a time, ..., all at once


def records_of(manifest: Manifest, size: int):
    spec = spec_from_manifest(manifest.metadata, manifest.tensors)
    needs = check_tensors(spec, manifest.tensors)
    return spec, expert_records(spec, needs, manifest, size)


def placed(manifest: Manifest, layer: LayerExperts, expert: int) -> bytes:
    data, record = manifest.files[0].read_bytes(), layer.record(expert)
    slot = np.zeros(record.nbytes, np.uint8)
    for part in record.parts:
        at = part.of(expert)
        raw = np.frombuffer(data, np.uint8, at.nbytes, at.offset)
        place_part(part, manifest, raw, slot)
    return slot.tobytes()


def whole(manifest: Manifest, layer: LayerExperts, expert: int) -> bytes:
    """The record, each matrix repacked at once by the slow twin."""
    data, record = manifest.files[0].read_bytes(), layer.record(expert)
    slot = np.zeros(record.nbytes, np.uint8)
    starts = (0, record.up_offset, record.down_offset)
    for name, fmt, start in zip(layer.tensors, record.formats, starts, strict=True):
        entry = manifest.tensors[name]
        rows, columns = entry.shape[1:]
        at = entry.matrix(expert).extent
        raw = np.frombuffer(data, np.uint8, at.nbytes, at.offset)
        nbytes = matrix_bytes(fmt, rows, columns)
        slot[start : start + nbytes] = repack_ref(fmt, raw, rows, columns)
    return slot.tobytes()


@pytest.mark.parametrize("size", SIZES)
def test_parts_make_the_record_of_a_gguf_and_of_a_pack(
    tiny_moe_gguf: Path, tmp_path: Path, size: int
) -> None:
    gguf = read_gguf(tiny_moe_gguf)
    pack_model(tiny_moe_gguf, tmp_path / "moe.edgert")
    pack = read_pack(tmp_path / "moe.edgert")
    spec, records = records_of(gguf, size)
    _, packed = records_of(pack, size)
    for layer, same in zip(records, packed, strict=True):
        assert {part.tensor for part in same.record(0).parts} == {""}
        for expert in (0, spec.num_experts - 1):
            truth = whole(gguf, layer, expert)
            assert placed(gguf, layer, expert) == truth == placed(pack, same, expert)
    parts = records[0].record(0).parts
    if size == SIZES[0]:
        assert len(parts) > 10
    if size == SIZES[-1]:
        assert len(parts) == 3 and len(packed[0].record(0).parts) == 1


@pytest.mark.parametrize("size", SIZES[1:])
def test_parts_of_a_pack_are_read_into_their_slots(
    tiny_moe_gguf: Path, tmp_path: Path, size: int
) -> None:
    """What is read, rounded up to whole blocks, ends within the slot and spoils no other part."""
    pack_model(tiny_moe_gguf, tmp_path / "moe.edgert")
    pack = read_pack(tmp_path / "moe.edgert")
    spec, packed = records_of(pack, size)
    data = np.fromfile(pack.files[0], np.uint8)
    data = np.pad(data, (0, -len(data) % ALIGNMENT), constant_values=255)
    for layer in packed:
        for expert in (0, spec.num_experts - 1):
            record = layer.record(expert)
            slot = np.zeros(-(-record.nbytes // ALIGNMENT) * ALIGNMENT, np.uint8)
            for part in record.parts:
                room = room_of(part, record.nbytes, expert, slot)
                offset = part.of(expert).offset
                assert room is not None and room.nbytes % ALIGNMENT == offset % ALIGNMENT == 0
                room[:] = data[offset : offset + room.nbytes]
            assert slot[: record.nbytes].tobytes() == placed(pack, layer, expert)
            short = part.nbytes - 64  # another part would follow within the last block
            cut = replace(part, nbytes=short, extent=replace(part.extent, nbytes=short))
            assert room_of(cut, record.nbytes, expert, slot) is None
    _, rows = records_of(read_gguf(tiny_moe_gguf), size)
    for record in (layer.record(0) for layer in rows):
        assert {room_of(part, record.nbytes, 1, slot) is None for part in record.parts} == {True}
