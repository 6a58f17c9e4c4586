"""Writing a pack: bytes in order into a partial file, which becomes the pack when it is whole.

Data goes past the page cache, 4 MiB at a time, where the system can: no pages are filled to be
thrown away again (0.8 s of system time a GB instead of 1.3).

Owns: checksums as the data passes, the partial file and what it takes to continue it, putting the
finished file in place. Must not know what the bytes are.

The partial file lies beside the output under its name with `.partial`. It has the pack's own byte
map, but begins with another magic and a digest of what is being packed, so that nothing opens it.
Every 64 MiB a thread puts the data on the disk, reads it back past the page cache and compares it,
and only then writes the checksums that say so, while the next 64 MiB are written. A second run
reads the data back too and continues behind the last page that matches: what an interrupted run
leaves is never trusted, only checked.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from edgert.errors import EdgertError, FormatError, InputError
from edgert.storage.arena import Arena
from edgert.storage.backend import FileBackend
from edgert.storage.checksums import Checksums
from edgert.storage.pack import HEADER, PAGE, VERSION, encode_header
from edgert.storage.pack_verify import first_wrong, verify_pack
from edgert.units import MIB, align_up, format_bytes

__all__ = ["PackWriter"]

_PARTIAL = b"EDGERT.P"
_BUFFER_BYTES = 4 * MIB
_SYNC_BYTES = 64 * MIB  # of data between two checkpoints: half of what a crash costs

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
        self._data_offset = data_offset_of(len(index), data_bytes)
        self._file_bytes = self._data_offset + data_bytes
        self._values: npt.NDArray[np.uint32] = np.zeros(data_bytes // PAGE, np.uint32)
        self._sums = Checksums(self._data_offset, PAGE, True, self._values)
        self._arena = Arena(2 * _BUFFER_BYTES)
        self._buffers = [  # the one being filled, the one being written
            self._arena.take(f"write {i}", _BUFFER_BYTES, PAGE) for i in range(2)
        ]
        self._waiting = 0  # bytes in the first of them, the last ones before `position`
        self._writing: Future[None] | None = None
        self._begun = 0  # bytes of data up to the checkpoint that was begun last
        self._settled = 0  # bytes of data that were read back
        self._settling: Future[None] | None = None
        self._writer = ThreadPoolExecutor(1, "edgert-write")
        self._settler = ThreadPoolExecutor(1, "edgert-settle")
        stamp = b"%d" % VERSION + index + stamp
        digest = hashlib.blake2b(stamp, digest_size=HEADER.size - len(_PARTIAL))
        self._head = _PARTIAL + digest.digest()
        self._fd = self._direct = -1
        try:
            self._fd = os.open(self.partial, os.O_RDWR | os.O_CREAT | _CLOEXEC, 0o666)
            self._lock()
            self._resume()
            self._check_room()
            self._direct = _open_direct(self.partial)
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
        with self._explained():
            while len(data):
                n = min(len(data), _BUFFER_BYTES - self._waiting)
                place = self._buffers[0][self._waiting : self._waiting + n]
                place[:] = np.frombuffer(data[:n], np.uint8)
                self.position += n
                self._waiting += n
                data = data[n:]
                if self._waiting == _BUFFER_BYTES:
                    self._flush()

    def finish(self, on_progress: Progress | None = None) -> None:
        """Make the file whole, read back what was not yet, and give it its name.

        Raises `FormatError`, as `append`, when what was read is not what was written; the partial
        file is then gone.
        """
        assert self._data_offset + self.position == self._file_bytes, self.position
        with self._explained():
            self._flush()
            self._checkpoint()
            self._await()
        index = self._index + self._values.tobytes()
        with self._explained():
            gap = bytes(self._data_offset - HEADER.size - len(index))
            _write(self._fd, memoryview(index + gap), HEADER.size)
            os.fsync(self._fd)
            _write(self._fd, memoryview(encode_header(*self._sizes(index))), 0)
            os.fsync(self._fd)
        _drop(self._fd, 0, 0)
        try:
            verify_pack(self.partial, on_progress, known=self._settled)
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
        self._writer.shutdown()
        self._settler.shutdown()
        self._arena.close()
        fds, self._fd, self._direct = (self._fd, self._direct), -1, -1
        for fd in fds:
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
        if os.pread(self._fd, HEADER.size, 0) == self._head:
            found = os.pread(self._fd, self._values.nbytes, HEADER.size + len(self._index))
            found = found[: len(found) // 4 * 4]
            self._values[: len(found) // 4] = np.frombuffer(found, np.uint32)
            for at in range(self._data_offset, self._file_bytes, MIB):
                data = memoryview(os.pread(self._fd, min(MIB, self._file_bytes - at), at))
                _drop(self._fd, at, MIB)
                if len(data) % PAGE or not data:  # cut short: begin again here
                    break
                wrong = self._sums.first_wrong(at, data)
                self.position = (at + len(data) if wrong is None else wrong) - self._data_offset
                if wrong is not None:
                    break
        self._begun = self.position
        if not self.position:
            os.ftruncate(self._fd, 0)
            _write(self._fd, memoryview(self._head), 0)
        os.ftruncate(self._fd, self._file_bytes)

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

    def _flush(self) -> None:
        """Begin to write what is in the buffer, and fill the other one meanwhile."""
        at = self._data_offset + self.position - self._waiting
        self._sums.fill(at, self._buffers[0][: self._waiting].data)
        if self._writing is not None:
            self._writing.result()
        self._buffers.reverse()
        self._writing = self._writer.submit(self._write, self._buffers[1], self._waiting, at)
        self._waiting = 0
        if self.position - self._begun >= _SYNC_BYTES:
            self._checkpoint()

    def _write(self, buffer: npt.NDArray[np.uint8], nbytes: int, at: int) -> None:
        """Write the first bytes of a buffer: whole pages, since all data is."""
        data = buffer[:nbytes].data
        if self._direct < 0 or not _write_direct(self._direct, data, at):
            _write(self._fd, data, at)
            _drop(self._fd, at, nbytes)  # asks for it to be written now

    def _checkpoint(self) -> None:
        """Begin to make all that was written last, once what is before it does."""
        self._await()
        self._begun = self.position
        self._settling = self._settler.submit(self._settle, self.position, self._writing)

    def _await(self) -> None:
        """Wait for the checkpoint under way. Raises what went wrong with it."""
        settling, self._settling = self._settling, None
        if settling is not None:
            try:
                settling.result()
            except FormatError:
                self.partial.unlink()
                raise

    def _settle(self, end: int, writing: Future[None] | None) -> None:
        """Data first, read back, then the sums that vouch for it; no page of it stays in memory."""
        if writing is not None:
            writing.result()
        _datasync(self._fd)
        begin, data = self._settled, self._data_offset
        _drop(self._fd, data + begin, end - begin)
        backend = FileBackend([self.partial], watched=False)
        try:
            wrong = first_wrong(backend, self._sums, data + begin, data + end, None)
        finally:
            backend.close()
        if wrong is not None:
            raise FormatError(
                self.partial, "what was read back is not what was written; the disk or its cable "
                "is failing", wrong
            )  # fmt: skip
        new = self._values[begin // PAGE : end // PAGE].view(np.uint8).data
        _write(self._fd, new, HEADER.size + len(self._index) + 4 * (begin // PAGE))
        self._settled = end

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
    return align_up(HEADER.size + index_bytes + 4 * (data_bytes // PAGE), PAGE)


_CLOEXEC = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


def _write(fd: int, data: memoryview, offset: int) -> None:
    """All of `data` at `offset`."""
    while len(data):
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done


def _open_direct(path: Path) -> int:
    """A descriptor for writing past the page cache; -1 where there is none."""
    with contextlib.suppress(OSError, AttributeError):
        return os.open(path, os.O_WRONLY | os.O_DIRECT | _CLOEXEC)
    return -1


def _write_direct(fd: int, data: memoryview, offset: int) -> bool:
    """All of `data` at `offset`, both whole pages; False where the file system refuses."""
    try:
        return os.pwrite(fd, data, offset) == len(data)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False


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
