"""Ending what an engine does: cancelling, closing and Ctrl-C, at any moment and from any thread.

Afterwards the engine is either closed or gives the same bits as before. What could hang or end the
process runs in a child.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from edgert.units import KIB
from tests.test_engine_faults import GREEDY, TOKENS, Gate, answer, child
from tests.tight import tight


@pytest.fixture(scope="module", params=["llama", "olmoe"])
def model(request: pytest.FixtureRequest, tiny_gguf: Path, tiny_moe_gguf: Path) -> Path:
    return tiny_gguf if request.param == "llama" else tiny_moe_gguf


OPEN = """
import sys, threading
from pathlib import Path
from edgert.errors import EdgertError
from tests.tight import tight
path, tokens = Path(sys.argv[1]), [1, 30, 40, 50, 60, 70, 80]
"""


# ------------------------------------------------------------------------ cancelling


def test_cancel_ends_a_wait_for_weights_that_never_come(model: Path) -> None:
    with tight(model, None) as engine:
        want = answer(engine)
    gates: list[Gate] = []

    def backend(paths: Sequence[Path]) -> Gate:
        gates.append(Gate(paths))
        return gates[-1]

    with tight(model, 0, backend=backend) as engine:
        gate, session = gates[0], engine.session()
        gate.open.clear()
        events: list[Any] = []

        def run() -> None:
            events.extend(session.generate(TOKENS, engine.options(**GREEDY)))

        thread = threading.Thread(target=run)
        thread.start()
        assert gate.waiting.wait(60)
        session.cancel()
        thread.join(60)  # while no read can end
        assert not thread.is_alive(), "it waits for the read"
        gate.open.set()
        assert [e.finish_reason for e in events] == ["cancelled"]
        assert engine.last_stats is not None and engine.last_stats.generated_tokens == 0
        assert answer(engine) == want


def test_cancel_in_mid_prefill_ends_it_within_the_pass(model: Path) -> None:
    """Passes of one token; called in the third, no fifth begins."""
    with tight(model, 0, prefill_tokens=1) as engine:
        want = answer(engine)
        session, seen = engine.session(), []

        def progress(done: int, total: int) -> None:
            seen.append((done, total))
            if done == 3:
                thread = threading.Thread(target=session.cancel)
                thread.start()
                thread.join()

        tokens = [2 + i for i in range(50)]
        options = engine.options(on_prefill=progress, **GREEDY)
        events = list(session.generate(tokens, options))
        assert [(e.token, e.finish_reason) for e in events] == [(None, "cancelled")]
        assert seen == [(1, 50), (2, 50), (3, 50)]
        assert answer(engine) == want


def test_cancel_in_mid_decode_ends_with_the_token_so_far(model: Path) -> None:
    with tight(model, 0) as engine:
        want = answer(engine)
        session = engine.session()
        events = session.generate(TOKENS, engine.options(max_tokens=100, temperature=0))
        found = [next(events)]
        session.cancel()
        found += list(events)
        assert [e.finish_reason for e in found] == [None, "cancelled"]
        assert session.tokens[:-1] == TOKENS and session.tokens[-1] == found[0].token
        assert answer(engine) == want


def test_cancel_that_comes_while_a_pass_is_about_to_start_stops_that_pass(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tight(tiny_gguf, None, prefill_tokens=1) as engine:
        want = answer(engine)
        team = engine._team
        run, session = team.run, engine.session()

        def run_cancelled(program: Any) -> None:
            session.cancel()
            run(program)

        monkeypatch.setattr(team, "run", run_cancelled)
        before = engine.forward.stats.passes
        events = list(session.generate([5, 6, 7], engine.options(**GREEDY)))
        assert [e.finish_reason for e in events] == ["cancelled"]
        assert engine.forward.stats.passes == before, "a whole pass ran after cancel()"
        monkeypatch.undo()
        assert answer(engine) == want


class NoticedLock:
    """A lock that sets `wanted` when somebody comes for it."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.wanted = threading.Event()

    def __enter__(self) -> None:
        self.wanted.set()
        self.inner.acquire()

    def __exit__(self, *_: object) -> None:
        self.inner.release()


def test_cancel_of_one_session_leaves_the_others_alone(tiny_gguf: Path) -> None:
    """One session is in a pass, another waits for its turn and is cancelled."""
    gates: list[Gate] = []

    def backend(paths: Sequence[Path]) -> Gate:
        gates.append(Gate(paths))
        return gates[-1]

    with tight(tiny_gguf, 0, backend=backend) as engine:
        gate, options = gates[0], engine.options(**GREEDY)
        working, waiting = engine.session(), engine.session()
        found: dict[str, list[Any]] = {}

        def run(name: str, session: Any) -> None:
            found[name] = list(session.generate(TOKENS, options))

        gate.open.clear()
        first = threading.Thread(target=run, args=("working", working))
        first.start()
        assert gate.waiting.wait(60)
        engine.forward.lock = lock = NoticedLock(engine.forward.lock)  # type: ignore[assignment]
        second = threading.Thread(target=run, args=("waiting", waiting))
        second.start()
        assert lock.wanted.wait(60)
        waiting.cancel()
        gate.open.set()
        first.join(60)
        second.join(60)
    assert [e.finish_reason for e in found["working"]] == [None, None, "length"]
    assert found["waiting"][-1].finish_reason == "cancelled"


def test_a_generator_that_is_closed_early_ends_its_generation(model: Path) -> None:
    with tight(model, 0) as engine:
        want = answer(engine)
        events = engine.generate(TOKENS, stream=True, max_tokens=50, temperature=0)
        assert next(events).token == want[0][0]
        events.close()  # type: ignore[attr-defined]
        assert engine.last_stats is not None and engine.last_stats.generated_tokens == 1
        assert list(events) == []
        assert answer(engine) == want


# ------------------------------------------------------------------------ closing


def test_close_while_another_thread_generates_ends_it(model: Path) -> None:
    code = (
        OPEN
        + """
for turn in range(12):
    engine = tight(path, 0 if turn % 2 else None, prefill_tokens=1)
    ended, under_way = [], threading.Event()
    def run():
        try:
            for event in engine.generate(tokens, stream=True, max_tokens=200, temperature=0,
                                         on_prefill=lambda done, total: under_way.set()):
                if event.finish_reason:
                    ended.append(event.finish_reason)
        except EdgertError as error:
            ended.append(str(error))
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert under_way.wait(60)
    engine.close()
    thread.join(60)
    assert not thread.is_alive(), "it goes on"
    assert ended in (["cancelled"], ["the engine is closed; load the model again"]), ended
print("done")
"""
    )
    assert child(code, model) == "done\n"


def test_a_generation_that_goes_on_after_close_is_told(model: Path) -> None:
    code = (
        OPEN
        + """
import os
timer = threading.Timer(60, os._exit, [3])
timer.daemon = True
timer.start()
engine = tight(path, 0)
events = engine.generate(tokens, stream=True, max_tokens=50)
session = engine.session()
next(events)
engine.close()
for later in (events, session.generate(tokens, engine.options(max_tokens=3))):
    try:
        print([event.finish_reason for event in later], flush=True)
    except EdgertError as error:
        print(error, flush=True)
os._exit(0)
"""
    )
    told = {"the engine is closed; load the model again", "['cancelled']"}
    lines = child(code, model).splitlines()
    assert len(lines) == 2 and set(lines) <= told


# ------------------------------------------------------------------------ Ctrl-C


def test_ctrl_c_during_a_pass_ends_it_and_the_engine_goes_on(model: Path) -> None:
    """A real signal while the main thread waits for weights that never come."""
    code = (
        OPEN
        + """
import os, signal, time
from tests.test_engine_faults import Gate, answer
gates = []
def backend(paths):
    gates.append(Gate(paths))
    return gates[0]
with tight(path, 0, backend=backend) as engine:
    want, gate = answer(engine), gates[0]
    def interrupt():
        assert gate.waiting.wait(60)
        time.sleep(0.2)  # a read ahead may wait before the pass does
        os.kill(os.getpid(), signal.SIGINT)
        threading.Timer(0.5, gate.open.set).start()
    for turn in range(3):
        gate.waiting.clear()
        gate.open.clear()
        try:
            threading.Thread(target=interrupt).start()
            answer(engine)
            print("not interrupted")
        except KeyboardInterrupt:
            pass
        assert answer(engine) == want
print("done")
"""
    )
    assert child(code, model) == "done\n"


def test_ctrl_c_at_any_line_leaves_a_sound_engine(model: Path) -> None:
    """KeyboardInterrupt at every line of forward.py, threads.py and session.py that runs.

    Each line is interrupted the first and the last time it runs. The interrupt comes
    from a trace function, where the interpreter itself would raise it.
    """
    code = (
        OPEN
        + """
import os
from edgert.storage.backend import MemoryBackend
from tests.test_engine_faults import answer
FILES = ("forward.py", "threads.py", "session.py")
os.environ.clear()
def interrupted_at(number, call, seen):
    where = None
    def trace(frame, event, arg):
        nonlocal where
        if not frame.f_code.co_filename.endswith(FILES):
            return None
        if event == "line":
            seen.append(f"{frame.f_code.co_filename.rsplit('/', 1)[1]}:{frame.f_lineno}")
            if len(seen) - 1 == number:
                where = seen[-1]
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return where
    finally:
        sys.settrace(None)
    return where
def backend(paths):  # in memory: each interruption reads the model anew
    return MemoryBackend([path.read_bytes()], 4096)
with tight(path, int(sys.argv[2]), prefill_tokens=4, backend=backend) as engine:
    want = answer(engine)
    lines = []
    interrupted_at(-1, lambda: answer(engine), lines)
    times = {}
    for number, line in enumerate(lines):
        times.setdefault(line, []).append(number)
    numbers = sorted({n for all in times.values() for n in (all[0], all[-1])})
    for number in numbers:
        where = interrupted_at(number, lambda: answer(engine), [])
        timer = threading.Timer(20, lambda: (print("hangs after", where, flush=True), os._exit(0)))
        timer.start()
        if answer(engine) != want:
            print("wrong after", where, flush=True)
            os._exit(0)
        timer.cancel()
assert len(times) > 60 and len(numbers) > 100, (len(times), len(numbers))
print("done")
"""
    )
    spare = 0 if model.name.startswith("llama") else 200 * KIB
    assert child(code, model, spare) == "done\n"
