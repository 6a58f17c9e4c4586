"""Reading a whole pack back and comparing it with its checksums.

Owns: `verify_pack`, and what compares a run of bytes. Must not know what the bytes mean.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from edgert.errors import FormatError
from edgert.storage.arena import Arena
from edgert.storage.backend import FileBackend
from edgert.storage.checksums import Checksums, damaged, read_checksums
from edgert.storage.manifest import Manifest
from edgert.storage.model_file import open_model_file
from edgert.storage.pack import HEADER, PAGE, read_header, read_pack
from edgert.units import MIB

__all__ = ["first_wrong", "verify_pack"]

_READ_BYTES = 4 * MIB  # at a time
_THREADS = 2  # one reads while the other sums: zlib.crc32 does 3.9 GiB/s on one core

Progress = Callable[[int, int], object]  # bytes done, bytes to do


def first_wrong(
    backend: FileBackend, sums: Checksums, start: int, stop: int, on_progress: Progress | None
) -> int | None:
    """Read bytes `start` to `stop` of the file; where the first step begins that is wrong.

    Both are multiples of a page from the start of the data. Raises `StorageError`. Holds 8 MiB.
    """
    local = threading.local()
    arena = Arena(_THREADS * _READ_BYTES)
    buffers = [arena.take(f"read {i}", _READ_BYTES, PAGE) for i in range(_THREADS)]

    def check(at: int) -> int | None:
        """Where the first wrong bytes of one read are."""
        if not hasattr(local, "buffer"):
            local.buffer = buffers.pop()
        view = local.buffer[: min(_READ_BYTES, stop - at)].data
        backend.read_into(0, at, view)
        return sums.first_wrong(at, view)

    pool = ThreadPoolExecutor(_THREADS, "edgert-verify")
    try:
        for done, wrong in enumerate(pool.map(check, range(start, stop, _READ_BYTES)), 1):
            if wrong is not None:
                return wrong
            if on_progress:
                on_progress(min(done * _READ_BYTES, stop - start), stop - start)
    finally:
        pool.shutdown(cancel_futures=True)
        arena.close()
    return None


def verify_pack(
    path: str | Path, on_progress: Progress | None = None, *, known: int = 0
) -> Manifest:
    """Read all of the pack at `path` and compare it with its checksums; its manifest.

    `known`: bytes of data from the first on that were read back already by the one who wrote them;
    whole pages.

    Every bit of the file counts: a flipped one anywhere is a `FormatError` that names its page (in
    version 1, the MiB it is in) and what of the tensors lies there. Raises as `read_pack`, and
    `StorageError` when a read fails. Holds 8 MiB, and for checksums 1/1000 of the file.
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
    backend = FileBackend([path], file_bytes=[size])
    try:
        wrong = first_wrong(backend, sums, header.data_offset + known, size, on_progress)
    finally:
        backend.close()
    if wrong is not None:
        raise damaged(manifest, wrong, wrong + sums.step)
    return manifest
