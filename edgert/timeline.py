"""A timeline of what an engine does: reads, repacking, every op of every thread, Python between.

Owns: recording, in memory of a fixed size. Must not know how it is shown (timeline_events.py).

Two rings of int64. Compiled code writes a record for each op row and thread (kernels_cpu/rows.py);
Python writes spans: reads, placing, passes, sampling. Both keep the newest, so the end of a run is
always there. The rings are filled before the plan is made and so measured as a part of the
process. An engine without a timeline pays a branch an op.
"""

from __future__ import annotations

import bisect
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgert.kernels_cpu import rows
from edgert.machine import cgroup_usage_bytes, resident_bytes
from edgert.storage.backend import Backend
from edgert.storage.manifest import Manifest

if TYPE_CHECKING:
    from edgert.kernels_cpu.program import Program

__all__ = ["MEMORY", "PASS", "Span", "Timeline", "in_pieces", "no_span", "place_in_file"]

_Ints = npt.NDArray[np.int64]
Span = Callable[..., AbstractContextManager[None]]  # (name, a=0, b=0)

PASS = "pass"  # a walk over the program: tokens and position
MEMORY = "memory"  # samples at the end of passes: RSS and cgroup
_RECORDS = 1 << 17  # of op rows: 5 MiB, some 30 tokens of a streamed 8B model
_SPANS = 1 << 16  # 2.5 MiB
_SAMPLE_NS = 100_000_000  # between two samples of memory, at least
_SPAN_FIELDS = 5  # name << 16 | thread, begin, end, two numbers that depend on the name
_HEADER = rows.CELL // 8
_ROWS = 4096  # made into Python numbers at once
_NAMES_MAX = 1000  # a thread for each request has a name each
_FILE_BITS = 48  # bits of an offset; the file's index lies above them


def _now() -> int:
    """The clock of compiled code (`atomic.now_ns`), in nanoseconds."""
    if hasattr(time, "clock_gettime_ns"):
        return time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    return time.perf_counter_ns()


def no_span(_name: str, _a: int = 0, _b: int = 0) -> AbstractContextManager[None]:
    """What `Timeline.span` is in an engine without a timeline."""
    return _NOTHING


_NOTHING = nullcontext()


def place_in_file(file_index: int, offset: int) -> int:
    """A file and an offset in it as one number."""
    return (file_index << _FILE_BITS) | offset


class Timeline:
    """Records an engine that is opened with `load(..., timeline=...)`. For one engine.

    `records` op rows and `spans` of Python are kept, powers of two: 40 bytes each, 7.5 MiB.
    `write` makes a file that https://ui.perfetto.dev and chrome://tracing open.
    """

    def __init__(self, records: int = _RECORDS, spans: int = _SPANS) -> None:
        assert records & (records - 1) == 0 and spans & (spans - 1) == 0, (records, spans)
        # Filled, not only taken: pages that nobody wrote would not be measured.
        self._ops = np.full(_HEADER + records * rows.T_FIELDS, -1, np.int64)
        self._ops[rows.T_COUNT] = 0
        self._ops[rows.T_MASK] = records - 1
        self._spans = np.full((spans, _SPAN_FIELDS), -1, np.int64)
        self._ops_dropped = 0  # of programs before
        self._n_spans = 0
        self._sampled_ns = 0
        self._lock = threading.Lock()
        self.names: list[str] = []  # of spans
        self.threads: list[str] = []  # that wrote them
        self.op_names: tuple[str, ...] = ()  # of op rows
        self.op_tiles: _Ints = np.zeros(0, np.int64)  # of op rows: streamed tile, or -1
        self.planned_bytes = 0
        self._tensors: list[tuple[int, str]] = []  # place in the file and name, ascending

    # ---- recording -----------------------------------------------------------------------------

    @property
    def address(self) -> int:
        """Where compiled code writes its records."""
        return int(self._ops.ctypes.data)

    def describe(self, program: Program, manifest: Manifest, planned_bytes: int) -> None:
        """Name what will be recorded. Until then there are no records of op rows.

        Another program after a change of the memory budget has other rows: records of the one
        before are dropped. No pass may be under way.
        """
        self._ops_dropped += self._n_records
        self._ops[rows.T_COUNT] = 0
        self.op_names = program.names
        self.op_tiles = program.rows[:, rows.TILE].copy()
        self.planned_bytes = planned_bytes
        self._tensors = sorted(
            (place_in_file(t.extent.file_index, t.extent.offset), t.name)
            for t in manifest.tensors.values()
        )

    def add(self, name: str, begin: int, end: int, a: int = 0, b: int = 0) -> None:
        """A span of the calling thread, in nanoseconds of the timeline's clock."""
        thread = threading.current_thread().name
        with self._lock:
            code = _number(self.names, name) << rows.T_THREAD_BITS | _number(self.threads, thread)
            self._spans[self._n_spans & (len(self._spans) - 1)] = (code, begin, end, a, b)
            self._n_spans += 1

    @contextmanager
    def span(self, name: str, a: int = 0, b: int = 0) -> Iterator[None]:
        """Record the time until the end of the `with`."""
        begin = _now()
        try:
            yield
        finally:
            self.add(name, begin, _now(), a, b)
            if name == PASS:
                self.sample_memory()

    def sample_memory(self) -> None:
        """Note the resident size and the cgroup's usage, unless that was done just now.

        It takes 1 ms: after each of 20 ms a token it made decoding 10 % slower.
        """
        now = _now()
        if now - self._sampled_ns < _SAMPLE_NS:
            return
        self._sampled_ns = now
        self.add(MEMORY, now, now, resident_bytes(), cgroup_usage_bytes() or 0)

    def watch(self, backend: Backend) -> Backend:
        """The same backend, with its reads recorded."""
        return _Watched(backend, self)

    # ---- what was recorded ---------------------------------------------------------------------

    @property
    def dropped(self) -> int:
        """Records that newer ones have replaced."""
        ops = self._ops_dropped + max(0, self._n_records - self._kept)
        return ops + max(0, self._n_spans - len(self._spans))

    @property
    def _n_records(self) -> int:
        return int(self._ops[rows.T_COUNT])

    @property
    def _kept(self) -> int:
        return int(self._ops[rows.T_MASK]) + 1

    @property
    def begin_ns(self) -> int:
        """From when on everything is there: 0, or the later of what both rings begin with."""
        oldest = [0]
        if self._n_records > self._kept:
            oldest.append(int(self._records[:, rows.T_BEGIN].min()))
        if self._n_spans > len(self._spans):
            oldest.append(int(self._spans[:, 1].min()))
        return max(oldest)

    @property
    def _records(self) -> _Ints:
        return self._ops[_HEADER:].reshape(-1, rows.T_FIELDS)[: self._n_records]

    @property
    def records(self) -> _Ints:
        """Op rows since `begin_ns`, int64 [n, T_FIELDS]. No pass may be under way."""
        found = self._records
        return found[found[:, rows.T_BEGIN] >= self.begin_ns]

    def _kept_spans(self) -> _Ints:
        with self._lock:
            kept = self._spans[: self._n_spans]
            return kept[kept[:, 1] >= self.begin_ns]

    def spans(self) -> Iterator[tuple[str, str, int, int, int, int]]:
        """Spans since `begin_ns`: name, thread, begin, end and two numbers."""
        for code, *rest in in_pieces(self._kept_spans()):
            thread = self.threads[code & ((1 << rows.T_THREAD_BITS) - 1)]
            begin, end, a, b = rest
            yield self.names[code >> rows.T_THREAD_BITS], thread, begin, end, a, b

    def spans_of(self, name: str) -> _Ints:
        """Spans of one name since `begin_ns`: begin, end and two numbers, int64 [n, 4]."""
        kept = self._kept_spans()
        number = self.names.index(name) if name in self.names else -1
        return kept[kept[:, 0] >> rows.T_THREAD_BITS == number, 1:]

    def write(self, stream: IO[bytes]) -> None:
        """Write all of it to a binary file, as Chrome trace events. No pass may be under way."""
        from edgert.timeline_events import write

        write(self, stream)

    def shares(self) -> dict[str, float]:
        """How the time was spent: see `timeline_events.shares`."""
        from edgert.timeline_events import shares

        return shares(self)

    def tensor_at(self, place: int) -> str:
        """The tensor that holds this place of the files; "" for none."""
        at = bisect.bisect_right(self._tensors, place, key=lambda entry: entry[0])
        return self._tensors[at - 1][1] if at else ""


def in_pieces(table: _Ints) -> Iterator[list[int]]:
    """The rows of a table as lists, made some thousand at a time: all at once would take 33 MB."""
    for start in range(0, len(table), _ROWS):
        yield from table[start : start + _ROWS].tolist()


def _number(names: list[str], name: str) -> int:
    """The index of `name`, which is appended when it is new; the last one stands for all others."""
    if name in names:
        return names.index(name)
    if len(names) < _NAMES_MAX:
        names.append(name if len(names) < _NAMES_MAX - 1 else "others")
    return len(names) - 1


class _Watched:
    """A backend whose reads a timeline records."""

    def __init__(self, backend: Backend, timeline: Timeline) -> None:
        self._backend = backend
        self._timeline = timeline

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def read_into(self, file_index: int, offset: int, view: memoryview) -> None:
        """As `Backend.read_into`."""
        with self._timeline.span("read", place_in_file(file_index, offset), len(view)):
            self._backend.read_into(file_index, offset, view)
