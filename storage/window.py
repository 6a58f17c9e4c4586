"""The window: a region cut into slots, each holding one extent at a time.

Owns: the addresses of the slots. Must not know what is in them nor when they change hands; the
streamers decide that.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgert.storage.backend import ALIGNMENT

__all__ = ["Window"]


class Window:
    """Slots over a uint8 region, one after another at addresses that are aligned.

    `slot_bytes`: the size of all, as many as there is room for, or of each one (n_slots,). Sizes
    must be multiples of `alignment`, the region must start at one; what is left of the region
    behind the last slot is not used.
    """

    def __init__(
        self,
        region: npt.NDArray[np.uint8],
        slot_bytes: int | npt.NDArray[np.int64],
        alignment: int = ALIGNMENT,
    ) -> None:
        assert region.dtype == np.uint8 and region.ndim == 1 and region.flags.c_contiguous
        assert region.ctypes.data % alignment == 0, "the region is not aligned"
        if isinstance(slot_bytes, int):
            assert 0 < slot_bytes <= region.nbytes, (region.nbytes, slot_bytes)
            slot_bytes = np.full(region.nbytes // slot_bytes, slot_bytes)
        self.sizes = slot_bytes
        assert (self.sizes > 0).all() and not (self.sizes % alignment).any(), alignment
        self._begin: npt.NDArray[np.int64] = np.cumsum(self.sizes) - self.sizes
        self.n_slots = len(self.sizes)
        assert self.n_slots and self.sizes.sum() <= region.nbytes, (region.nbytes, self.sizes)
        self._bytes = region
        self._address = int(region.ctypes.data)

    @property
    def slot_bytes(self) -> int:
        """Bytes of the smallest slot."""
        return int(self.sizes.min())

    def address(self, slot: int) -> int:
        """Address of the first byte of `slot`."""
        assert 0 <= slot < self.n_slots, slot
        return self._address + int(self._begin[slot])

    @property
    def room(self) -> npt.NDArray[np.uint8]:
        """The bytes of all slots."""
        return self._bytes[: int(self.sizes.sum())]

    def end(self, slot: int) -> int:
        """Where `slot` ends, from the first byte of the first."""
        return int(self._begin[slot] + self.sizes[slot])

    def view(self, slot: int) -> npt.NDArray[np.uint8]:
        """The bytes of `slot`, writable."""
        assert 0 <= slot < self.n_slots, slot
        first = int(self._begin[slot])
        return self._bytes[first : first + int(self.sizes[slot])]
