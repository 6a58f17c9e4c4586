"""What goes wrong around an engine, done on purpose: failing, slow and short reads, files that
are cut, memory that is not granted.

After each of them the engine has said what happened, can be used again, and gives the same bits.
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
    """Reads of the streamers wait while the gate is shut. `waiting` is set when one does."""

    def __init__(self, paths: Sequence[Path]) -> None:
        super().__init__(FileBackend(paths))
        self.open = threading.Event()
        self.waiting = threading.Event()
        self.open.set()

    def read_into(self, file_index: int, offset: int, view: memoryview) -> None:
        if threading.current_thread().name.startswith("edgert-") and not self.open.is_set():
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


@pytest.mark.parametrize("kind", ["fail", "fail_from"])
def test_every_read_that_fails_while_opening_is_named_and_lets_go(model: Path, kind: str) -> None:
    """The n-th read alone, or all from it on, for every third n until an answer needs fewer reads.

    (An engine is opened for each: every n takes 120 s.)
    """
    with tight(model, 0) as engine:
        want = answer(engine)
    failed = 0
    for number in itertools.count(1, 3):
        faulty = Faulty(FaultPlan(**{kind: {number} if kind == "fail" else number}))
        try:
            with tight(model, 0, backend=faulty) as engine:
                assert answer(engine) == want, f"read {number}"  # it was one ahead of need
        except StorageError as error:
            failed += 1
            assert error.path == model and error.nbytes % 4096 == 0 == error.offset % 4096
            assert f"reading {error.nbytes:,} bytes at byte {error.offset:,} failed" in str(error)
        assert faulty.closed == 1
        assert [t.name for t in threading.enumerate() if t.name.startswith("edgert-")] == []
        if faulty.opened.reads < number:
            break
    assert failed >= 10


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


def test_a_disk_that_stutters_changes_no_bit(model: Path) -> None:
    """Every 16th read takes so long that the ring runs empty."""
    with tight(model, None) as engine:
        want = answer(engine)
    faulty = Faulty(FaultPlan(delay_s=lambda number: 0.03 if number % 16 == 0 else 0.0))
    with tight(model, 0, backend=faulty) as engine:
        assert answer(engine) == want == answer(engine)


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
        path.write_bytes(whole)  # the same bytes, but who is to know
        with pytest.raises(StorageError, match="the file was written to while in use"):
            answer(engine)
    with tight(path, 0) as engine:
        assert answer(engine) == want


@pytest.mark.parametrize("where", [0.2, 0.5, 0.8])
def test_a_file_that_is_overwritten_while_in_use_gives_no_wrong_text(
    model: Path, tmp_path: Path, where: float
) -> None:
    """Same length, other bytes: an answer is right, or there is none."""
    path = Path(shutil.copy(model, tmp_path / "other.gguf"))
    with tight(path, 0) as engine:
        want = answer(engine)
        with open(path, "r+b") as file:
            file.seek(int(where * path.stat().st_size))
            file.write(bytes(4096))
        said = 0
        for _ in range(3):
            try:
                assert answer(engine) == want  # all of it was read before
            except StorageError as error:
                said += 1
                assert error.path == path and "written to while in use" in str(error)
        assert said >= 2


def test_a_file_that_is_replaced_while_in_use_stays_what_it_was(
    model: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copy(model, tmp_path / "old.gguf"))
    other = tmp_path / "new.gguf"
    other.write_bytes(bytes(path.stat().st_size))
    with tight(path, 0) as engine:
        want = answer(engine)
        os.replace(other, path)
        assert answer(engine) == want
        os.unlink(path)
        assert answer(engine) == want


def test_every_piece_of_memory_that_is_not_granted_lets_go_of_the_rest(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in itertools.count(1):
        faulty = Faulty()
        arenas: list[FailingArena] = []

        def arena(
            nbytes: int, spare: int, number: int = number, arenas: list[FailingArena] = arenas
        ) -> FailingArena:
            arenas.append(FailingArena(nbytes, number, spare))
            return arenas[-1]

        monkeypatch.setattr("edgert.elastic_arena.Arena", arena)
        try:
            with tight(model, 0, backend=faulty):
                break
        except EdgertError as error:
            assert "the system does not grant memory for" in str(error)
        assert faulty.closed == 1, f"the files stay open when take {number} fails"
        assert [t.name for t in threading.enumerate() if t.name.startswith("edgert-")] == []
    assert number > 10


OPEN = """
import sys, threading
from pathlib import Path
from edgert.errors import EdgertError
from tests.tight import tight
path, tokens = Path(sys.argv[1]), [1, 30, 40, 50, 60, 70, 80]
"""


# ------------------------------------------------------------------------ memory from outside


def test_the_peak_of_a_process_stays_below_its_budget(model: Path) -> None:
    code = (
        OPEN
        + """
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
    )
    planned, resident, peak, budget = map(int, child(code, model).split())
    assert planned <= budget and resident <= peak <= budget < 512 * 2**20
