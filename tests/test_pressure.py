"""Following memory pressure: the policy against a made-up machine, and the thread that asks it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgert import machine
from edgert.errors import BudgetError, StorageError
from edgert.pressure import PressureGauge, Reading, Standing, follow_pressure, next_standing
from edgert.units import MIB
from tests.tight import tight

FLOOR, CEILING = 200 * MIB, 1000 * MIB
STEP = (CEILING - FLOOR) // 8


def reading(seconds: float = 0.0, free: int = 2000, **changes: Any) -> Reading:
    """A machine with 100 MiB in reserve and `free` MiB to be had."""
    values = {"stalled": 0.0, "squeezed": False, "reserve_bytes": 100 * MIB} | changes
    return Reading(seconds=seconds, free_bytes=free * MIB, **values)


def after(now: Standing, found: Reading) -> Standing:
    return next_standing(now, found, FLOOR, CEILING)


@pytest.mark.parametrize(
    "found",
    [reading(7.0, stalled=0.2), reading(7.0, squeezed=True), reading(7.0, free=99)],
    ids=["stalled", "squeezed", "little free"],
)
def test_pressure_takes_an_eighth_at_each_reading(found: Reading) -> None:
    now = after(Standing(CEILING, 0.0), found)
    assert now == Standing(CEILING - STEP, 7.0)
    for _ in range(20):
        now = after(now, found)
    assert now.budget_bytes == FLOOR


def test_more_goes_where_more_is_missing() -> None:
    assert after(Standing(CEILING, 0.0), reading(free=-300)).budget_bytes == CEILING - 400 * MIB
    assert after(Standing(CEILING, 0.0), reading(free=-3000)).budget_bytes == FLOOR


def test_a_budget_grows_back_slowly() -> None:
    now, budgets = Standing(FLOOR, 0.0), []
    for quarter in range(1, 1000):
        later = after(now, reading(quarter / 4))
        if later != now:
            assert later.quiet_since - now.quiet_since == 10.0
            budgets.append(later.budget_bytes)
        now = later
    assert budgets == [FLOOR + STEP * i for i in range(1, 9)]


def test_it_grows_only_into_what_is_free() -> None:
    start = Standing(FLOOR, 0.0)
    assert after(start, reading(99.0, free=260)) == Standing(FLOOR + 60 * MIB, 99.0)
    assert after(start, reading(99.0, free=224)) == start, "not worth a change"
    nearly = Standing(CEILING - 5 * MIB, 0.0)
    assert after(nearly, reading(99.0, free=205)).budget_bytes == CEILING, "but the last step is"
    assert after(start, reading(99.0, free=150)) == start


@given(st.lists(st.tuples(st.integers(0, 3000), st.floats(0, 1)), max_size=60))
def test_it_stays_between_its_ends(found: list[tuple[int, float]]) -> None:
    now = Standing(CEILING, 0.0)
    for second, (free, stalled) in enumerate(found):
        now = after(now, reading(second * 5.0, free=free, stalled=stalled))
        assert FLOOR <= now.budget_bytes <= CEILING


def test_it_does_not_swing() -> None:
    """Nobody else changes anything: after it has given memory back, it does not take it again."""
    for used_by_others in range(0, 1200 * MIB, 7 * MIB):
        now, budgets = Standing(CEILING, 0.0), []
        for second in range(200):
            free = 1200 * MIB - used_by_others - now.budget_bytes
            now = after(now, reading(float(second), free=free // MIB))
            budgets.append(now.budget_bytes)
        assert len(set(budgets[60:])) == 1, (used_by_others, budgets)


# ----------------------------------------------------------------------------- the thread


class Script:
    """Readings one after the other; `wait` ends the thread when there are none left."""

    def __init__(self, *readings: Reading) -> None:
        self.readings = list(readings)
        self.done = threading.Event()

    def read(self) -> Reading:
        return self.readings.pop(0)

    def wait(self, _seconds: float) -> bool:
        if not self.readings:
            self.done.set()
        return self.done.is_set()


def follow(engine: Any, *readings: Reading) -> None:
    script = Script(*readings)
    with follow_pressure(engine, script.read, script.wait):
        assert script.done.wait(60)


def test_an_engine_follows(tiny_gguf: Path) -> None:
    with tight(tiny_gguf, None) as engine:
        ceiling, floor = engine.plan.total_bytes, engine.smallest_budget()
        engine.set_memory_budget(ceiling)
        tokens = engine.generate([1, 30, 40], max_tokens=6, temperature=0).tokens
        engine.set_memory_budget("1TiB")  # more than it can use: what it holds is the most
        follow(engine, reading(stalled=1.0))
        assert engine.plan.budget_bytes == ceiling - (ceiling - floor) // 8
        assert engine.generate([1, 30, 40], max_tokens=6, temperature=0).tokens == tokens
        engine.set_memory_budget(ceiling)
        # Ten times pressure, then an hour of calm in steps of a minute.
        calm = [reading(1e9 + 60.0 * i) for i in range(60)]
        follow(engine, *[reading(stalled=1.0)] * 10)
        assert engine.plan.budget_bytes == floor
        engine.set_memory_budget(ceiling)
        follow(engine, *[reading(stalled=1.0)] * 10, *calm)
        assert engine.plan.budget_bytes == ceiling
        assert engine.generate([1, 30, 40], max_tokens=6, temperature=0).tokens == tokens


class Stub:
    """An engine whose budgets are only written down; errors are raised once each."""

    def __init__(self, *errors: Exception) -> None:
        self.plan = self
        self.budget_bytes = CEILING
        self.errors = list(errors)
        self.asked: list[int] = []

    @property
    def total_bytes(self) -> int:
        return self.budget_bytes

    def smallest_budget(self) -> int:
        return FLOOR

    def set_memory_budget(self, nbytes: int) -> Stub:
        self.asked.append(nbytes)
        if self.errors:
            raise self.errors.pop(0)
        self.budget_bytes = nbytes
        return self


def test_a_change_that_fails_is_tried_again() -> None:
    engine = Stub(StorageError("model.gguf", 0, 1, "Input/output error"))
    follow(engine, *[reading(stalled=1.0)] * 3)
    assert engine.asked == [CEILING - STEP, CEILING - STEP, CEILING - 2 * STEP]


def test_a_floor_that_has_risen_is_learnt() -> None:
    engine = Stub(BudgetError(1, CEILING - MIB))
    follow(engine, *[reading(stalled=1.0)] * 4)
    assert engine.asked[0] == CEILING - STEP and len(engine.asked) == 4
    assert all(CEILING - MIB <= asked < CEILING for asked in engine.asked[1:])


def test_a_budget_set_by_another_is_the_new_most() -> None:
    engine = Stub()
    script = Script(*[reading(1e9 + 60.0 * i) for i in range(20)])

    def read() -> Reading:
        if len(script.readings) == 15:
            engine.budget_bytes = 500 * MIB
        return script.read()

    with follow_pressure(engine, read, script.wait):  # type: ignore[arg-type]
        assert script.done.wait(60)
    assert engine.budget_bytes == 500 * MIB and engine.asked == []


def test_the_thread_ends_with_the_block() -> None:
    with follow_pressure(Stub()):  # type: ignore[arg-type]
        assert any(t.name == "edgert-pressure" for t in threading.enumerate())
    assert not any(t.name == "edgert-pressure" for t in threading.enumerate())


# ----------------------------------------------------------------------------- what is read


def test_a_group_of_version_2_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_cgroup_paths", lambda _controller: [tmp_path])
    files = {
        "memory.max": f"{640 * MIB}",
        "memory.current": f"{635 * MIB}",
        "memory.stat": f"inactive_file {2 * MIB}\n",
        "memory.events": "low 0\nhigh 3\nmax 0\n",
        "memory.pressure": "some avg10=0.00 avg60=0.00 avg300=0.00 total=1000000\nfull total=0\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert machine.memory_domains()[1:] == [(7 * MIB, 640 * MIB)]
    assert machine.memory_stall_seconds() == 1.0 and machine.high_events() == 3
    gauge = PressureGauge()
    found = gauge.read()
    assert (found.free_bytes, found.reserve_bytes) == (7 * MIB, 32 * MIB)
    assert (found.stalled, found.squeezed) == (0.0, False)
    (tmp_path / "memory.events").write_text("high 4\n")
    (tmp_path / "memory.pressure").write_text("some total=9000000\n")
    found = gauge.read()
    assert found.squeezed and found.stalled > 0


def test_a_machine_that_says_nothing_has_no_pressure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_cgroup_paths", lambda _controller: [])
    monkeypatch.setattr(Path, "read_text", lambda *_: (_ for _ in ()).throw(OSError()))
    assert machine.memory_stall_seconds() == 0.0 and machine.high_events() == 0
