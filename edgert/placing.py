"""The bytes of a file become the bytes of memory: rows are repacked into tiles, tiles are copied.

Owns: the choice between the two. Must not know where the bytes come from nor when.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgert.expert_records import RecordPart
from edgert.kernels_cpu.layout import repack
from edgert.storage.manifest import Manifest, TensorEntry

__all__ = ["place_part", "place_rows"]

_Bytes = npt.NDArray[np.uint8]


def place_rows(entry: TensorEntry, n_rows: int, raw: _Bytes, out: _Bytes) -> None:
    """Write `n_rows` rows of a matrix, as the file holds them in `raw`, to `out` in tiles."""
    if entry.layout == "tiles":
        out[:] = raw
    else:
        repack(entry.format, raw, n_rows, entry.shape[-1], out)


def place_part(part: RecordPart, manifest: Manifest, raw: _Bytes, slot: _Bytes) -> None:
    """Write what was read of one expert to its place in the slot."""
    out = slot[part.start : part.start + part.nbytes]
    if part.tensor:
        place_rows(manifest.tensors[part.tensor], part.rows, raw, out)
    else:
        out[:] = raw
