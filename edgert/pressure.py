"""Following memory pressure: a budget that shrinks when others need memory and grows back later.

Owns: the policy, which is pure, and a thread that reads, asks the policy and sets the budget. Must
not know how a budget is kept (engine.py).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgert.errors import BudgetError, EdgertError
from edgert.machine import high_events, memory_domains, memory_stall_seconds
from edgert.units import MIB

if TYPE_CHECKING:
    from edgert.engine import Engine

__all__ = ["PressureGauge", "Reading", "Standing", "follow_pressure", "next_standing"]

_LOG = logging.getLogger(__name__)

PERIOD_SECONDS = 0.1  # between two readings: all eight steps down take less than a second
STALLED_SHARE = 0.10  # of the time, some program waited for memory
CALM_SECONDS = 10.0  # without pressure before a budget grows, and between two steps of growth
STEPS = 8  # from the given budget down to the floor
# Less free memory than this is pressure: 1/20 of a machine's or group's, at most 512 MiB. It has to
# outlast what another program takes between two readings: with 1/64 of a group of 1.2 GiB, 40 MiB
# taken at once were too much.
RESERVE_PART = 20
RESERVE_MOST = 512 * MIB


@dataclass(frozen=True, slots=True)
class Reading:
    """What the machine says, where memory is tightest."""

    seconds: float  # on a clock that only goes forward
    stalled: float  # share of the time since the reading before that some program lacked memory
    squeezed: bool  # the group went over its `memory.high` since the reading before
    free_bytes: int  # that could still be had
    reserve_bytes: int  # that should stay free


@dataclass(frozen=True, slots=True)
class Standing:
    """Where the policy stands: the budget, and since when nothing happened."""

    budget_bytes: int
    quiet_since: float  # seconds: of the last pressure, or the last growth


def next_standing(now: Standing, reading: Reading, floor: int, ceiling: int) -> Standing:
    """The budget that is wanted after a reading, between `floor` and `ceiling` bytes. Pure.

    Under pressure it falls at each reading by an eighth of the way, or by what is missing where
    that is more. It grows by as much at a time, after calm, and only into memory that leaves twice
    the reserve: what it grows by is not missing a moment later.
    """
    step = max(ceiling - floor, 0) // STEPS
    missing = reading.reserve_bytes - reading.free_bytes
    if reading.stalled > STALLED_SHARE or reading.squeezed or missing > 0:
        lower = max(floor, now.budget_bytes - max(step, missing))
        return Standing(min(lower, now.budget_bytes), reading.seconds)
    more = min(step, reading.free_bytes - 2 * reading.reserve_bytes, ceiling - now.budget_bytes)
    calm = reading.seconds - now.quiet_since >= CALM_SECONDS
    # Small steps only at the end: each costs the streamed tiles that were read ahead.
    worth = more >= step // 4 or now.budget_bytes + more == ceiling
    if calm and more > 0 and worth:
        return Standing(now.budget_bytes + more, reading.seconds)
    return now


class PressureGauge:
    """Makes readings; each tells what happened since the one before."""

    def __init__(self) -> None:
        self._seconds = time.monotonic()
        self._stall = memory_stall_seconds()
        self._high = high_events()

    def read(self) -> Reading:
        """What the machine says now."""
        seconds, stall, high = time.monotonic(), memory_stall_seconds(), high_events()
        domains = (
            (free, min(total // RESERVE_PART, RESERVE_MOST)) for free, total in memory_domains()
        )
        free, reserve = min(domains, key=lambda domain: domain[0] - domain[1])
        stalled = (stall - self._stall) / max(seconds - self._seconds, 1e-3)
        squeezed = high > self._high
        self._seconds, self._stall, self._high = seconds, stall, high
        return Reading(seconds, stalled, squeezed, free, reserve)


@contextmanager
def follow_pressure(
    engine: Engine,
    read: Callable[[], Reading] | None = None,
    wait: Callable[[float], bool] | None = None,
) -> Iterator[None]:
    """Within it, the engine's budget follows memory pressure, up to what it is at the beginning.

    Pressure is what Linux reports (PSI, or `memory.high` events of the cgroup), and too little free
    memory of the machine or of a limited cgroup. A budget set by another caller meanwhile is the
    new most. `read` makes the readings; `wait(seconds)` is true when it is time to end: both are
    for tests. Raises `EdgertError` on a system where budgets cannot change.
    """
    end = threading.Event()
    floor = engine.smallest_budget()
    watcher = threading.Thread(
        target=_watch, args=(engine, floor, read or PressureGauge().read, wait or end.wait),
        name="edgert-pressure", daemon=True,
    )  # fmt: skip
    watcher.start()
    try:
        yield
    finally:
        end.set()
        watcher.join()


def _watch(
    engine: Engine, floor: int, read: Callable[[], Reading], wait: Callable[[float], bool]
) -> None:
    seen, ceiling = engine.plan.budget_bytes, engine.plan.total_bytes
    standing = Standing(ceiling, time.monotonic())
    while not wait(PERIOD_SECONDS):
        if engine.plan.budget_bytes != seen:  # somebody else has set it
            seen, ceiling = engine.plan.budget_bytes, engine.plan.total_bytes
            standing = replace(standing, budget_bytes=ceiling)
        wanted = next_standing(standing, read(), floor, ceiling)
        try:
            if wanted.budget_bytes != standing.budget_bytes:
                seen = engine.set_memory_budget(wanted.budget_bytes).budget_bytes
                _LOG.info("memory budget %.1f MiB", seen / MIB)
            standing = wanted
        except BudgetError as error:  # another engine has grown
            floor = min(error.need_bytes, standing.budget_bytes)
        except EdgertError as error:  # closed, or a read failed: as it was, and tried again
            _LOG.info("%s", error)
            standing = replace(wanted, budget_bytes=standing.budget_bytes)
