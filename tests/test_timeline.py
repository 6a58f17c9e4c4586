"""The timeline: every op of every thread once, in bounded memory, and a file that can be read."""

from __future__ import annotations

import io
import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgert
from edgert.kernels_cpu import rows
from edgert.timeline import _NAMES_MAX, MEMORY, PASS, Timeline, _now
from edgert.timeline_events import events, shares
from tests.command import edgert as command
from tests.command import inside
from tests.tight import tight

TID = (1 << rows.T_THREAD_BITS) - 1
MS = 10**6


def run(path: Path, timeline: Timeline | None, spare: int | None = 0, **options: Any) -> Any:
    """Prefill and 9 passes of one token; the completion."""
    with tight(path, spare, timeline=timeline, **options) as engine:
        return engine.generate([1, 40, 41, 42, 43], max_tokens=10, temperature=0, seed=1)


# ----------------------------------------------------------------------------- what is recorded


@pytest.mark.parametrize("threads", [1, 3])
def test_every_op_of_every_pass_and_thread_once(tiny_gguf: Path, threads: int) -> None:
    timeline = Timeline()
    run(tiny_gguf, timeline, threads=threads)
    assert timeline.dropped == 0
    records, n_rows = timeline.records, len(timeline.op_names)
    passes = [span for span in timeline.spans() if span[0] == PASS]
    codes, counts = np.unique(records[:, rows.T_ROW], return_counts=True)
    wanted = {row << rows.T_THREAD_BITS | t for row in range(n_rows) for t in range(threads)}
    assert set(codes.tolist()) == wanted
    assert (counts == len(passes)).all()
    assert (np.diff(records[:, rows.T_BEGIN :], axis=1) >= 0).all()
    for _, _, begin, end, *_ in passes:
        inner = records[(records[:, rows.T_BEGIN] >= begin) & (records[:, rows.T_THROUGH] <= end)]
        assert len(inner) == n_rows * threads
        order = inner[inner[:, rows.T_ROW] & TID == 0]
        assert (np.diff(order[:, rows.T_ROW]) > 0).all()  # a thread walks the rows in order


def test_the_waves_of_experts_are_recorded(tiny_moe_gguf: Path) -> None:
    timeline = Timeline()
    run(tiny_moe_gguf, timeline)
    names = [timeline.op_names[code >> rows.T_THREAD_BITS] for code in timeline.records[:, 0]]
    passes = sum(name == PASS for name, *_ in timeline.spans())
    # A record for the row, and at least one more for its waves.
    assert names.count("blk.1.experts") >= 2 * 2 * passes
    assert any(name == "place expert" for name, *_ in timeline.spans())


def test_a_timeline_changes_no_bit_and_counts_every_byte(tiny_gguf: Path) -> None:
    timeline = Timeline()
    with tight(tiny_gguf, timeline=timeline) as engine:
        found = engine.generate([1, 40, 41, 42, 43], max_tokens=10, temperature=0, seed=1)
        streamer = engine.weights.streamer
    plain = run(tiny_gguf, None)
    assert found.tokens == plain.tokens and found.stats.logits_hash == plain.stats.logits_hash
    reads = [span for span in timeline.spans() if span[0] == "read"]
    assert streamer is not None
    assert sum(s[5] for s in reads if s[1].startswith("edgert-stream")) == streamer.read_bytes
    placed = sum(name == "place tile" for name, *_ in timeline.spans())
    assert placed == streamer.tiles_loaded
    names = {name for name, *_ in timeline.spans()}
    assert names >= {"read", "place tile", "embed", PASS, MEMORY, "sample", "detokenize"}


class _Slow:
    """A backend that makes the streamer's readers wait before each read, once told to."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.gate = threading.Event()
        self.gate.set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def read_into(self, *arguments: Any) -> None:
        if threading.current_thread().name.startswith("edgert-stream"):
            self.gate.wait()
        self._backend.read_into(*arguments)


def test_a_wait_for_weights_lasts_until_they_are_there(tiny_gguf: Path) -> None:
    """Reads are held back while a pass waits for them: then its threads wait until then."""
    from edgert.storage.backend import FileBackend

    timeline, made = Timeline(), []

    def slow(paths: Any) -> Any:
        made.append(_Slow(FileBackend(paths)))
        return made[0]

    with tight(tiny_gguf, timeline=timeline, backend=slow) as engine:
        engine.logits([1])
        made[0].gate.clear()
        worker = threading.Thread(target=lambda: [engine.logits([1]) for _ in range(3)])
        worker.start()
        time.sleep(0.05)
        opened = _now()
        made[0].gate.set()
        worker.join()
    records = timeline.records
    streamed = timeline.op_tiles[records[:, rows.T_ROW] >> rows.T_THREAD_BITS] >= 0
    across = (records[:, rows.T_BEGIN] < opened) & (records[:, rows.T_READY] > opened)
    # Passes that found all tiles in the ring never waited; the one that did not waited here.
    assert across.any() and streamed[across].all()


def test_the_rings_keep_the_newest(tiny_gguf: Path) -> None:
    timeline = Timeline(records=256, spans=32)
    run(tiny_gguf, timeline)
    whole = Timeline()
    run(tiny_gguf, whole)
    assert timeline.dropped > 0 and whole.dropped == 0
    records, spans = timeline.records, list(timeline.spans())
    assert 0 < len(records) <= 256 and 0 < len(spans) <= 32
    last = max(records[:, rows.T_ROW] >> rows.T_THREAD_BITS)
    assert last == len(timeline.op_names) - 1
    first = timeline.begin_ns  # from here on nothing is missing in either ring
    assert min(records[:, rows.T_BEGIN].min(), min(s[2] for s in spans)) >= first
    assert len(json.loads(written(timeline))["traceEvents"]) > 0


def test_names_are_bounded() -> None:
    timeline = Timeline(records=8, spans=2048)
    for i in range(_NAMES_MAX + 50):
        timeline.add(f"span {i}", 1, 2)
    assert len(timeline.names) == _NAMES_MAX and timeline.names[-1] == "others"
    assert len(timeline.spans_of("others")) == 51


# ----------------------------------------------------------------------------- what is shown


def written(timeline: Timeline) -> bytes:
    stream = io.BytesIO()
    timeline.write(stream)
    return stream.getvalue()


def test_the_file_names_threads_ops_and_tensors(tiny_gguf: Path) -> None:
    timeline = Timeline()
    with tight(tiny_gguf, timeline=timeline) as engine:
        engine.generate("Once", max_tokens=5, temperature=0)
        slots = engine.plan.slots
    found = json.loads(written(timeline))
    assert found["otherData"] == {"dropped records": 0}
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for event in found["traceEvents"]:
        by_kind.setdefault(event["ph"], []).append(event)
    tracks = {e["args"]["name"] for e in by_kind["M"]}
    assert tracks >= {"edgert", "compute 0", "compute 1", "edgert-stream-0"}
    names = {e["name"] for e in by_kind["X"]}
    assert names >= {"blk.0.attn_q.weight", "blk.1.rmsnorm", "output.rmsnorm", "sample", "read"}
    tensors = set(edgert.read_gguf(tiny_gguf).tensors)
    for event in by_kind["X"]:
        assert event["dur"] >= 0 and event["ts"] > 0
        if event["name"] in ("read", "place tile"):
            assert event["args"]["tensor"] in tensors and event["args"]["bytes"] > 0
    levels: dict[str, list[float]] = {}
    for event in by_kind["C"]:
        for name, value in event["args"].items():
            levels.setdefault(name, []).append(value)
    ready = levels["ring slots ready"]
    assert np.median(ready) <= slots and min(ready) == 0  # more only where a thread lost its core
    assert max(levels["reads under way"]) <= 2 * 8 and levels["reads under way"][-1] == 0
    assert levels["MB"] == sorted(levels["MB"]) and levels["RSS MiB"][-1] > 0


def made_up() -> Timeline:
    """Two threads, one pass of 10 ms from 100 ms on: row 0 waits 2 ms, row 1 has a barrier."""
    timeline = Timeline(records=8, spans=8)
    timeline.op_names, timeline.op_tiles = ("a", "b"), np.array([3, -1])
    ring = timeline._ops[rows.CELL // 8 :].reshape(-1, rows.T_FIELDS)
    lines = [
        (0 << 16 | 0, 100, 102, 104, 104), (0 << 16 | 1, 100, 102, 105, 105),
        (1 << 16 | 0, 104, 104, 107, 110), (1 << 16 | 1, 105, 105, 110, 110),
    ]  # fmt: skip
    for i, (code, *times) in enumerate(lines):
        ring[i] = (code, *(t * MS for t in times))
    timeline._ops[rows.T_COUNT] = len(lines)
    timeline.add(PASS, 100 * MS, 110 * MS, 1, 5)
    for begin, end in ((90, 101), (100, 103), (106, 120)):
        timeline.add("read", begin * MS, end * MS, 0, 4096)
    return timeline


def test_shares_are_those_of_the_time() -> None:
    found = shares(made_up())
    assert found == pytest.approx({
        "passes": 1, "seconds": 0.010, "reading": 0.7, "wait": 0.2, "compute": 0.65,
        "barrier": 0.15, "between": 0.0,
    })  # fmt: skip
    assert shares(Timeline(records=8, spans=8)) == {}


def test_events_of_a_made_up_pass() -> None:
    found = [e for e in events(made_up()) if e["ph"] == "X" and e["tid"] == 0]
    shown = [(e["name"], e["ts"] / 1e3, e["dur"] / 1e3) for e in found]
    assert shown == [
        ("wait for weights", 100, 2), ("a", 102, 2), ("b", 104, 3), ("wait for threads", 107, 3),
    ]  # fmt: skip


# ----------------------------------------------------------------------------- the command line


def test_run_writes_a_trace(tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    found = command("run", tiny_gguf, "-p", "Once", "-n", 4, "--trace", path, "--json")
    assert found.returncode == 0, found.stderr
    assert "# trace.json: " in found.stderr and "passes in" in found.stderr
    assert len(json.loads(path.read_bytes())["traceEvents"]) > 50
    memory = json.loads(found.stdout)["memory"]
    assert sum(memory["held"].values()) == memory["resident_bytes"]
    assert [p.name for p in tmp_path.iterdir()] == ["trace.json"]


def test_a_run_that_fails_keeps_its_error(tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    found = inside("run", tiny_gguf, "-p", "x", "-b", "1MiB", "--trace", path)
    assert found.returncode == 5 and "error: " in found.stderr
    assert json.loads(path.read_bytes())["otherData"] == {"dropped records": 0}


def test_a_trace_that_cannot_be_written_is_refused_first(tiny_gguf: Path, tmp_path: Path) -> None:
    found = inside("run", tiny_gguf, "-p", "x", "--trace", tmp_path / "no" / "trace.json")
    assert found.returncode == 2 and "cannot be written" in found.stderr
    found = inside("bench", "--kernels", "--trace", tmp_path / "trace.json")
    assert found.returncode == 2 and "--trace records a model" in found.stderr
