"""The bytes of a file become the bytes of memory: rows are repacked into tiles, tiles are copied.

Owns: the choice between the two. Must not know where the bytes come from nor when.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgert.kernels_cpu.layout import matrix_bytes, repack
from edgert.plan_parts import ExpertRecord
from edgert.storage.manifest import Manifest, TensorEntry

__all__ = ["place_expert", "place_rows"]

_Bytes = npt.NDArray[np.uint8]


def place_rows(entry: TensorEntry, n_rows: int, raw: _Bytes, out: _Bytes) -> None:
    """Write `n_rows` rows of a matrix, as the file holds them in `raw`, to `out` in tiles."""
    if entry.layout == "tiles":
        out[:] = raw
    else:
        repack(entry.format, raw, n_rows, entry.shape[-1], out)


def place_expert(
    record: ExpertRecord, manifest: Manifest, raw: Sequence[_Bytes], slot: _Bytes
) -> None:
    """Write one expert's record to its slot; `raw` is what `expert_parts` names."""
    if record.is_packed:
        slot[: record.nbytes] = raw[0]
        return
    starts = (0, record.up_offset, record.down_offset)
    for name, fmt, part, start in zip(record.tensors, record.formats, raw, starts, strict=True):
        entry = manifest.tensors[name]
        n_rows, columns = entry.shape[1:]
        place_rows(entry, n_rows, part, slot[start : start + matrix_bytes(fmt, n_rows, columns)])
