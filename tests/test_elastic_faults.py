"""Budgets that cannot be, and changes of a budget that fail half-way."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import edgert
from edgert.engine import Engine
from edgert.errors import BudgetError, EdgertError, InputError, StorageError
from edgert.storage.arena import Arena
from edgert.storage.backend import Backend, FileBackend
from edgert.units import KIB
from tests.answers import answer, expected, range_of
from tests.faults import FaultPlan, FaultyBackend
from tests.tight import fixed_process, tight

# ----------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (0, "memory_budget is 0; it must be between 1 and"),
        (-5, "memory_budget is -5"),
        ("", "is not a size"),
        ("abc", "'abc' is not a size; write one like 1.5GiB"),
        ("0%", "a share is above 0%"),
        ("120%", "at most 100%"),
        (1.5, "must be a whole number"),
    ],
)
def test_nonsense_is_refused(tiny_gguf: Path, budget: Any, words: str) -> None:
    with tight(tiny_gguf, 0) as engine:
        plan = engine.plan
        with pytest.raises(InputError) as info:
            engine.set_memory_budget(budget)
        assert words in str(info.value)
        assert engine.plan is plan and answer(engine) == expected(tiny_gguf)[1]


def test_a_budget_below_the_floor_names_the_smallest(tiny_gguf: Path) -> None:
    with tight(tiny_gguf, None) as engine:
        plan = engine.plan
        for budget in ("1MiB", "0.001%", engine.smallest_budget() - 1):
            with pytest.raises(BudgetError, match="loaded again has it") as info:
                engine.set_memory_budget(budget)
            assert info.value.need_bytes == engine.smallest_budget()
        assert engine.plan is plan
        engine.set_memory_budget(info.value.need_bytes)
        assert engine.set_memory_budget("100%").streamed_bytes == 0


def test_a_budget_above_the_cgroup_is_warned_of_and_cut(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with tight(tiny_gguf, 0) as engine:
        limit = engine.smallest_budget() + 100 * KIB
        monkeypatch.setattr("edgert.budget.cgroup_limit_bytes", lambda: limit)
        with caplog.at_level(logging.WARNING):
            assert engine.set_memory_budget("2GiB").budget_bytes == limit
            assert engine.set_memory_budget(limit).budget_bytes == limit
            with fixed_process(), edgert.load(tiny_gguf, memory_budget="2GiB") as other:
                assert other.plan.budget_bytes == limit
    assert len(caplog.messages) == 2
    for message in caplog.messages:
        assert "MiB counts, not the budget of 2048.0 MiB" in message


def test_a_closed_engine_has_no_budget(tiny_gguf: Path) -> None:
    engine = tight(tiny_gguf, 0)
    engine.close()
    with pytest.raises(EdgertError, match="the engine is closed"):
        engine.set_memory_budget("100%")


def test_without_spare_addresses_the_budget_stays(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def arena(nbytes: int, spare: int = 0) -> Arena:
        if spare:
            raise EdgertError("no addresses")
        return Arena(nbytes)

    monkeypatch.setattr("edgert.elastic_arena.Arena", arena)
    with tight(tiny_gguf, 200 * KIB) as engine:
        assert answer(engine) == expected(tiny_gguf)[1]
        with pytest.raises(EdgertError, match="no addresses for a budget that changes"):
            engine.set_memory_budget("100%")


# ----------------------------------------------------------------------------- failures


class Hooked(FileBackend):
    """Files that call `on_read` before each read."""

    on_read: Callable[[], None] = staticmethod(lambda: None)

    def read_into(self, file_index: int, offset: int, view: memoryview) -> None:
        self.on_read()
        super().read_into(file_index, offset, view)


@pytest.fixture
def hooked(tiny_gguf: Path) -> Iterator[tuple[Engine, Hooked]]:
    opened: list[Hooked] = []

    def backend(paths: Sequence[Path]) -> Backend:
        opened.append(Hooked(paths))
        return opened[-1]

    with tight(tiny_gguf, 0, backend=backend) as engine:
        yield engine, opened[0]


def test_a_read_that_fails_while_growing_leaves_the_old_budget(tiny_gguf: Path) -> None:
    faulty: list[FaultyBackend] = []

    def backend(paths: Sequence[Path]) -> Backend:
        faulty.append(FaultyBackend(FileBackend(paths)))
        return faulty[-1]

    with tight(tiny_gguf, 0, backend=backend) as engine:
        low, high = range_of(engine)
        want, plan, used = expected(tiny_gguf)[1], engine.plan, engine._arena.used_bytes
        assert answer(engine) == want
        for later in (1, 2, 5):
            faulty[0].plan = FaultPlan(fail_from=faulty[0].reads + later)
            with pytest.raises(StorageError, match="Input/output error"):
                engine.set_memory_budget(high)
            faulty[0].plan = FaultPlan()
            assert engine.plan is plan and engine._arena.used_bytes == used
            assert answer(engine) == want
        assert engine.set_memory_budget(high).streamed_bytes == 0
        assert answer(engine) == want
        engine.set_memory_budget(low)
        assert answer(engine) == want


@pytest.mark.skipif(sys.platform == "win32", reason="signals are a POSIX thing")
def test_ctrl_c_while_growing_ends_the_reading(hooked: tuple[Engine, Hooked]) -> None:
    engine, files = hooked
    sent: list[int] = []

    def on_read() -> None:
        if not sent:
            sent.append(1)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.02)

    want, plan = expected(engine.path)[1], engine.plan
    files.on_read = on_read
    with pytest.raises(KeyboardInterrupt):
        engine.set_memory_budget(range_of(engine)[1])
    files.on_read = lambda: None
    assert engine.plan is plan and sent == [1]
    assert answer(engine) == want


def test_close_while_growing_ends_it(hooked: tuple[Engine, Hooked]) -> None:
    engine, files = hooked
    closers: list[threading.Thread] = []

    def on_read() -> None:
        if not closers:
            closers.append(threading.Thread(target=engine.close))
            closers[0].start()
        time.sleep(0.02)

    files.on_read = on_read
    with pytest.raises(EdgertError, match="the engine is closed"):
        engine.set_memory_budget(range_of(engine)[1])
    closers[0].join(60)
    assert not closers[0].is_alive()


def test_a_ring_that_cannot_be_made_changes_nothing(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tight(tiny_gguf, None) as engine:
        plan = engine.plan

        def no_pipe() -> tuple[int, int]:
            raise OSError(24, "Too many open files")

        with monkeypatch.context() as patch:
            patch.setattr("edgert.storage.streamer.os.pipe", no_pipe)
            with pytest.raises(EdgertError, match="stays as it was: .* Too many open files"):
                engine.set_memory_budget(engine.smallest_budget())
        assert engine.plan is plan and answer(engine) == expected(tiny_gguf)[1]
