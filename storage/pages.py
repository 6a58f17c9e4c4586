"""Which pages are in memory: of an address range, and of files in the page cache; bringing some in.

Owns: the system calls for that. Must not know what the pages are for.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import numpy as np
import numpy.typing as npt

from edgert.units import MIB, align_down, align_up

__all__ = [
    "TouchAhead", "being_touched", "cached_bytes", "cached_bytes_ref", "resident_in", "touch",
]  # fmt: skip

_PAGE = mmap.PAGESIZE
_PIECE = 64 * MIB  # asked about at once: 16 KiB of answers
_CACHESTAT = 451  # its number on every architecture; Linux 6.5 and later
_POPULATE_WRITE = 23  # Linux 5.14 and later
_TOUCHED = 8 * MIB  # at once: 1 ms, 25 where the host has to find the memory first
_LEAD = 256 * MIB  # ahead of what is filled: no more, as it may never be
_C = None if sys.platform == "win32" else ctypes.CDLL(None, use_errno=True)


def resident_in(address: int, nbytes: int) -> int | None:
    """How many of `nbytes` bytes of mapped memory at `address` lie in pages that are in memory.

    4 ms a GiB that is. None where the system does not tell.
    """
    if _C is None or not hasattr(_C, "mincore"):
        return None
    found, end = 0, address + nbytes
    answer = np.empty(_PIECE // _PAGE + 1, np.uint8)
    for start in range(align_down(address, _PAGE), end, _PIECE):
        stop = min(start + _PIECE, align_up(end, _PAGE))
        span = ctypes.c_void_p(start), ctypes.c_size_t(stop - start)
        if _C.mincore(*span, ctypes.c_void_p(answer.ctypes.data)):
            return None
        pages = answer[: (stop - start) // _PAGE] & 1
        found += _PAGE * int(pages.sum())
        # The first and the last page may belong to neighbours in part.
        found -= int(pages[0]) * max(0, address - start)
        found -= int(pages[-1]) * max(0, stop - end)
    return found


def cached_bytes(paths: Sequence[Path]) -> int:
    """Bytes of these files in the page cache, whoever read them; 0 where the system does not tell.

    Linux only, and only for files this user owns or may write: the kernel hides others. 5 us a
    file that is not cached; before Linux 6.5 10 ms a GB.
    """
    return sum(_cached(path) for path in paths)


def _cached(path: Path) -> int:
    if _C is None or sys.platform != "linux":
        return 0
    span, answer = (ctypes.c_uint64 * 2)(0, 0), (ctypes.c_uint64 * 5)()
    try:
        number = os.open(path, os.O_RDONLY)
    except OSError:
        return 0
    try:
        ask = (ctypes.c_long(_CACHESTAT), ctypes.c_int(number), span, answer, ctypes.c_uint(0))
        return _PAGE * answer[0] if _C.syscall(*ask) == 0 else cached_bytes_ref(path)
    finally:
        os.close(number)


def cached_bytes_ref(path: Path) -> int:
    """As `cached_bytes` for one file, by `mincore` over a mapping of it; 10 ms a GB."""
    status = path.stat()
    if not status.st_size or not (status.st_uid == os.geteuid() or os.access(path, os.W_OK)):
        return 0  # the kernel says "cached" of every page of a file that is somebody else's
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE) as mapping:
        # A private mapping that nobody writes to is of the file's own pages. Writable, so that
        # ctypes gives its address.
        view = (ctypes.c_char * len(mapping)).from_buffer(mapping)
        address = ctypes.addressof(view)
        del view
        return resident_in(address, align_up(status.st_size, _PAGE)) or 0


def touch(region: npt.NDArray[np.uint8], stop: Event) -> bool:
    """Give the pages of `region` memory, piece by piece until `stop`; no byte of them changes.

    Also while others write to them. False where the system cannot, and when it was stopped.
    """
    if _C is None or sys.platform != "linux":
        return False
    begin = align_down(int(region.ctypes.data), _PAGE)
    end = align_up(int(region.ctypes.data) + region.nbytes, _PAGE)
    for at in range(begin, end, _TOUCHED):
        span = ctypes.c_void_p(at), ctypes.c_size_t(min(_TOUCHED, end - at))
        if stop.is_set() or _C.madvise(*span, _POPULATE_WRITE):
            return False
    return True


@contextmanager
def being_touched(region: npt.NDArray[np.uint8]) -> Iterator[None]:
    """Within it a thread touches `region`, ahead of those who fill it and need not wait for pages.

    Who places what a disk delivers, and meets new pages, lets the disk rest meanwhile; who waits
    for the disk could have touched some. Whole models of 4 GB, loaded one after the other: 2.6 s
    instead of 3.6.
    """
    stop = Event()
    thread = Thread(target=touch, args=(region, stop), name="edgert-touch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class TouchAhead:
    """Touches a region from its start on, some way ahead of those who fill it bit by bit.

    Its thread is there from the first `reached` on until all is touched, or `halt`.
    """

    def __init__(self, region: npt.NDArray[np.uint8], lead: int = _LEAD) -> None:
        self._region = region
        self._lead = lead
        self._at = 0  # touched up to here
        self._goal = 0
        self._news = Event()
        self._stop = Event()
        self._thread: Thread | None = None

    def reached(self, nbytes: int) -> None:
        """So many bytes are being filled. One caller at a time, as `halt`."""
        goal = min(nbytes + self._lead, self._region.nbytes)
        if goal <= self._goal:
            return
        self._goal = goal
        self._news.set()
        if self._thread is None:
            self._thread = Thread(target=self._run, name="edgert-touch", daemon=True)
            self._thread.start()

    def halt(self) -> None:
        """End the thread; `reached` begins it again. Idempotent."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._stop.set()
            self._news.set()
            thread.join()
            self._stop.clear()
            self._goal = self._at

    def _run(self) -> None:
        while not self._stop.is_set() and self._at < self._region.nbytes:
            self._news.clear()  # before the goal is looked at: none is missed
            if self._at >= self._goal:
                self._news.wait()
            elif touch(self._region[self._at : self._goal][:_TOUCHED], self._stop):
                self._at = min(self._at + _TOUCHED, self._goal)
            else:
                return  # stopped, or the system cannot
