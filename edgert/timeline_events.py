"""A timeline as Chrome trace events, and its shares of time in one line.

Owns: what people see: names, tracks, counters. Must not know how it is recorded.

The format is a JSON object with a list of events; times are in microseconds, "X" is a span of one
track, "C" a counter, "M" a name. Source: "Trace Event Format", the Chromium project.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from edgert.kernels_cpu import rows
from edgert.timeline import MEMORY, PASS, Timeline

__all__ = ["events", "shares", "write"]

_Ints = npt.NDArray[np.int64]
_PID = 1
_THREAD = (1 << rows.T_THREAD_BITS) - 1
_SHORTEST_NS = 1000  # waits below this are left out: an open door, not a wait
_PIECE = 4 << 20  # bytes written between two times that their page cache is given back


def write(timeline: Timeline, stream: IO[bytes]) -> None:
    """Write the whole timeline as one JSON object. No pass may be under way."""
    kept = 0
    head = {"displayTimeUnit": "ms", "otherData": {"dropped records": timeline.dropped}}
    stream.write(json.dumps(head).encode()[:-1] + b', "traceEvents": [\n')
    for i, event in enumerate(events(timeline)):
        line = (b",\n" if i else b"") + json.dumps(event, separators=(",", ":")).encode()
        kept += stream.write(line)
        if kept >= _PIECE:
            _give_back(stream)
            kept = 0
    stream.write(b"\n]}\n")
    _give_back(stream)


def _give_back(stream: IO[bytes]) -> None:
    """Have what was written on the disk and out of the page cache, which a cgroup is charged."""
    stream.flush()
    if not hasattr(os, "posix_fadvise"):
        return
    try:
        number = stream.fileno()
        os.fdatasync(number)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError:  # a pipe, or a stream that is no file
        pass


def events(timeline: Timeline) -> Iterator[dict[str, Any]]:
    """All events, the names of the tracks first."""
    spans, records = timeline.spans, timeline.records
    n_threads = int((records[:, rows.T_ROW] & _THREAD).max(initial=-1)) + 1
    yield _name("process_name", 0, "edgert")
    for tid in range(n_threads):
        yield _name("thread_name", tid, f"compute {tid}")
    for i, thread in enumerate(timeline.threads):
        yield _name("thread_name", n_threads + i, thread)
    yield from _op_events(timeline, records)
    track = {thread: n_threads + i for i, thread in enumerate(timeline.threads)}
    for name, thread, begin, end, a, b in spans:
        if name != MEMORY:
            yield _span(name, "python", track[thread], begin, end, _details(timeline, name, a, b))
    yield from _counters(timeline)


def _name(what: str, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": _PID, "tid": tid, "name": what, "args": {"name": name}}


def _span(
    name: str, category: str, tid: int, begin: int, end: int, details: dict[str, Any]
) -> dict[str, Any]:
    event = {
        "ph": "X", "pid": _PID, "tid": tid, "name": name, "cat": category, "ts": begin / 1e3,
        "dur": (end - begin) / 1e3,
    }  # fmt: skip
    return event | {"args": details} if details else event


def _op_events(timeline: Timeline, records: _Ints) -> Iterator[dict[str, Any]]:
    """Waiting for weights, computing, and waiting for the other threads, of each op row."""
    for code, begin, ready, done, through in records.tolist():
        row, tid = code >> rows.T_THREAD_BITS, code & _THREAD
        name = timeline.op_names[row]
        tile = int(timeline.op_tiles[row])
        if ready - begin >= _SHORTEST_NS:
            yield _span("wait for weights", "wait", tid, begin, ready, {"op": name, "tile": tile})
        if done > ready:
            yield _span(name, "compute", tid, ready, done, {"tile": tile} if tile >= 0 else {})
        if through - done >= _SHORTEST_NS:
            yield _span("wait for threads", "barrier", tid, done, through, {"op": name})


def _details(timeline: Timeline, name: str, a: int, b: int) -> dict[str, Any]:
    """What the two numbers of a span mean."""
    if name in (PASS, "embed"):
        return {"tokens": a, "position": b}
    if name == "place expert":
        return {"layer": a, "expert": b}
    if name == "read" or name.startswith("place"):
        tensor = timeline.tensor_at(a + b // 2 if name == "read" else a)
        return {"tensor": tensor, "bytes": b, **_file(a)}
    return {}


def _file(place: int) -> dict[str, int]:
    return {"offset": place & ((1 << 48) - 1), "file": place >> 48}


def _counters(timeline: Timeline) -> Iterator[dict[str, Any]]:
    """Reads under way, bytes read, slots of the ring that are ready, and memory."""
    spans = timeline.spans
    reads = sorted((end, b) for name, _, _, end, _, b in spans if name == "read")
    total = 0
    for end, nbytes in reads:
        total += nbytes
        yield _counter("read", end, {"MB": total / 1e6})
    steps = [(begin, 1) for name, _, begin, *_ in spans if name == "read"]
    steps += [(end, -1) for end, _ in reads]
    yield from _levels("reads under way", steps)
    steps = [(end, 1) for name, _, _, end, *_ in spans if name == "place tile"]
    yield from _levels("ring slots ready", steps + [(at, -1) for at in _tiles_done(timeline)])
    for name, _, begin, _, resident, cgroup in spans:
        if name == MEMORY:
            mib = {"RSS": resident, "cgroup": cgroup, "planned": timeline.planned_bytes}
            yield _counter("memory", begin, {f"{k} MiB": v / 2**20 for k, v in mib.items()})


def _levels(name: str, steps: list[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """A counter that goes up and down. Where it began is not known: its lowest level is 0."""
    steps.sort()
    levels = np.cumsum([step for _, step in steps], dtype=np.int64)
    lowest = min(0, int(levels.min(initial=0)))
    for (at, _), level in zip(steps, levels.tolist(), strict=True):
        yield _counter(name, at, {name: level - lowest})


def _counter(name: str, at: int, values: dict[str, float]) -> dict[str, Any]:
    return {"ph": "C", "pid": _PID, "tid": 0, "name": name, "ts": at / 1e3, "args": values}


def _tiles_done(timeline: Timeline) -> list[int]:
    """When the last thread was done with each streamed tile, pass by pass."""
    records = timeline.records
    row = records[:, rows.T_ROW] >> rows.T_THREAD_BITS
    streamed = timeline.op_tiles[row] >= 0
    records, row = records[streamed], row[streamed]
    passes = np.array([begin for name, _, begin, *_ in timeline.spans if name == PASS], np.int64)
    turn = np.searchsorted(passes, records[:, rows.T_BEGIN])
    order = np.lexsort((records[:, rows.T_DONE], row, turn))
    key = np.stack([turn[order], row[order]])
    last = np.ones(len(order), bool)
    last[:-1] = (key[:, 1:] != key[:, :-1]).any(axis=0)
    found: list[int] = records[order[last], rows.T_DONE].tolist()
    return found


def shares(timeline: Timeline) -> dict[str, float]:
    """Shares of the time from the first to the last decode pass; of all passes without any.

    `reading`: at least one read was under way; `compute`, `wait` (for weights), `barrier` (for
    other threads) of the compute threads' time, and `between` passes. {} when nothing was recorded.
    """
    spans, records = timeline.spans, timeline.records
    passes = [(begin, end, n) for name, _, begin, end, n, _ in spans if name == PASS]
    passes = [p for p in passes if p[2] == 1] or passes
    if not passes or not len(records):
        return {}
    start, stop = passes[0][0], passes[-1][1]
    reads = [(begin, end) for name, _, begin, end, *_ in spans if name == "read"]
    inside = records[(records[:, rows.T_BEGIN] >= start) & (records[:, rows.T_BEGIN] < stop)]
    n_threads = len(np.unique(inside[:, rows.T_ROW] & _THREAD))
    times = inside[:, rows.T_BEGIN : rows.T_THROUGH + 1]
    wait, compute, barrier = np.diff(times, axis=1).sum(axis=0) / max(1, n_threads)
    length = stop - start
    return {
        "passes": float(len(passes)),
        "seconds": length / 1e9,
        "reading": _covered(reads, start, stop) / length,
        "wait": float(wait) / length,
        "compute": float(compute) / length,
        "barrier": float(barrier) / length,
        "between": 1 - sum(end - begin for begin, end, _ in passes) / length,
    }


def _covered(intervals: Iterable[tuple[int, int]], start: int, stop: int) -> int:
    """How much of start..stop lies in at least one interval."""
    covered, until = 0, start
    for begin, end in sorted(intervals):
        begin, end = max(begin, until), min(end, stop)
        if end > begin:
            covered += end - begin
            until = end
    return covered
