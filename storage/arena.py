"""The one allocation: everything of a size that matters is a region of it.

Owns: an anonymous mapping handed out piece by piece. Three states: open (regions are taken),
sealed (none can be added any more), closed (the memory is given back). Must not know what a
region is for. One mapping instead of many arrays makes the plan's sum a fact: what was not
planned cannot be taken.

An elastic region has more addresses than bytes in use: pages exist in a prefix of it, which
`resize` moves the end of, also when sealed. Addresses never change, and addresses alone cost
nothing. Huge pages are asked for in the prefix only: elsewhere one touched byte would bring 2 MiB.
"""

from __future__ import annotations

import mmap
import sys
import threading
import weakref
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.errors import EdgertError
from edgert.storage.pages import resident_in
from edgert.units import align_down, align_up, format_bytes

__all__ = ["Arena", "ArenaRegion", "absent_bytes", "promised_bytes"]


_open: weakref.WeakSet[Arena] = weakref.WeakSet()  # of this process
_open_lock = threading.Lock()

# Addresses are no promise of memory; without it the system counts them all. Not in Python's mmap.
_MAP_NORESERVE = 0x4000  # on x86 and ARM


@dataclass(frozen=True, slots=True)
class ArenaRegion:
    """A named part of the arena."""

    name: str
    offset: int  # bytes from the start of the arena
    nbytes: int  # in use
    room: int  # bytes of addresses; `nbytes` unless elastic


class Arena:
    """Zeroed, page-aligned memory, taken region by region: at most `nbytes` in use at any moment.

    `spare`: bytes of addresses beyond that, for elastic regions. Not for several threads: one owner
    takes, seals, resizes and closes. Raises `EdgertError` when the system does not grant the
    memory.
    """

    def __init__(self, nbytes: int, spare: int = 0) -> None:
        assert nbytes > 0 and spare >= 0, (nbytes, spare)
        self.nbytes = nbytes
        self._state = "open"
        self._regions: dict[str, ArenaRegion] = {}
        self._used = 0
        self._end = 0  # of the addresses taken
        try:
            self._map = _anonymous(nbytes + spare)
        except (OSError, OverflowError, ValueError, MemoryError) as error:
            raise EdgertError(
                f"the system does not grant {format_bytes(nbytes)} of memory: {error}; "
                "lower --memory-budget"
            ) from error
        self._bytes: npt.NDArray[np.uint8] | None = np.frombuffer(self._map, np.uint8)
        with _open_lock:
            _open.add(self)

    @property
    def state(self) -> str:
        """'open', 'sealed' or 'closed'."""
        return self._state

    @property
    def regions(self) -> tuple[ArenaRegion, ...]:
        """What was taken, in order."""
        return tuple(self._regions.values())

    @property
    def used_bytes(self) -> int:
        """Bytes in use, with the gaps of alignment; never above `nbytes`."""
        return self._used

    @property
    def address(self) -> int:
        """Address of the first byte; a multiple of the page size."""
        assert self._bytes is not None, "the arena is closed"
        return int(self._bytes.ctypes.data)

    def take(
        self, name: str, nbytes: int, alignment: int = 64, *, room: int | None = None
    ) -> npt.NDArray[np.uint8]:
        """The next `nbytes` bytes as a writable uint8 array, aligned to a power of two <= 4096.

        With `room` the region is elastic: the array has `room` bytes, of which the first `nbytes`
        may be used until `resize`. Asserts that the arena is open, the name new, and that the bytes
        were planned.
        """
        assert self._state == "open" and self._bytes is not None, f"the arena is {self._state}"
        assert 0 < alignment <= mmap.PAGESIZE and alignment & (alignment - 1) == 0, alignment
        assert name not in self._regions, f"region {name!r} is taken already"
        elastic = room is not None
        room = nbytes if room is None else room
        assert 0 <= nbytes <= room, (nbytes, room)
        offset = align_up(self._end, mmap.PAGESIZE if elastic else alignment)
        used = self._used + offset - self._end + nbytes
        end = align_up(offset + room, mmap.PAGESIZE) if elastic else offset + room
        assert used <= self.nbytes and end <= len(self._bytes), (
            f"region {name!r} of {nbytes} bytes at {offset} is beyond the {self.nbytes} planned"
        )
        self._regions[name] = ArenaRegion(name, offset, nbytes, room)
        self._used, self._end = used, end
        page = align_down(offset, mmap.PAGESIZE)
        huge = align_up(offset + nbytes, mmap.PAGESIZE) - page if nbytes else 0
        _advise(self._map, "MADV_HUGEPAGE", page, huge)
        return self._bytes[offset : offset + room]

    def resize(self, name: str, nbytes: int) -> None:
        """Use the first `nbytes` bytes of an elastic region from now on.

        What is given up goes back to the system at once, but for the page the end lies in; what
        comes back later reads as zeros. Asserts that the bytes were planned.
        """
        assert self._state != "closed", "the arena is closed"
        region = self._regions[name]
        used = self._used + nbytes - region.nbytes
        assert 0 <= nbytes <= region.room and used <= self.nbytes, (name, nbytes, used, self.nbytes)
        old, new = (align_up(region.offset + n, mmap.PAGESIZE) for n in (region.nbytes, nbytes))
        if new < old:
            # First no huge pages, then no pages: no kernel thread may fill the hole in between.
            _advise(self._map, "MADV_NOHUGEPAGE", new, old - new)
            _advise(self._map, _RELEASE, new, old - new)
        else:
            _advise(self._map, "MADV_HUGEPAGE", old, new - old)
        self._regions[name] = replace(region, nbytes=nbytes)
        self._used = used

    def present_bytes(self) -> int:
        """Bytes whose pages exist; what was never touched has none. All, where nobody can tell."""
        if sys.platform != "linux" or self._bytes is None:
            return self._used
        found = resident_in(self.address, align_up(len(self._bytes), mmap.PAGESIZE))
        return self._used if found is None else found

    def seal(self) -> None:
        """End taking. Idempotent until closed."""
        assert self._state != "closed", "the arena is closed"
        self._state = "sealed"

    def close(self) -> None:
        """Give the memory back to the system. Idempotent.

        The pages go at once; arrays that still exist keep only the addresses, and read zeros.
        """
        if self._state == "closed":
            return
        self._state = "closed"
        with _open_lock:
            _open.discard(self)
        self._bytes = None
        _advise(self._map, _RELEASE, 0, len(self._map))
        try:
            self._map.close()
        except BufferError:  # views are alive; the mapping ends with the last of them
            pass


def promised_bytes() -> int:
    """What all arenas of this process together may have in use now."""
    with _open_lock:
        return sum(arena.nbytes for arena in _open)


def absent_bytes() -> int:
    """Of that, what no page exists for yet: the process will grow by it without asking again."""
    with _open_lock:
        return sum(max(arena.nbytes - arena.present_bytes(), 0) for arena in _open)


# What takes pages away at once: macOS only marks them with DONTNEED.
_RELEASE = "MADV_FREE_REUSABLE" if sys.platform == "darwin" else "MADV_DONTNEED"


def _anonymous(nbytes: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(-1, nbytes)
    # Private: Python's default of a shared mapping is kept as a file in memory by the kernel,
    # cannot have huge pages by default, and is counted as shared.
    flags: Any = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    if sys.platform == "linux":
        flags |= _MAP_NORESERVE
    mapping = mmap.mmap(-1, nbytes, flags=flags)
    _advise(mapping, "MADV_NOHUGEPAGE", 0, nbytes)
    return mapping


def _advise(mapping: mmap.mmap, advice: str, start: int, nbytes: int) -> None:
    """Tell the kernel about whole pages; a system that does not know the advice goes without.

    Huge pages: reading 512 MiB from one core of a Zen 3 gave 13.6 GB/s from huge pages, 10.6 from
    small ones, random words 56 M/s against 37.
    """
    if nbytes and hasattr(mmap, advice):
        try:
            mapping.madvise(getattr(mmap, advice), start, nbytes)
        except OSError:  # a kernel without them
            pass
