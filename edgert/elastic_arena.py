"""The one allocation of an engine, and another memory budget for it while it is open.

Owns: addresses for other budgets, one change at a time in the process, the thread a change runs in.
Must not know what follows from a plan (engine.py) nor how it is made (elastic.py).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from edgert.elastic import Rooms, resized, rooms_of
from edgert.errors import BudgetError, CancelledError, EdgertError
from edgert.plan import Plan
from edgert.plan_parts import Need
from edgert.storage.arena import Arena, promised_bytes
from edgert.units import KIB, align_up

__all__ = ["ElasticArena", "arena_bytes"]

_changing = threading.Lock()  # one change at a time in the process: each counts the others' memory


class ElasticArena:
    """The arena of a plan, with addresses for other budgets where the system has them.

    Raises `EdgertError` when the system does not grant the memory.
    """

    def __init__(self, plan: Plan, need: Need) -> None:
        self._opened, self._need = plan, need
        self._others_bytes = promised_bytes()  # part of the plan's process
        self.rooms: Rooms | None = rooms_of(plan, need) if sys.platform != "win32" else None
        try:
            self.arena = Arena(arena_bytes(plan), self.rooms.total if self.rooms else 0)
        except EdgertError:
            if self.rooms is None:
                raise
            self.rooms, self.arena = None, Arena(arena_bytes(plan))

    def plan_for(self, nbytes: int) -> Plan:
        """The plan for another budget. Raises `BudgetError`, `EdgertError`."""
        if self.rooms is None:
            raise EdgertError(
                "the system gave no addresses for a budget that changes; load the model again"
            )
        others = promised_bytes() - self.arena.nbytes - self._others_bytes
        return resized(self._opened, self._need, nbytes, others=others)

    def smallest_budget(self) -> int:
        """The smallest budget in bytes that there is a plan for."""
        try:
            return self.plan_for(1).total_bytes
        except BudgetError as error:
            return error.need_bytes

    def change(self, nbytes: int, resize: Callable[[Plan, Callable[[], None]], None]) -> None:
        """Let `resize` carry out the plan for `nbytes`; it calls its second argument as it reads.

        It runs in a thread of its own, so that Ctrl-C never tears it: it ends the reading instead.
        """
        stop = threading.Event()

        def go_on() -> None:
            if stop.is_set():
                raise CancelledError

        with _changing, ThreadPoolExecutor(1, "edgert-resize") as worker:
            if self.arena.state == "closed":
                raise EdgertError("the engine is closed; load the model again")
            done = worker.submit(resize, self.plan_for(nbytes), go_on)
            try:
                done.result()
            except OSError as error:  # no pipe or thread for a ring
                raise EdgertError(f"the memory budget stays as it was: {error}") from error
            except BaseException:
                stop.set()
                raise


def arena_bytes(plan: Plan) -> int:
    """All regions but the process itself, and room for the alignment of each."""
    taken = plan.total_bytes - plan.region("process").nbytes
    return align_up(taken + 64 * KIB, 4096)
