"""The slots that experts of several sizes get.

Owns: which sizes there are, in which order, and how many slots fit. Pure. Must not know formats.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["slot_sizes", "slots_within", "spread_order"]

_Ints = npt.NDArray[np.int64]


def slot_sizes(record_bytes: _Ints, k: int) -> _Ints:
    """Bytes of the slots for experts, one for each: whoever has n slots has the first n.

    Shapes: record_bytes [layers, experts] -> [layers * experts]. Together the slots are what all
    records are, so with all of them each expert has its own. The first k are for the largest
    records (k experts of a token); the rest is in an order of which every first part has large and
    small ones in proportion, so that fewer slots keep large and small experts alike.
    """
    sizes = -np.sort(-record_bytes.reshape(-1))
    first, rest = sizes[:k], sizes[k:]
    return np.concatenate([first, rest[spread_order(len(rest))]])


def slots_within(sizes: _Ints, nbytes: int) -> int:
    """How many of the first slots fit in `nbytes`."""
    return int(np.searchsorted(np.cumsum(sizes), nbytes, "right"))


def spread_order(count: int) -> list[int]:
    """0 to `count` - 1 in van der Corput's order (the bits of a number, read backwards): any first
    part of it is spread evenly over all.
    """
    bits = max(count - 1, 0).bit_length()
    ranks = (int(f"{i:0{bits}b}"[::-1], 2) if bits else 0 for i in range(1 << bits))
    return [rank for rank in ranks if rank < count]
