"""Writing a pack: bytes in order into a partial file, which becomes the pack when it is whole.

Owns: checksums as the data passes, the partial file and what it takes to continue it, putting the
finished file in place. Must not know what the bytes are.

The partial file lies beside the output under its name with `.partial`. It has the pack's own byte
map, but begins with another magic and a digest of what is being packed, so that nothing opens it.
Every 64 MiB the data is on the disk before the checksums that say so: a second run reads the data
back and continues behind the last chunk that matches. What an interrupted run leaves is therefore
never trusted, only checked.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from edgert.errors import EdgertError, FormatError, InputError
from edgert.storage.pack import CHUNK_BYTES, HEADER, PAGE, encode_header
from edgert.storage.pack_verify import verify_pack
from edgert.units import MIB, align_up, format_bytes

__all__ = ["PackWriter"]

_PARTIAL = b"EDGERT.P"
_SYNC_BYTES = 64 * MIB  # of data between two checkpoints: what is dirty, and what a crash costs

Progress = Callable[[int, int], object]


class PackWriter:
    """One pack being written; `with` it, `append` from `position` on, then `finish`.

    `index` is the index without checksums (`encode_index`), whose offsets begin at `data_offset_of`
    its length. `data_bytes`: of all data, a multiple of 4096. `stamp` names the source: a partial
    file of another one is begun again. Leaving without `finish` leaves the partial file.
    Raises `InputError` when the output cannot be made, `EdgertError` when the disk is full.
    """

    def __init__(self, out: Path, index: bytes, data_bytes: int, stamp: bytes) -> None:
        assert data_bytes % PAGE == 0, data_bytes
        self.out = out
        self.partial = out.with_name(out.name + ".partial")
        self.position = 0  # bytes of data in place
        self._index = index
        self._n_chunks = -(-data_bytes // CHUNK_BYTES)
        self._data_offset = data_offset_of(len(index), data_bytes)
        self._file_bytes = self._data_offset + data_bytes
        self._sums = bytearray()
        self._crc = 0  # of the chunk under way
        self._synced = 0
        digest = hashlib.blake2b(index + stamp, digest_size=HEADER.size - len(_PARTIAL))
        self._head = _PARTIAL + digest.digest()
        self._fd = -1
        try:
            self._fd = os.open(self.partial, os.O_RDWR | os.O_CREAT | _CLOEXEC, 0o666)
            self._lock()
            self._resume()
            self._check_room()
        except OSError as error:
            self.close()
            raise InputError(f"{self.partial} cannot be written: {error.strerror}") from None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> PackWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def append(self, data: memoryview) -> None:
        """The next bytes of the data."""
        assert self._data_offset + self.position + len(data) <= self._file_bytes
        at = self._data_offset + self.position
        self._sum(data)
        with self._explained():
            _write(self._fd, data, at)
            # Asks for the pages to be written now, so that a checkpoint has little to wait for.
            _drop(self._fd, at, len(data))
            if self.position - self._synced >= _SYNC_BYTES:
                self._checkpoint()

    def finish(self, on_progress: Progress | None = None) -> None:
        """Make the file whole, read it back, and give it its name. Raises `FormatError` when what
        was read is not what was written; the partial file is then gone.
        """
        assert self._data_offset + self.position == self._file_bytes, self.position
        if self.position % CHUNK_BYTES:
            self._sums += self._crc.to_bytes(4, "little")
        index = self._index + bytes(self._sums)
        with self._explained():
            gap = bytes(self._data_offset - HEADER.size - len(index))
            _write(self._fd, memoryview(index + gap), HEADER.size)
            os.ftruncate(self._fd, self._file_bytes)
            os.fsync(self._fd)
            _write(self._fd, memoryview(encode_header(*self._sizes(index))), 0)
            os.fsync(self._fd)
        _drop(self._fd, 0, 0)
        try:
            verify_pack(self.partial, on_progress)
        except FormatError:
            self.partial.unlink()
            raise
        except BaseException:  # Ctrl-C, a read that failed: what is there can still be continued
            _write(self._fd, memoryview(self._head), 0)
            raise
        with self._explained():
            os.replace(self.partial, self.out)
            _sync_folder(self.out.parent)

    def close(self) -> None:
        """Let go of the file. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _sizes(self, index: bytes) -> tuple[int, bytes, int]:
        return self._file_bytes, index, self._data_offset

    def _lock(self) -> None:
        """Keep a second writer out, where the system can."""
        with contextlib.suppress(ImportError):
            import fcntl

            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{self.partial} is being written by another edgert") from None

    def _resume(self) -> None:
        """Continue behind the chunks that are there and match their sums, or begin."""
        table = HEADER.size + len(self._index)
        if os.pread(self._fd, HEADER.size, 0) == self._head:
            sums = os.pread(self._fd, 4 * self._n_chunks, table)
            for i in range(len(sums) // 4):
                at = self._data_offset + i * CHUNK_BYTES
                chunk = os.pread(self._fd, CHUNK_BYTES, at)
                _drop(self._fd, at, CHUNK_BYTES)
                wanted = sums[4 * i : 4 * i + 4]
                full = len(chunk) == CHUNK_BYTES
                if not full or zlib.crc32(chunk).to_bytes(4, "little") != wanted:
                    break
                self._sums += wanted
                self.position += CHUNK_BYTES
        self._synced = self.position
        if not self.position:
            os.ftruncate(self._fd, 0)
            _write(self._fd, memoryview(self._head), 0)

    def _check_room(self) -> None:
        left = self._file_bytes - self.position
        free = shutil.disk_usage(self.partial.parent).free
        if left > free:
            self.close()
            if not self.position:
                self.partial.unlink()
            raise EdgertError(
                f"{self.out} needs {format_bytes(left)} more, but its disk has "
                f"{format_bytes(free)} free; make room or choose another folder with -o"
            )

    def _sum(self, data: memoryview) -> None:
        while len(data):
            n = min(len(data), CHUNK_BYTES - self.position % CHUNK_BYTES)
            self._crc = zlib.crc32(data[:n], self._crc)
            self.position += n
            data = data[n:]
            if self.position % CHUNK_BYTES == 0:
                self._sums += self._crc.to_bytes(4, "little")
                self._crc = 0

    def _checkpoint(self) -> None:
        """Data first, then the sums that vouch for it; and no page of it stays in memory."""
        _datasync(self._fd)
        _drop(self._fd, self._data_offset + self._synced, self.position - self._synced)
        _write(self._fd, memoryview(bytes(self._sums)), HEADER.size + len(self._index))
        self._synced = self.position

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """What goes wrong while writing, as a message that says what is left."""
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            what = "the disk is full" if full else error.strerror
            raise EdgertError(
                f"{self.partial} cannot be written at byte "
                f"{self._data_offset + self.position:,}: {what}; what is there is kept, and the "
                "same command continues it"
            ) from error


def data_offset_of(index_bytes: int, data_bytes: int) -> int:
    """Where the data begins behind an index of `index_bytes` without its checksums."""
    return align_up(HEADER.size + index_bytes + 4 * -(-data_bytes // CHUNK_BYTES), PAGE)


_CLOEXEC = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


def _write(fd: int, data: memoryview, offset: int) -> None:
    """All of `data` at `offset`."""
    while len(data):
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done


def _datasync(fd: int) -> None:
    getattr(os, "fdatasync", os.fsync)(fd)


def _drop(fd: int, offset: int, nbytes: int) -> None:
    """Give back the pages of a range that is on the disk."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)


def _sync_folder(folder: Path) -> None:
    """Make a new name in `folder` last, where folders can be synced."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
