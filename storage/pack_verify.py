"""Reading a whole pack back and comparing it with its checksums.

Owns: `verify_pack`, and what compares a run of bytes. Must not know what the bytes mean.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from edgert.errors import FormatError
from edgert.storage.backend import FileBackend
from edgert.storage.checksums import Checksums, damaged, read_checksums
from edgert.storage.manifest import Manifest
from edgert.storage.model_file import open_model_file
from edgert.storage.pack import HEADER, read_header, read_pack
from edgert.units import MIB

__all__ = ["READ_BYTES", "first_wrong", "verify_pack"]

READ_BYTES = 4 * MIB  # at a time
_THREADS = 2  # one reads while the other sums: zlib.crc32 does 3.9 GiB/s on one core

Progress = Callable[[int, int], object]  # bytes done, bytes to do


def first_wrong(backend: FileBackend, at: int, view: memoryview, sums: Checksums) -> int | None:
    """Read the bytes from `at` on into `view`; where the first wrong ones begin.

    Raises `StorageError`.
    """
    backend.read_into(0, at, view)
    return sums.first_wrong(at, view)


def verify_pack(
    path: str | Path, on_progress: Progress | None = None, *, known: int = 0
) -> Manifest:
    """Read all of the pack at `path` and compare it with its checksums; its manifest.

    `known`: bytes of data from the first on that were read back already by the one who wrote them;
    whole pages.

    Every bit of the file counts: a flipped one anywhere is a `FormatError` that names its page (in
    version 1, the MiB it is in) and what of the tensors lies there. Raises as `read_pack`, and
    `StorageError` when a read fails. Holds 8 MiB, and 1/1000 of the file for its checksums.
    """
    path = Path(path)
    manifest = read_pack(path)
    with open_model_file(path) as (file, size):
        header = read_header(file.read(HEADER.size), path, size)
        end = HEADER.size + header.index_bytes
        file.seek(end)
        if any(file.read(header.data_offset - end)):
            raise FormatError(path, "the bytes between index and data are not zero", end)
    sums = read_checksums(path)
    local = threading.local()
    first = header.data_offset + known
    starts = range(first, size, READ_BYTES)
    backend = FileBackend([path], file_bytes=[size])

    def check(start: int) -> int:
        """Compare one read; its bytes."""
        if not hasattr(local, "buffer"):
            local.buffer = memoryview(mmap.mmap(-1, READ_BYTES))
        view = local.buffer[: min(READ_BYTES, size - start)]
        wrong = first_wrong(backend, start, view, sums)
        if wrong is not None:
            raise damaged(manifest, wrong, wrong + sums.step)
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
