"""Things that go wrong on purpose: reads that fail, lag or lie, and memory that runs out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.errors import EdgertError, StorageError
from edgert.storage.arena import Arena
from edgert.storage.backend import Backend


@dataclass
class FaultPlan:
    """What happens to which read; reads are counted from 1 over all threads.

    fail: numbers of reads that raise `StorageError`. fail_from: every read from this number on.
    fail_at: file offsets whose reads raise. delay_s: seconds each read waits (or a function of
    its number). flip: number of a read -> (byte, mask) to flip in what it delivers.
    """

    fail: frozenset[int] | set[int] = frozenset()
    fail_from: int | None = None
    fail_at: frozenset[int] | set[int] = frozenset()
    delay_s: float | Callable[[int], float] = 0.0
    flip: Mapping[int, tuple[int, int]] = field(default_factory=dict)


class FaultyBackend:
    """A backend that does as `inner`, but for what `plan` says. `reads` counts the reads."""

    def __init__(self, inner: Backend, plan: FaultPlan | None = None) -> None:
        self.inner = inner
        self.plan = plan or FaultPlan()
        self.reads = 0
        self._lock = threading.Lock()

    @property
    def paths(self) -> tuple[Path, ...]:
        return self.inner.paths

    @property
    def alignment(self) -> int:
        return self.inner.alignment

    def size(self, file_index: int) -> int:
        return self.inner.size(file_index)

    def read_into(self, file_index: int, offset: int, view: memoryview) -> None:
        with self._lock:
            self.reads += 1
            number = self.reads
        plan = self.plan
        wait = plan.delay_s(number) if callable(plan.delay_s) else plan.delay_s
        if wait:
            time.sleep(wait)
        late = plan.fail_from is not None and number >= plan.fail_from
        if late or number in plan.fail or offset in plan.fail_at:
            path = self.paths[file_index]
            raise StorageError(path, offset, len(view), f"Input/output error (read {number})")
        self.inner.read_into(file_index, offset, view)
        if number in plan.flip:
            at, mask = plan.flip[number]
            view[at] ^= mask

    def close(self) -> None:
        self.inner.close()


class FailingArena(Arena):
    """An arena whose `fail_at`-th `take` (from 1) finds no memory."""

    def __init__(self, nbytes: int, fail_at: int, spare: int = 0) -> None:
        super().__init__(nbytes, spare)
        self.takes = 0
        self.fail_at = fail_at

    def take(
        self, name: str, nbytes: int, alignment: int = 64, *, room: int | None = None
    ) -> npt.NDArray[np.uint8]:
        self.takes += 1
        if self.takes == self.fail_at:
            raise EdgertError(f"the system does not grant memory for {name!r}")
        return super().take(name, nbytes, alignment, room=room)


def fill(shape: Any, seed: int) -> npt.NDArray[np.uint8]:
    """Seeded random bytes."""
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
