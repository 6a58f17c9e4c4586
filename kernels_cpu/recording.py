"""Where the time of a walk goes: one record for each row and thread, into a ring.

Owns: writing it (rows.py has its layout). Must not know who reads it nor what a row does.
"""

from __future__ import annotations

from edgert.kernels_cpu import rows
from edgert.kernels_cpu.atomic import arg, atomic_add, now_ns, store_int
from edgert.kernels_cpu.jit import inline

__all__ = ["record"]


@inline
def record(ring: int, row: int, tid: int, begin: int, ready: int, done: int) -> None:
    """Note that thread `tid` is through with `row` now."""
    number = atomic_add(ring + 8 * rows.T_COUNT, 1) & arg(ring, rows.T_MASK)
    at = ring + rows.CELL + 8 * rows.T_FIELDS * number
    store_int(at + 8 * rows.T_ROW, (row << rows.T_THREAD_BITS) | tid)
    store_int(at + 8 * rows.T_BEGIN, begin)
    store_int(at + 8 * rows.T_READY, ready)
    store_int(at + 8 * rows.T_DONE, done)
    store_int(at + 8 * rows.T_THROUGH, now_ns())
