"""A timeline as Chrome trace events, and its shares of time in one line.

Owns: what people see: names, tracks, counters. Must not know how it is recorded.

The format is a JSON object with a list of events; times are in microseconds, "X" is a span of one
track, "C" a counter, "M" a name. Source: "Trace Event Format", the Chromium project.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from edgert.kernels_cpu import rows
from edgert.timeline import MEMORY, PASS, Timeline, in_pieces

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
    records = timeline.records
    n_threads = int((records[:, rows.T_ROW] & _THREAD).max(initial=-1)) + 1
    yield _name("process_name", 0, "edgert")
    for tid in range(n_threads):
        yield _name("thread_name", tid, f"compute {tid}")
    for i, thread in enumerate(timeline.threads):
        yield _name("thread_name", n_threads + i, thread)
    yield from _op_events(timeline, records)
    track = {thread: n_threads + i for i, thread in enumerate(timeline.threads)}
    for name, thread, begin, end, a, b in timeline.spans():
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
    for code, begin, ready, done, through in in_pieces(records):
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
    """Bytes read, reads under way, slots of the ring that are ready, and memory."""
    reads = timeline.spans_of("read")
    by_end = reads[np.argsort(reads[:, 1])]
    total = np.cumsum(by_end[:, 3])
    for at, nbytes in in_pieces(np.stack([by_end[:, 1], total], axis=1)):
        yield _counter("read", at, {"MB": nbytes / 1e6})
    yield from _level("reads under way", reads[:, 0], reads[:, 1])
    yield from _level("ring slots ready", timeline.spans_of("place tile")[:, 1], _done(timeline))
    for at, _, resident, cgroup in in_pieces(timeline.spans_of(MEMORY)):
        sizes = {"RSS": resident, "cgroup": cgroup, "planned": timeline.planned_bytes}
        yield _counter("memory", at, {f"{k} MiB": v / 2**20 for k, v in sizes.items()})


def _level(name: str, ups: _Ints, downs: _Ints) -> Iterator[dict[str, Any]]:
    """A counter that goes up and down. Where it began is not known: its lowest level is 0."""
    at = np.concatenate([ups, downs])
    steps = np.repeat([1, -1], [len(ups), len(downs)])
    order = np.argsort(at, kind="stable")
    levels = np.cumsum(steps[order])
    levels -= min(0, levels.min(initial=0))
    for time, level in in_pieces(np.stack([at[order], levels], axis=1)):
        yield _counter(name, time, {name: level})


def _counter(name: str, at: int, values: dict[str, float]) -> dict[str, Any]:
    return {"ph": "C", "pid": _PID, "tid": 0, "name": name, "ts": at / 1e3, "args": values}


def _done(timeline: Timeline) -> _Ints:
    """When the last thread was done with each streamed tile, pass by pass.

    Its slot was handed back a moment earlier, by the thread that did the last units.
    """
    records = timeline.records
    streamed = timeline.op_tiles[records[:, rows.T_ROW] >> rows.T_THREAD_BITS] >= 0
    records = records[streamed]
    turn = np.searchsorted(np.sort(timeline.spans_of(PASS)[:, 0]), records[:, rows.T_BEGIN])
    key = turn << 32 | records[:, rows.T_ROW] >> rows.T_THREAD_BITS
    order = np.lexsort((records[:, rows.T_DONE], key))
    last = np.append(np.diff(key[order]) != 0, len(order) > 0)[: len(order)]
    found: _Ints = records[order[last], rows.T_DONE]
    return found


def shares(timeline: Timeline) -> dict[str, float]:
    """Shares of the time from the first to the last decode pass; of all passes without any.

    `reading`: at least one read was under way; `compute`, `wait` (for weights), `barrier` (for
    other threads) of the compute threads' time, and `between` passes. {} when nothing was recorded.
    """
    passes, records = timeline.spans_of(PASS), timeline.records
    decode = passes[passes[:, 2] == 1]
    passes = decode if len(decode) else passes
    if not len(passes) or not len(records):
        return {}
    start, stop = int(passes[0, 0]), int(passes[-1, 1])
    length = stop - start
    inside = records[(records[:, rows.T_BEGIN] >= start) & (records[:, rows.T_BEGIN] < stop)]
    n_threads = max(1, len(np.unique(inside[:, rows.T_ROW] & _THREAD)))
    spent = np.diff(inside[:, rows.T_BEGIN : rows.T_THROUGH + 1], axis=1).sum(axis=0)
    wait, compute, barrier = (spent / n_threads / length).tolist()
    return {
        "passes": float(len(passes)),
        "seconds": length / 1e9,
        "reading": _covered(timeline.spans_of("read"), start, stop) / length,
        "wait": wait,
        "compute": compute,
        "barrier": barrier,
        "between": 1 - float((passes[:, 1] - passes[:, 0]).sum()) / length,
    }


def _covered(spans: _Ints, start: int, stop: int) -> int:
    """How much of start..stop lies in at least one span."""
    spans = spans[np.argsort(spans[:, 0])]
    until = np.maximum.accumulate(np.append(start, np.minimum(spans[:, 1], stop)))
    # A span adds what of it lies behind everything before it.
    return int(np.maximum(0, until[1:] - np.maximum(spans[:, 0], until[:-1])).sum())
