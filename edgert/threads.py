"""The Python side of the thread team: N threads that sleep until there is a program to run.

Owns: the threads, the control cells, starting and stopping a walk. Must not know what is computed.

The caller's own thread only waits, so that Ctrl-C reaches it at once, at any line: it hands the
walk to the team's leader in one step, and the leader starts and collects the others. After an
interruption the stop flag ends the walk within one op, and `settle` waits for that before anything
the walk uses is touched again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt

from edgert.kernels_cpu import rows
from edgert.kernels_cpu.program import Program
from edgert.kernels_cpu.team import run_program

__all__ = ["ThreadTeam"]

_Ints = npt.NDArray[np.int64]
_Job = tuple[int, int, int, int, int, int]  # the arguments of `run_program` after the threads


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
        self._counters = _cells(0)
        self._unsettled = False  # a walk may be under way though nobody waits for it
        self._error: BaseException | None = None
        self._orders: SimpleQueue[tuple[_Job | None, threading.Event] | None] = SimpleQueue()
        self._jobs: list[SimpleQueue[_Job | None]] = [SimpleQueue() for _ in range(1, threads)]
        self._done: SimpleQueue[None] = SimpleQueue()
        run_program.compile()
        works: list[Callable[[], None]] = [self._lead]
        works += [partial(self._follow, tid) for tid in range(1, threads)]
        self._members = [
            threading.Thread(target=work, name=f"edgert-compute-{tid}", daemon=True)
            for tid, work in enumerate(works)
        ]
        for member in self._members:
            member.start()

    def _lead(self) -> None:
        """Thread 0: start the others, walk, wait for them, and tell whoever waits."""
        while (order := self._orders.get()) is not None:
            job, ended = order
            if job is not None:
                for jobs in self._jobs:
                    jobs.put(job)
                self._walk(0, job)
                for _ in self._jobs:
                    self._done.get()
            ended.set()

    def _follow(self, tid: int) -> None:
        """Threads 1 and up: walk when told to."""
        while (job := self._jobs[tid - 1].get()) is not None:
            self._walk(tid, job)
            self._done.put(None)

    def _walk(self, tid: int, job: _Job) -> None:
        try:
            run_program(tid, self.threads, *job)
        except BaseException as error:  # nothing compiled raises; a ctypes error might
            self._error = error
            self.stop()

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
        if self._counters.nbytes < program.counter_bytes:
            self._counters = _cells(program.counter_bytes)
        self._counters[:] = 0
        for cell in (rows.C_COUNT, rows.C_GENERATION):
            self.cell(cell)[0] = 0
        job = (
            self.control.ctypes.data, self.frame.ctypes.data, program.rows.ctypes.data,
            len(program.rows), self._counters.ctypes.data, self.streams.ctypes.data,
        )  # fmt: skip
        ended = threading.Event()
        self._unsettled = True
        try:
            self._orders.put((job, ended))
            ended.wait()
        except BaseException:
            self.stop()
            raise
        self._unsettled = False
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def settle(self) -> None:
        """Make sure that no walk is under way; one that was interrupted is stopped."""
        if not self._unsettled:
            return
        self.stop()
        ended = threading.Event()
        self._orders.put((None, ended))  # orders are served in turn: this one comes after the walk
        ended.wait()
        self._unsettled = False

    def close(self) -> None:
        """End the threads, and a walk under way before them. Idempotent."""
        self.settle()
        self._orders.put(None)
        for jobs in self._jobs:
            jobs.put(None)
        for member in self._members:
            member.join()
        self._jobs, self._members = [], []
