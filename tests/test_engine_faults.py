"""What goes wrong while an engine works, done on purpose: failing, slow and short reads, memory
that is not granted, cancelling, closing and Ctrl-C at any moment.

After each of them the engine has said what happened, can be used again, and gives the same bits.
What could hang or end the process runs in a child (`child`).
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgert
from edgert.errors import EdgertError, StorageError
from edgert.storage.backend import FileBackend
from edgert.units import KIB
from tests.command import environment
from tests.faults import FailingArena, FaultPlan, FaultyBackend
from tests.tight import tight

TOKENS = [1, 30, 40, 50, 60, 70, 80]
GREEDY: dict[str, Any] = dict(max_tokens=3, temperature=0)


class Faulty:
    """Opens files behind a `FaultyBackend` and keeps hold of it."""

    def __init__(self, plan: FaultPlan | None = None) -> None:
        self.plan = plan
        self.closed = 0

    def __call__(self, paths: Sequence[Path]) -> FaultyBackend:
        self.opened = FaultyBackend(FileBackend(paths), self.plan)
        inner = self.opened.close

        def close() -> None:
            self.closed += 1
            inner()

        self.opened.close = close  # type: ignore[method-assign]
        return self.opened

    def fail_next(self, number: int) -> None:
        """Fail the `number`-th read from now on, and no other."""
        self.opened.plan = FaultPlan(fail={self.opened.reads + number})


class Gate(FaultyBackend):
    """Reads wait while the gate is shut. `waiting` is set when one does."""

    def __init__(self, paths: Sequence[Path]) -> None:
        super().__init__(FileBackend(paths))
        self.open = threading.Event()
        self.waiting = threading.Event()
        self.open.set()

    def read_into(self, file_index: int, offset: int, view: memoryview) -> None:
        if not self.open.is_set():
            self.waiting.set()
            assert self.open.wait(60)
        super().read_into(file_index, offset, view)


@pytest.fixture(scope="module", params=["llama", "olmoe"])
def model(request: pytest.FixtureRequest, tiny_gguf: Path, tiny_moe_gguf: Path) -> Path:
    return tiny_gguf if request.param == "llama" else tiny_moe_gguf


def answer(engine: edgert.Engine) -> tuple[tuple[int, ...], str]:
    done = engine.generate(TOKENS, **GREEDY)
    assert done.finish_reason == "length"
    return done.tokens, done.stats.logits_hash


def child(code: str, *arguments: object) -> str:
    """What a Python program prints; it must end by itself and well."""
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True, text=True, env=environment(), timeout=150,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


# ------------------------------------------------------------------------ reads


def test_every_read_that_fails_while_opening_is_named_and_lets_go(model: Path) -> None:
    sound = Faulty()
    with tight(model, 0, backend=sound):
        pass
    numbers = range(1, sound.opened.reads + 1)
    assert len(numbers) > 8
    failed = 0
    for number in itertools.chain(range(1, 12), range(12, len(numbers), 5)):
        faulty = Faulty(FaultPlan(fail_from=number))
        try:
            with tight(model, 0, backend=faulty) as engine, pytest.raises(StorageError):
                answer(engine)  # it had read all it needed; what it read ahead failed
        except StorageError as error:
            failed += 1
            assert error.path == model and error.nbytes % 4096 == 0 == error.offset % 4096
            assert f"reading {error.nbytes:,} bytes at byte {error.offset:,} failed" in str(error)
        assert faulty.closed == 1
        assert [t.name for t in threading.enumerate() if t.name.startswith("edgert-")] == []
    assert failed >= 5


def test_every_read_that_fails_while_running_is_named_and_got_over(model: Path) -> None:
    """For every n until the run needs fewer reads: fail the n-th, then the same engine again."""
    faulty = Faulty()
    with tight(model, 0, backend=faulty) as engine:
        want = answer(engine)
        for number in itertools.count(1):
            faulty.fail_next(number)
            due = faulty.opened.reads + number
            try:
                found = answer(engine)
            except StorageError as error:
                assert error.path == model and error.nbytes % 4096 == 0 == error.offset % 4096
            else:
                assert found == want, f"read {number}"
                if faulty.opened.reads < due:
                    break
                # The read was one ahead of need: it may be the next run that is told.
                with pytest.raises(StorageError):
                    answer(engine)
            assert answer(engine) == want, f"after the failure of read {number}"
        assert number > 20


def test_an_engine_that_failed_can_be_closed_and_opened_again(model: Path) -> None:
    with tight(model, None) as engine:
        want = answer(engine)
    faulty = Faulty()
    with tight(model, 0, backend=faulty) as engine:
        faulty.opened.plan = FaultPlan(fail_from=0)
        for _ in range(2):
            with pytest.raises(StorageError):
                answer(engine)
    assert faulty.closed == 1
    with tight(model, 0) as engine:
        assert answer(engine) == want


@pytest.mark.parametrize("seed", [1, 2])
def test_reads_that_lag_change_no_bit(model: Path, seed: int) -> None:
    with tight(model, None) as engine:
        want = answer(engine)
    delays = np.random.default_rng(seed).choice([0.0, 0.0, 0.001, 0.004], 997)
    faulty = Faulty(FaultPlan(delay_s=lambda number: float(delays[number % 997])))
    with tight(model, 100 * KIB, backend=faulty) as engine:
        assert answer(engine) == want
        assert engine.last_stats is not None and engine.last_stats.stall_share > 0


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="no positioned reads on this system")
def test_reads_that_are_short_change_no_bit(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tight(model, None) as engine:
        want = answer(engine)
    whole, lengths, cut = os.preadv, itertools.cycle([4096, 12288, 5000, 2**30]), []

    def short(fd: int, views: list[memoryview], offset: int) -> int:
        length = next(lengths)
        view = memoryview(views[0]).cast("B")
        if len(view) > length >= 4096 and length % 4096 == 0:
            cut.append(length)
            return whole(fd, [view[:length]], offset)
        return whole(fd, [view], offset)

    monkeypatch.setattr(os, "preadv", short)
    with tight(model, 0) as engine:
        assert answer(engine) == want
    assert len(cut) > 10


def test_a_file_that_is_cut_while_in_use_is_named(tiny_gguf: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(tiny_gguf, tmp_path / "cut.gguf"))
    with tight(path, 0) as engine:
        want = answer(engine)
        whole = path.read_bytes()
        os.truncate(path, 4096)
        with pytest.raises(StorageError, match="the file ended near byte"):
            for _ in range(3):
                answer(engine)
        path.write_bytes(whole)
        assert answer(engine) == want


def test_every_piece_of_memory_that_is_not_granted_lets_go_of_the_rest(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in itertools.count(1):
        faulty = Faulty()
        arenas: list[FailingArena] = []

        def arena(
            nbytes: int, number: int = number, arenas: list[FailingArena] = arenas
        ) -> FailingArena:
            arenas.append(FailingArena(nbytes, number))
            return arenas[-1]

        monkeypatch.setattr("edgert.engine.Arena", arena)
        try:
            with tight(model, 0, backend=faulty):
                break
        except EdgertError as error:
            assert "the system does not grant memory for" in str(error)
        assert faulty.closed == 1, f"the files stay open when take {number} fails"
        assert [t.name for t in threading.enumerate() if t.name.startswith("edgert-")] == []
    assert number > 10


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
        if model.name.startswith("llama"):
            thread.join(60)  # while no read can end
        gate.open.set()
        thread.join(60)
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


OPEN = """
import sys, threading
from pathlib import Path
from edgert.errors import EdgertError
from tests.tight import tight
path, tokens = Path(sys.argv[1]), [1, 30, 40, 50, 60, 70, 80]
"""


def test_close_while_another_thread_generates_ends_it(model: Path) -> None:
    code = OPEN + """
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
    assert child(code, model) == "done\n"


def test_a_generation_that_goes_on_after_close_is_told(model: Path) -> None:
    code = OPEN + """
import os
threading.Timer(60, os._exit, [3]).start()
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
    told = {"the engine is closed; load the model again", "['cancelled']"}
    lines = child(code, model).splitlines()
    assert len(lines) == 2 and set(lines) <= told


# ------------------------------------------------------------------------ Ctrl-C


def test_ctrl_c_during_a_pass_ends_it_and_the_engine_goes_on(model: Path) -> None:
    """A real signal while the main thread waits for weights that never come."""
    code = OPEN + """
import os, signal
from tests.test_engine_faults import Gate, answer
gates = []
def backend(paths):
    gates.append(Gate(paths))
    return gates[0]
with tight(path, 0, backend=backend) as engine:
    want, gate = answer(engine), gates[0]
    def interrupt():
        assert gate.waiting.wait(60)
        os.kill(os.getpid(), signal.SIGINT)
        threading.Timer(0.5, gate.open.set).start()
    for turn in range(3):
        gate.waiting.clear()
        gate.open.clear()
        threading.Thread(target=interrupt).start()
        try:
            answer(engine)
            print("not interrupted")
        except KeyboardInterrupt:
            pass
        assert answer(engine) == want
print("done")
"""
    assert child(code, model) == "done\n"


def test_ctrl_c_at_any_line_leaves_a_sound_engine(model: Path) -> None:
    """KeyboardInterrupt at the n-th line run in forward.py, threads.py and session.py, for all n.

    The interrupt comes from a trace function, where the interpreter itself would raise it.
    """
    code = OPEN + """
import os
from tests.test_engine_faults import answer
FILES = ("forward.py", "threads.py", "session.py")
os.environ.clear()
def interrupted_at(number, call):
    count = 0
    where = None
    def trace(frame, event, arg):
        nonlocal count, where
        if not frame.f_code.co_filename.endswith(FILES):
            return None
        if event == "line":
            count += 1
            if count == number:
                where = f"{frame.f_code.co_filename.rsplit('/', 1)[1]}:{frame.f_lineno}"
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
with tight(path, int(sys.argv[2]) or None, prefill_tokens=4) as engine:
    want = answer(engine)
    number, bad = 1, []
    while True:
        where = interrupted_at(number, lambda: answer(engine))
        if where is None:
            break
        timer = threading.Timer(20, lambda: (print("hangs after", where, flush=True), os._exit(0)))
        timer.start()
        if answer(engine) != want:
            print("wrong after", where, flush=True)
            os._exit(0)
        timer.cancel()
        number += 1
assert number > 100, number
print("done")
"""
    spare = 1 if model.name.startswith("llama") else 200 * KIB
    assert child(code, model, spare) == "done\n"


# ------------------------------------------------------------------------ memory from outside


def test_the_peak_of_a_process_stays_below_its_budget(model: Path) -> None:
    code = OPEN + """
import edgert
from edgert.errors import BudgetError
try:
    edgert.load(path, memory_budget=1, threads=2)
except BudgetError as error:
    need = error.need_bytes
budget = -(-need // 2**20) * 2**20
with edgert.load(path, memory_budget=budget, threads=2) as engine:
    engine.generate(tokens, max_tokens=30)
    report = engine.memory()
    print(engine.plan.total_bytes, report.resident_bytes, report.peak_bytes, report.budget_bytes)
"""
    planned, resident, peak, budget = map(int, child(code, model).split())
    assert planned <= budget and resident <= peak <= budget < 512 * 2**20
