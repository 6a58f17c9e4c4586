"""The Python side of the thread team: N threads that sleep until there is a program to run.

Owns: the threads, the control cells, starting and stopping a walk. Must not know what is computed.
The caller's own thread only waits, so that Ctrl-C reaches it at once: it sets the stop flag, which
every wait and every op of the walk looks at, and the call ends within one op.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.kernels_cpu import rows
from edgert.kernels_cpu.program import Program
from edgert.kernels_cpu.team import run_program

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
        self._counters = _cells(0)
        self._jobs: list[SimpleQueue[tuple[int, ...] | None]] = []
        self._done: SimpleQueue[BaseException | None] = SimpleQueue()
        self._members: list[threading.Thread] = []
        run_program.compile()
        for tid in range(threads):
            jobs: SimpleQueue[tuple[int, ...] | None] = SimpleQueue()
            member = threading.Thread(
                target=self._member, args=(jobs,), name=f"edgert-compute-{tid}", daemon=True
            )
            self._jobs.append(jobs)
            self._members.append(member)
            member.start()

    def _member(self, jobs: SimpleQueue[tuple[int, ...] | None]) -> None:
        while True:
            job = jobs.get()
            if job is None:
                return
            try:
                run_program(*job)
                self._done.put(None)
            except BaseException as error:  # nothing compiled raises; a ctypes error might
                self._done.put(error)

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

    def take_stall_ns(self) -> int:
        """Nanoseconds the first thread has waited for weights since the last call."""
        cell = self.cell(rows.C_STALL_NS)
        stalled = int(cell[0])
        cell[0] = 0
        return stalled

    def run(self, program: Program) -> None:
        """Walk `program` with `frame` and `streams` as they are; wait until all threads are done.

        An exception in the waiting thread (Ctrl-C) stops the walk, waits for it, and goes on.
        """
        if self._counters.nbytes < program.counter_bytes:
            self._counters = _cells(program.counter_bytes)
        self._counters[:] = 0
        for cell in (rows.C_COUNT, rows.C_GENERATION, rows.C_STOP):
            self.cell(cell)[0] = 0
        addresses = (
            self.control.ctypes.data, self.frame.ctypes.data, program.rows.ctypes.data,
            len(program.rows), self._counters.ctypes.data, self.streams.ctypes.data,
        )  # fmt: skip
        for tid, jobs in enumerate(self._jobs):
            jobs.put((tid, self.threads, *addresses))
        self._collect(self.stop)

    def _collect(self, on_interrupt: Callable[[], Any]) -> None:
        """Wait for every member, even when interrupted; then raise what interrupted."""
        pending, error = self.threads, None
        while pending:
            try:
                failed = self._done.get()
                pending -= 1
                error = error or failed
            except BaseException as interrupt:
                on_interrupt()
                error = error or interrupt
        if error is not None:
            self.stop()
            raise error

    def close(self) -> None:
        """End the threads. Idempotent; no walk may be under way."""
        for jobs in self._jobs:
            jobs.put(None)
        for member in self._members:
            member.join()
        self._jobs, self._members = [], []
