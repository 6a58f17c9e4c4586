"""The window: a region cut into slots of one size, each holding one extent at a time.

Owns: the addresses of the slots. Must not know what is in them nor when they change hands; the
streamers decide that.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgert.storage.backend import ALIGNMENT

__all__ = ["Window"]


class Window:
    """`n_slots` slots of `slot_bytes` bytes over a uint8 region, at addresses that are aligned.

    The slot size must be a multiple of `alignment`, the region must start at one; what is left
    of the region behind the last slot is not used.
    """

    def __init__(
        self, region: npt.NDArray[np.uint8], slot_bytes: int, alignment: int = ALIGNMENT
    ) -> None:
        assert region.dtype == np.uint8 and region.ndim == 1 and region.flags.c_contiguous
        assert slot_bytes > 0 and slot_bytes % alignment == 0, (slot_bytes, alignment)
        assert region.ctypes.data % alignment == 0, "the region is not aligned"
        assert region.nbytes >= slot_bytes, (region.nbytes, slot_bytes)
        self.slot_bytes = slot_bytes
        self.n_slots = region.nbytes // slot_bytes
        self._bytes = region
        self._address = int(region.ctypes.data)

    def address(self, slot: int) -> int:
        """Address of the first byte of `slot`."""
        assert 0 <= slot < self.n_slots, slot
        return self._address + slot * self.slot_bytes

    def view(self, slot: int) -> npt.NDArray[np.uint8]:
        """The bytes of `slot`, writable."""
        assert 0 <= slot < self.n_slots, slot
        first = slot * self.slot_bytes
        return self._bytes[first : first + self.slot_bytes]
