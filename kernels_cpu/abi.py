"""How an op kernel is called: the argument row, the frame, and floats inside integers.

An op kernel is `void(op, frame, start, stop, tid)`, five int64: `op` is the address of its argument
row, `frame` the address of what all kernels of one call share, `start..stop-1` the units to do
(what a unit is, each kernel states), `tid` the number of the calling thread. Its own arguments
start at field `ARG0` of the row; the fields before belong to the executor.

Owns: these field numbers and writing them from Python.
Must not know: what any kernel computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from edgert.kernels_cpu.rows import FRAME_FIELDS
from edgert.units import align_up

__all__ = [
    "ARG0",
    "FRAME_FIELDS",
    "FRAME_N_TOKENS",
    "FRAME_POSITION",
    "N_TOKENS",
    "POSITION",
    "activation_rows",
    "address_of",
    "arguments",
    "float_bits",
    "row_stride",
    "run_op",
]

ARG0 = 8  # first field of the row that belongs to the kernel
FRAME_N_TOKENS = 0  # tokens of this call
FRAME_POSITION = 1  # absolute position of the first of them

# The same as byte offsets, which is how compiled code wants them: `ld_i64(frame + N_TOKENS)`. A
# helper that took the index would be compiled anew for every constant it is called with (measured:
# 0.06 s each, 0.8 s of an attention kernel's 6.5).
N_TOKENS = 8 * FRAME_N_TOKENS
POSITION = 8 * FRAME_POSITION


def arguments(count: int) -> range:
    """Byte offsets in the row of the first `count` arguments: `ld_i64(op + offset)`."""
    return range(8 * ARG0, 8 * (ARG0 + count), 8)


def float_bits(value: float) -> int:
    """The bits of `value` as float32, as the integer an argument row holds."""
    return int(np.float32(value).view(np.uint32))


def address_of(array: npt.NDArray[np.generic] | None) -> int:
    """The address of the first element, or 0 for None (an argument that is not given)."""
    return 0 if array is None else int(array.ctypes.data)


def row_stride(array: npt.NDArray[np.generic] | None) -> int:
    """Bytes from one row to the next, or 0 for None."""
    return 0 if array is None else int(array.strides[0])


def activation_rows(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """A copy of x (T, K) in rows padded to a multiple of 16, as kernels need; the pad is NaN."""
    rows = np.full((x.shape[0], align_up(x.shape[1], 16)), np.nan, np.float32)
    rows[:, : x.shape[1]] = x
    return rows


def run_op(
    kernel: Callable[[int, int, int, int, int], None],
    arguments: Sequence[int],
    units: int,
    *,
    n_tokens: int = 1,
    position: int = 0,
    order: Sequence[tuple[int, int]] | None = None,
) -> None:
    """Run one op kernel on this thread: what the executor does, for tests and single calls.

    `order` lists the (start, stop) ranges of units to run, all of them at once by default.
    """
    op = np.zeros(ARG0 + len(arguments), np.int64)
    op[ARG0:] = arguments
    frame = np.zeros(FRAME_FIELDS, np.int64)
    frame[FRAME_N_TOKENS] = n_tokens
    frame[FRAME_POSITION] = position
    for start, stop in [(0, units)] if order is None else order:
        kernel(op.ctypes.data, frame.ctypes.data, start, stop, 0)
