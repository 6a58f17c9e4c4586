"""What the streamer tests share: memory, and waiting as compiled code does."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from edgert.storage.window import Window

PATIENCE_S = 20.0  # a consumer that waits longer than this has met a deadlock
ALIGNMENT = 512  # of the test's "device"; slots and staging are page-aligned all the same


def pages(nbytes: int) -> npt.NDArray[np.uint8]:
    """Page-aligned bytes."""
    return np.frombuffer(mmap.mmap(-1, max(nbytes, 1)), np.uint8)[:nbytes]


def at_address(window: Window, address: int, nbytes: int) -> bytes:
    """The bytes at an address, which must be that of a slot."""
    slot, rest = divmod(address - window.address(0), window.slot_bytes)
    assert rest == 0
    return window.view(slot)[:nbytes].tobytes()


def wait_for(condition: Callable[[], object], failed: npt.NDArray[np.int64]) -> bool:
    """Spin as compiled code does; False when the other side failed."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if failed[0]:
            return False
        assert time.monotonic() < end, "deadlock"
        time.sleep(0)
    return True
