"""The Python side of the thread team: N threads that sleep until there is a program to run.

Owns: the threads, the control cells, starting and stopping a walk. Must not know what is computed.

The threads live in compiled code (`team.serve_kernel`), so that a token enters Python once, in the
caller's thread. That one only waits, on a pipe, so that Ctrl-C reaches it at once, at any line.
After an interruption the stop flag ends the walk within one op, and `settle` waits for that before
anything the walk uses is touched again. Measured for a walk of one small row and 2 threads: 40 us;
with threads that return to Python and wait in queues 121 us.
"""

from __future__ import annotations

import os
import threading

import numpy as np
import numpy.typing as npt

from edgert.kernels_cpu import rows
from edgert.kernels_cpu.program import Program
from edgert.kernels_cpu.team import begin_walk_kernel, serve_kernel

__all__ = ["ThreadTeam"]

_Ints = npt.NDArray[np.int64]


def _cells(nbytes: int) -> _Ints:
    """Zeroed int64 cells at a cache-line boundary."""
    raw = np.zeros(nbytes // 8 + rows.CELL // 8, np.int64)
    skip = (-raw.ctypes.data % rows.CELL) // 8
    return raw[skip : skip + nbytes // 8]


class ThreadTeam:
    """`threads` threads that walk programs together. One walk at a time; the caller sees to it."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.control = _cells(rows.CONTROL_CELLS * rows.CELL)
        self.frame = np.zeros(rows.FRAME_FIELDS, np.int64)
        self.streams = np.zeros(rows.STREAM_FIELDS, np.int64)
        self._order = _cells(8 * rows.ORDER_FIELDS)
        self._program: Program | None = None  # what the order names
        self._counters = _cells(0)
        self._orders, self._ended = os.pipe(), os.pipe()
        serve_kernel.compile()
        begin_walk_kernel.compile()
        self._control_address = int(self.control.ctypes.data)
        self._members = [
            threading.Thread(
                target=serve_kernel,
                args=(
                    tid, threads, self._control_address, int(self._order.ctypes.data),
                    self._orders[0], self._ended[1],
                ),
                name=f"edgert-compute-{tid}",
                daemon=True,
            )
            for tid in range(threads)
        ]  # fmt: skip
        for member in self._members:
            member.start()

    def cell(self, index: int) -> _Ints:
        """The control cell `index` as an int64 array of one."""
        at = index * rows.CELL // 8
        return self.control[at : at + 1]

    @property
    def stopped(self) -> bool:
        """True when the last walk was told to stop."""
        return bool(self.cell(rows.C_STOP)[0])

    def stop(self) -> None:
        """Make the walk under way, if any, end within one op. Any thread may call it."""
        self.cell(rows.C_STOP)[0] = 1

    def arm(self) -> None:
        """Take `stop` back. Not done by `run`: a stop that comes just before it must end it."""
        self.cell(rows.C_STOP)[0] = 0

    def take_stall_ns(self) -> int:
        """Nanoseconds the first thread has waited for weights since the last call."""
        cell = self.cell(rows.C_STALL_NS)
        stalled = int(cell[0])
        cell[0] = 0
        return stalled

    def run(self, program: Program) -> None:
        """Walk `program` with `frame` and `streams` as they are; wait until all threads are done.

        Ends at once when `stop` was called since the last `arm`. An exception in the waiting thread
        (Ctrl-C) stops the walk and goes on.
        """
        self.settle()
        if self._program is not program:
            self._take(program)
        self._counters[:] = 0
        for cell in (rows.C_COUNT, rows.C_GENERATION):
            self.cell(cell)[0] = 0
        try:
            self._begin()
            self._await_end()
        except BaseException:
            self.stop()
            raise

    def _take(self, program: Program) -> None:
        """Make `program` what the threads will walk."""
        if self._counters.nbytes < program.counter_bytes:
            self._counters = _cells(program.counter_bytes)
        order = self._order
        order[rows.O_FRAME] = self.frame.ctypes.data
        order[rows.O_ROWS] = program.rows.ctypes.data
        order[rows.O_N_ROWS] = len(program.rows)
        order[rows.O_COUNTERS] = self._counters.ctypes.data
        order[rows.O_STREAMS] = self.streams.ctypes.data
        self._program = program

    def _begin(self) -> None:
        begin_walk_kernel(self._control_address, self._orders[1])

    @property
    def _walking(self) -> bool:
        return bool(self.cell(rows.C_ENDED)[0] < self.cell(rows.C_ORDERED)[0])

    def _await_end(self) -> None:
        """Wait for the end of the walk under way, whose message nobody has read yet.

        An older one may be left, of a walk whose end an interrupted wait did not see.
        """
        os.read(self._ended[0], 8)
        while self._walking:
            os.read(self._ended[0], 8)

    def settle(self) -> None:
        """Make sure that no walk is under way; one that was interrupted is stopped."""
        if self._walking:
            self.stop()
            self._await_end()

    def close(self) -> None:
        """End the threads, and a walk under way before them. Idempotent."""
        if self._order[rows.O_N_ROWS] >= 0:
            self.settle()
            self._order[rows.O_N_ROWS] = -1
            self._begin()
        for member in self._members:
            member.join()
        if self._members:
            for fd in (*self._orders, *self._ended):
                os.close(fd)
        self._members = []
