"""Where bytes come from: one protocol, files read past the page cache, and memory.

Owns: platform calls (O_DIRECT, F_NOCACHE, posix_fadvise), alignment of direct reads, and turning
every way a read can fail into a `StorageError`. Must not know what the bytes mean.

Direct reads because the page cache is charged to the process: read through it, a model larger
than the budget evicts itself on every pass and everything else with it.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from edgert.errors import ModelError, StorageError
from edgert.storage.manifest import Extent
from edgert.units import align_down, align_up

__all__ = ["ALIGNMENT", "Backend", "FileBackend", "MemoryBackend", "aligned_range"]

# Granularity of direct reads: offset, length and buffer address. Devices ask for their logical
# block, 512 or 4096; 4096 serves both and is the page size where it matters.
ALIGNMENT = 4096

# What kernels answer when a file system takes no direct reads (tmpfs, overlays, FUSE).
_NO_DIRECT = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class Backend(Protocol):
    """A set of files of known size, read by position. Safe to read from several threads."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """Names of the files, for messages."""

    @property
    def alignment(self) -> int:
        """Bytes that offset, length and buffer address of a read must be multiples of."""

    def size(self, file_index: int) -> int:
        """Bytes of a file."""

    def read_into(self, file_index: int, offset: int, view: memoryview) -> None:
        """Fill `view` (bytes, writable, contiguous) from `offset`.

        A read may reach past the end of the file by less than `alignment`; what the bytes of
        `view` are there is undefined. Raises `StorageError` naming file and offset otherwise.
        """

    def close(self) -> None:
        """Let go of the files. Idempotent; no read may be under way."""


def aligned_range(extent: Extent, alignment: int) -> tuple[int, int, int]:
    """The smallest aligned read that holds `extent`: (offset, nbytes, bytes to skip in it)."""
    offset = align_down(extent.offset, alignment)
    nbytes = align_up(extent.offset + extent.nbytes, alignment) - offset
    return offset, nbytes, extent.offset - offset


class FileBackend:
    """Files of a local file system, read past the page cache where the system can.

    Each file falls back on its own: O_DIRECT (Linux) or F_NOCACHE (macOS), else ordinary reads
    whose pages are dropped right after. `direct` tells whether all files take direct reads.
    A file that is written to while open is noticed at the next read (size and time of the last
    write); one that is replaced by renaming another stays what it was.
    Raises `ModelError` when a file cannot be opened, or is not as long as `file_bytes` (from the
    manifest) says: it changed since its header was read.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        file_bytes: Sequence[int] | None = None,
        direct: bool = True,
        watched: bool = True,
    ) -> None:
        """`watched=False`: of a file that the caller himself writes to, elsewhere, meanwhile."""
        self._paths = tuple(Path(p) for p in paths)
        self._files: list[_File] = []
        try:
            for i, path in enumerate(self._paths):
                self._files.append(_File(path, direct, watched))
                size = self._files[i].size
                if file_bytes is not None and size != file_bytes[i]:
                    raise ModelError(
                        f"{path} is {size:,} bytes long, but was {file_bytes[i]:,} when its "
                        "header was read; it is being written, so wait and open it again"
                    )
        except BaseException:
            self.close()
            raise

    @property
    def paths(self) -> tuple[Path, ...]:
        """Names of the files."""
        return self._paths

    @property
    def alignment(self) -> int:
        """4096, also for buffered files, so that a plan does not depend on the file system."""
        return ALIGNMENT

    @property
    def direct(self) -> bool:
        """True when every file is read past the page cache."""
        return all(f.direct for f in self._files)

    def size(self, file_index: int) -> int:
        """Bytes of a file when it was opened."""
        return self._files[file_index].size

    def read_into(self, file_index: int, offset: int, view: memoryview) -> None:
        """As `Backend.read_into`. The address of `view` must be aligned as well."""
        assert self._files, "the backend is closed"
        self._files[file_index].read_into(offset, view)

    def close(self) -> None:
        """Close the files. Idempotent."""
        files, self._files = self._files, []
        for file in files:
            file.close()


class MemoryBackend:
    """Files that are bytes in memory: for tests and for models made on the fly."""

    def __init__(self, blobs: Sequence[bytes | bytearray | memoryview], alignment: int = 1) -> None:
        self._blobs = [memoryview(b).cast("B") for b in blobs]
        self._alignment = alignment

    @property
    def paths(self) -> tuple[Path, ...]:
        """Made-up names, for messages."""
        return tuple(Path(f"<memory {i}>") for i in range(len(self._blobs)))

    @property
    def alignment(self) -> int:
        """Granularity of reads; 1 unless a test wants a file's rules."""
        return self._alignment

    def size(self, file_index: int) -> int:
        """Bytes of a blob."""
        return len(self._blobs[file_index])

    def read_into(self, file_index: int, offset: int, view: memoryview) -> None:
        """As `Backend.read_into`."""
        nbytes = _expected(self.size(file_index), self._alignment, offset, len(view))
        view[:nbytes] = self._blobs[file_index][offset : offset + nbytes]

    def close(self) -> None:
        """Let go of the blobs. Idempotent."""
        self._blobs = []


def _expected(size: int, alignment: int, offset: int, nbytes: int) -> int:
    """Bytes a read delivers: all, or up to the end of the file in its last aligned block."""
    assert offset % alignment == 0 and nbytes % alignment == 0, (offset, nbytes, alignment)
    end = offset + nbytes
    assert 0 <= offset and end <= align_up(size, alignment), (offset, nbytes, size)
    return max(0, min(end, size) - offset)


class _File:
    """One open file and the way it is read."""

    def __init__(self, path: Path, direct: bool, watched: bool) -> None:
        self.path = path
        self._watched = watched
        self.direct = False
        self._fd = -1
        self._position_lock = threading.Lock()  # only for systems without positioned reads
        flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        try:
            if direct and hasattr(os, "O_DIRECT"):
                self._open_direct(flags)
            if self._fd < 0:
                self._fd = os.open(path, flags)
            if direct and sys.platform == "darwin":
                self._uncached_darwin()
            if not self.direct and hasattr(os, "posix_fadvise"):
                # Without this the kernel reads ahead of each request (8 MiB on one machine), and
                # pages nobody asked for stay until their turn comes.
                os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)
            status = os.fstat(self._fd)
            self.size, self._written_ns = status.st_size, status.st_mtime_ns
        except OSError as error:
            self.close()
            raise ModelError(f"{path} cannot be opened: {error.strerror}") from error

    def _open_direct(self, flags: int) -> None:
        """Open with O_DIRECT and try a block: some file systems refuse at open, some at reading."""
        try:
            fd = os.open(self.path, flags | os.O_DIRECT)
        except OSError as error:
            if error.errno in _NO_DIRECT:
                return
            raise
        with mmap.mmap(-1, ALIGNMENT) as block:
            try:
                os.preadv(fd, [block], 0)
            except OSError as error:
                os.close(fd)
                if error.errno in _NO_DIRECT:
                    return
                raise
        self._fd, self.direct = fd, True

    def _uncached_darwin(self) -> None:
        import fcntl

        try:
            fcntl.fcntl(self._fd, getattr(fcntl, "F_NOCACHE", 48), 1)
            self.direct = True
        except OSError:  # e.g. a network volume: read through the cache
            self.direct = False

    def read_into(self, offset: int, view: memoryview) -> None:
        wanted = _expected(self.size, ALIGNMENT, offset, len(view))
        done = 0
        while done < wanted:
            try:
                got = self._read(offset + done, view[done:])
            except OSError as error:
                why = error.strerror or str(error)
                raise StorageError(self.path, offset, len(view), why) from error
            done += got
            if done < wanted:
                if self.direct:  # direct reads go on at a block, so read a torn one again
                    got -= done % ALIGNMENT
                    done = align_down(done, ALIGNMENT)
                if got <= 0:
                    raise StorageError(self.path, offset, len(view), self._shorter(offset + done))
        # Behind the read: bytes that came before a write are good. 1 us beside a read of 1 ms.
        status = os.fstat(self._fd)
        seen = status.st_size, status.st_mtime_ns
        if self._watched and seen != (self.size, self._written_ns):
            raise StorageError(self.path, offset, len(view), self._changed(status.st_size))
        if not self.direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, offset, len(view), os.POSIX_FADV_DONTNEED)

    def _read(self, offset: int, view: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._fd, [view], offset)
        with self._position_lock:  # Windows: one file position for all threads
            os.lseek(self._fd, offset, os.SEEK_SET)
            piece = os.read(self._fd, len(view))
        view[: len(piece)] = piece
        return len(piece)

    def _shorter(self, end: int) -> str:
        return (
            f"the file ended near byte {end:,}, but was {self.size:,} bytes long when it was "
            "opened; it was cut or replaced while in use, so close the model and open it again"
        )

    def _changed(self, size: int) -> str:
        length = "" if size == self.size else f" and is {size:,} bytes long, not {self.size:,}"
        return (
            f"the file was written to while in use{length}, so what it holds now may not be what "
            "was read before; close the model and open it again"
        )

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
