"""The one allocation: everything of a size that matters is a region of it.

Owns: an anonymous mapping handed out piece by piece. Three states: open (regions are taken),
sealed (none can be added any more), closed (the memory is given back). Must not know what a
region is for. One mapping instead of many arrays makes the plan's sum a fact: what was not
planned cannot be taken.
"""

from __future__ import annotations

import mmap
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.errors import EdgertError
from edgert.units import align_up, format_bytes

__all__ = ["Arena", "ArenaRegion"]


@dataclass(frozen=True, slots=True)
class ArenaRegion:
    """A named part of the arena."""

    name: str
    offset: int  # bytes from the start of the arena
    nbytes: int


class Arena:
    """`nbytes` of zeroed, page-aligned memory, taken region by region.

    Not for several threads: one owner takes, seals and closes. Raises `EdgertError` when the
    system does not grant the memory.
    """

    def __init__(self, nbytes: int) -> None:
        assert nbytes > 0, nbytes
        self.nbytes = nbytes
        self._state = "open"
        self._regions: list[ArenaRegion] = []
        self._used = 0
        try:
            self._map = _anonymous(nbytes)
        except (OSError, OverflowError, ValueError, MemoryError) as error:
            raise EdgertError(
                f"the system does not grant {format_bytes(nbytes)} of memory: {error}; "
                "lower --memory-budget"
            ) from error
        self._bytes: npt.NDArray[np.uint8] | None = np.frombuffer(self._map, np.uint8)

    @property
    def state(self) -> str:
        """'open', 'sealed' or 'closed'."""
        return self._state

    @property
    def regions(self) -> tuple[ArenaRegion, ...]:
        """What was taken, in order."""
        return tuple(self._regions)

    @property
    def used_bytes(self) -> int:
        """Bytes taken, with the gaps of alignment."""
        return self._used

    @property
    def address(self) -> int:
        """Address of the first byte; a multiple of the page size."""
        assert self._bytes is not None, "the arena is closed"
        return int(self._bytes.ctypes.data)

    def take(self, name: str, nbytes: int, alignment: int = 64) -> npt.NDArray[np.uint8]:
        """The next `nbytes` bytes as a writable uint8 array, aligned to a power of two <= 4096.

        Asserts that the arena is open, the name new, and that the bytes were planned.
        """
        assert self._state == "open" and self._bytes is not None, f"the arena is {self._state}"
        assert 0 < alignment <= mmap.PAGESIZE and alignment & (alignment - 1) == 0, alignment
        assert all(r.name != name for r in self._regions), f"region {name!r} is taken already"
        offset = align_up(self._used, alignment)
        assert nbytes >= 0 and offset + nbytes <= self.nbytes, (
            f"region {name!r} of {nbytes} bytes at {offset} is beyond the {self.nbytes} planned"
        )
        self._regions.append(ArenaRegion(name, offset, nbytes))
        self._used = offset + nbytes
        return self._bytes[offset : offset + nbytes]

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
        self._bytes = None
        if hasattr(self._map, "madvise") and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
        try:
            self._map.close()
        except BufferError:  # views are alive; the mapping ends with the last of them
            pass


def _anonymous(nbytes: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(-1, nbytes)
    # Private: Python's default of a shared mapping is kept as a file in memory by the kernel,
    # cannot have huge pages by default, and is counted as shared.
    flags: Any = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    mapping = mmap.mmap(-1, nbytes, flags=flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Reading 512 MiB from one core of a Zen 3: 13.6 GB/s from huge pages, 10.6 from small
        # ones, random words 56 M/s against 37. At most the arena itself can become resident.
        try:
            mapping.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a kernel without them
            pass
    return mapping
