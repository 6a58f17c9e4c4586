"""Reading a whole pack back and comparing it with its checksums.

Owns: `verify_pack`, and what compares some chunks. Must not know what the bytes mean.
"""

from __future__ import annotations

import mmap
import threading
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from edgert.errors import FormatError
from edgert.storage.backend import FileBackend
from edgert.storage.manifest import Extent, Manifest, TensorEntry
from edgert.storage.model_file import open_model_file
from edgert.storage.pack import CHUNK_BYTES, HEADER, read_header, read_pack
from edgert.units import MIB

__all__ = ["READ_BYTES", "first_wrong", "verify_pack"]

READ_BYTES = 4 * MIB  # of chunks at a time
_THREADS = 2  # one reads while the other sums: zlib.crc32 does 3.9 GiB/s on one core

Progress = Callable[[int, int], object]  # bytes done, bytes to do


def first_wrong(backend: FileBackend, at: int, view: memoryview, sums: Sequence[int]) -> int | None:
    """Read the chunks from byte `at` on into `view`; where the first begins that has another sum.

    Raises `StorageError`.
    """
    backend.read_into(0, at, view)
    for number, start in enumerate(range(0, len(view), CHUNK_BYTES)):
        if zlib.crc32(view[start : start + CHUNK_BYTES]) != sums[number]:
            return at + start
    return None


def verify_pack(
    path: str | Path, on_progress: Progress | None = None, *, known: int = 0
) -> Manifest:
    """Read all of the pack at `path` and compare it with its checksums; its manifest.

    `known`: chunks from the first on that were read back already by the one who wrote them.

    Every bit of the file counts: a flipped one anywhere is a `FormatError` that names its chunk
    and the tensors in it. Raises as `read_pack`, and `StorageError` when a read fails. Holds
    8 MiB.
    """
    path = Path(path)
    manifest = read_pack(path)
    with open_model_file(path) as (file, size):
        header = read_header(file.read(HEADER.size), path, size)
        end = HEADER.size + header.index_bytes
        file.seek(end - 4 * header.n_chunks)
        raw = file.read(4 * header.n_chunks + header.data_offset - end)
    sums = memoryview(raw)[: 4 * header.n_chunks].cast("I")
    if any(raw[4 * header.n_chunks :]):
        raise FormatError(path, "the bytes between index and data are not zero", end)
    local = threading.local()
    first = header.data_offset + known * CHUNK_BYTES
    starts = range(first, size, READ_BYTES)
    backend = FileBackend([path], file_bytes=[size])

    def check(start: int) -> int:
        """Compare the chunks of one read; its bytes."""
        if not hasattr(local, "buffer"):
            local.buffer = memoryview(mmap.mmap(-1, READ_BYTES))
        view = local.buffer[: min(READ_BYTES, size - start)]
        wrong = first_wrong(
            backend, start, view, sums[(start - header.data_offset) // CHUNK_BYTES :]
        )
        if wrong is not None:
            _refuse(manifest, wrong)
        return len(view)

    pool = ThreadPoolExecutor(_THREADS, "edgert-verify")
    try:
        done = 0
        for nbytes in pool.map(check, starts):
            done += nbytes
            if on_progress:
                on_progress(done, size - first)
    finally:
        pool.shutdown(cancel_futures=True)
        backend.close()
    return manifest


def _refuse(manifest: Manifest, start: int) -> None:
    stop = start + CHUNK_BYTES
    places = ((t, extent) for t in manifest.tensors.values() for extent in t.parts or (t.extent,))
    touched = (t.name for t, extent in places if _touches(t, extent, start, stop))
    names = list(dict.fromkeys(touched))
    what = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    raise FormatError(
        manifest.files[0],
        f"the bytes do not match their checksum in {what or 'padding'}; copy or pack it again",
        start,
    )


def _touches(tensor: TensorEntry, extent: Extent, start: int, stop: int) -> bool:
    count = tensor.shape[0] if tensor.stride else 1
    at, nbytes, stride = extent.offset, extent.nbytes, tensor.stride
    return any(
        at + i * stride < stop and start < at + i * stride + nbytes for i in range(count)
    )  # a few hundred experts at most, and only when something is wrong
