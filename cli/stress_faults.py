"""Disks that are slow, stutter, fail or deliver less: faults put under the process's own reads.

Owns: what goes wrong, and the count of reads it happened to. Must not know the engine: it sits at
the system call, so that everything above it is what a user runs. Only for a process that was
started to be tested.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Sequence

__all__ = ["FAULTS", "Faults"]

FAULTS = ("slow", "stutter", "eio", "eio-load", "short")
_SLOW_S = 0.004  # for each read
_STUTTER_S = 0.15  # for one read in 16
_STUTTER_EVERY = 16


class Faults:
    """From `install` on, `os.preadv` does as `kind` says.

    slow: each read waits 4 ms. stutter: one in 16 waits 150 ms. eio and eio-load: read number
    `number` fails, counted from 1 over all threads (they differ in when they are installed: once
    the model is loaded, or before). short: reads deliver half of what was asked for, in whole
    blocks, but for one in three. `reads` counts all of them, `done` those it happened to.
    """

    def __init__(self, kind: str, number: int = 1) -> None:
        assert kind in FAULTS, kind
        self.kind = kind
        self.number = number
        self.reads = self.done = 0
        self._lock = threading.Lock()
        self._preadv = os.preadv

    def install(self) -> None:
        """Put it under the process."""
        os.preadv = self._read  # type: ignore[assignment]

    def remove(self) -> None:
        """Let reads be as they were."""
        os.preadv = self._preadv

    def _read(self, fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        hit = self._count()
        if hit and self.kind.startswith("eio"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if hit and self.kind in ("slow", "stutter"):
            time.sleep(_SLOW_S if self.kind == "slow" else _STUTTER_S)
        if hit and self.kind == "short":
            half = memoryview(buffers[0])
            buffers = [half[: max(half.nbytes // 8192 * 4096, 4096)]]
        return self._preadv(fd, buffers, offset, flags)

    def _count(self) -> bool:
        with self._lock:
            self.reads += 1
            hit = {
                "slow": True,
                "stutter": self.reads % _STUTTER_EVERY == 0,
                "eio": self.reads == self.number,
                "eio-load": self.reads == self.number,
                "short": self.reads % 3 != 0,
            }[self.kind]
            self.done += hit
            return hit
