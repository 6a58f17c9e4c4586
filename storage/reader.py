"""Reader threads: what the two streamers share.

Owns: a team of threads with as many staging buffers, aligned reads of extents, the pipeline from
reading to placing, the hand-over of an error to the caller, and the counters. Must not know the
order of reads nor where the bytes go.

Threads, not an event loop: `os.preadv` and the repacking release the GIL, so a few Python threads
keep a device of several GB/s busy with requests of 1-4 MiB. In the pipeline two thirds of them only
read and a third only place: threads that did both in turn would leave the device without a request
whenever several reads end together, as they do on a virtual disk.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from queue import SimpleQueue
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from edgert.storage.backend import Backend, aligned_range
from edgert.storage.manifest import Extent
from edgert.storage.promptness import wake_promptly

__all__ = ["ReaderTeam", "parts_bytes"]

Bytes = npt.NDArray[np.uint8]
_Job = TypeVar("_Job")


def parts_bytes(parts: Iterable[Extent], alignment: int) -> int:
    """Bytes of staging that one read of `parts` needs: their aligned ranges side by side."""
    return sum(aligned_range(p, alignment)[1] for p in parts)


class ReaderTeam:
    """Threads that read, and what has to be shared between them.

    `lock` guards the owner's state as well as the team's. `failed` (int64[1], stable address)
    becomes 1 once a thread died of an exception: compiled code polls it.
    """

    def __init__(self, backend: Backend, staging: Sequence[Bytes], name: str) -> None:
        assert staging, "a team needs a staging buffer for each thread"
        for buffer in staging:
            assert buffer.dtype == np.uint8 and buffer.ndim == 1 and buffer.flags.c_contiguous
            assert buffer.ctypes.data % backend.alignment == 0, "staging is not aligned"
        self.backend = backend
        self.lock = threading.Lock()
        self.failed = np.zeros(1, np.int64)
        self.stopping = False
        self._fence = threading.Lock()
        self._staging = tuple(staging)
        self._name = name
        self._error: BaseException | None = None
        self._threads: list[threading.Thread] = []
        self._read_bytes = [0] * len(staging)
        self._read_ns = [0] * len(staging)
        self._reading = 0  # threads inside `read`
        self._busy_since = 0
        self._busy_ns = 0

    @property
    def n_readers(self) -> int:
        """Threads that can read at a time."""
        return len(self._staging)

    @property
    def reading(self) -> bool:
        """True while a read is under way."""
        return self._reading > 0

    @property
    def running(self) -> bool:
        """True while there are threads, stopping ones included."""
        return bool(self._threads)

    @property
    def read_bytes(self) -> int:
        """Bytes asked from the backend so far, alignment included."""
        return sum(self._read_bytes)

    @property
    def read_ns(self) -> int:
        """Time spent in reads, summed over the threads."""
        return sum(self._read_ns)

    @property
    def busy_ns(self) -> int:
        """Time during which at least one read was under way."""
        with self.lock:
            under_way = time.perf_counter_ns() - self._busy_since if self._reading else 0
            return self._busy_ns + under_way

    def start(self, works: Sequence[Callable[[], None]]) -> None:
        """One thread for each function, which returns when `stopping` is set."""
        assert not self._threads, "the threads run already"
        self.stopping = False
        for i, work in enumerate(works):
            thread = threading.Thread(
                target=self._run, args=(work,), name=f"{self._name}-{i}", daemon=True
            )
            self._threads.append(thread)
        for thread in self._threads:
            thread.start()

    def start_pipeline(
        self,
        take: Callable[[], tuple[Sequence[Extent], _Job] | None],
        place: Callable[[_Job, list[Bytes]], None],
        room: Callable[[_Job], Bytes | None] = lambda job: None,
        excuse: Callable[[_Job, BaseException], bool] = lambda _job, _error: False,
    ) -> None:
        """Threads that read what `take` names next, and threads that `place` what was read.

        `take` gives what to read and what to hand to `place`, or None at the end; it may block,
        and is called by several threads. What has `room` of its own is read right there, and
        the thread that read it calls `place`. `excuse` says of a read that failed whether the
        threads go on without it.
        """
        n_placing = max(1, self.n_readers // 3)
        n_reading = max(1, self.n_readers - n_placing)
        free, full = SimpleQueue[int](), SimpleQueue[tuple[int, list[Bytes], _Job] | None]()
        for buffer in range(self.n_readers):
            free.put(buffer)
        reading = [None] * n_reading  # one for each thread that has not ended

        def read_all() -> None:
            try:
                while (taken := take()) is not None:
                    buffer = free.get()
                    try:
                        if self.stopping:
                            free.put(buffer)  # for the next one that waits
                            return
                        into = room(taken[1])
                        raw = self.read(buffer, taken[0], into)
                        if into is not None:
                            place(taken[1], raw)
                    except BaseException as error:
                        free.put(buffer)
                        if excuse(taken[1], error):
                            continue
                        raise
                    if into is None:
                        full.put((buffer, raw, taken[1]))
                    else:
                        free.put(buffer)
            except BaseException as error:
                self.fail(error)
            finally:
                with self.lock:
                    reading.pop()
                    last = not reading
                for _ in range(n_placing if last else 0):
                    full.put(None)

        def place_all() -> None:
            while (item := full.get()) is not None:
                buffer, raw, job = item
                try:
                    if not self.stopping:
                        place(job, raw)
                except BaseException as error:
                    self.fail(error)
                free.put(buffer)

        self.start([read_all] * n_reading + [place_all] * n_placing)

    def join(self) -> None:
        """Wait for the threads to end. To end them early, set `stopping` and wake them first."""
        while self._threads:  # a thread leaves the list once joined, so Ctrl-C here is harmless
            if self._threads[-1].ident is not None:  # None: the system refused to start it
                self._threads[-1].join()
            self._threads.pop()

    def read(self, reader: int, parts: Sequence[Extent], into: Bytes | None = None) -> list[Bytes]:
        """The exact bytes of each part, as views of the staging buffer of `reader` or of `into`.

        Valid until the next read of that reader. Raises `StorageError`.
        """
        staging = self._staging[reader] if into is None else into
        room = staging.data
        views: list[Bytes] = []
        at = 0
        begin = self._begin()
        try:
            for part in parts:
                offset, nbytes, skip = aligned_range(part, self.backend.alignment)
                assert at + nbytes <= staging.nbytes, (at, nbytes, staging.nbytes)
                self.backend.read_into(part.file_index, offset, room[at : at + nbytes])
                self._read_bytes[reader] += nbytes
                views.append(staging[at + skip : at + skip + part.nbytes])
                at += nbytes
        finally:
            self._read_ns[reader] += self._end() - begin
        return views

    def fence(self) -> None:
        """Order memory for compiled code on other cores: what was written (or read) before is
        done before what comes after. Taking and releasing a lock twice is a full fence on every
        CPU, and the only one Python has; x86 alone would not need it."""
        with self._fence:
            pass
        with self._fence:
            pass

    def fail(self, error: BaseException) -> None:
        """Keep the first error for the caller and let the other threads end."""
        with self.lock:
            if self._error is None:
                self._error = error
            self.stopping = True
        self.failed[0] = 1

    def raise_if_failed(self) -> None:
        """Raise, in the caller's thread, the exception a reader died of."""
        if self.failed[0]:
            assert self._error is not None
            raise self._error

    def clear(self) -> None:
        """Forget the error. The threads have been joined."""
        assert not self._threads
        self._error = None
        self.failed[0] = 0

    def _run(self, work: Callable[[], None]) -> None:
        wake_promptly()
        try:
            work()
        except BaseException as error:
            self.fail(error)

    def _begin(self) -> int:
        now = time.perf_counter_ns()
        with self.lock:
            if self._reading == 0:
                self._busy_since = now
            self._reading += 1
        return now

    def _end(self) -> int:
        now = time.perf_counter_ns()
        with self.lock:
            self._reading -= 1
            if self._reading == 0:
                self._busy_ns += now - self._busy_since
        return now
