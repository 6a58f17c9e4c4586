"""Experts on their way into slots, part by part: what is wanted, and what is read ahead.

Owns: the order of the parts, and what becomes of an expert that is no longer worth reading. Must
not know slots, boards or threads.

Parts that are wanted come first, always. What is read ahead is read by `READ_AHEAD` readers at
most, so that the others are free for what is asked next, and dropped as soon as a hint or a layer
says otherwise; parts under way are placed all the same, and one that is asked for after all goes on
with those it lacks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from edgert.storage.manifest import Extent

__all__ = ["READ_AHEAD", "Job", "Load", "LoadQueue"]

# Of four readers. 2 cores, 3.7 GB model at 2 and 1 GiB, disk of 1.8-2.1 GB/s: 9.6 and 5.2 tok/s
# with none, 10.6 with one, 10.8 and 5.5 with two, 9.8 and 4.9 with four.
READ_AHEAD = 2


@dataclass(frozen=True, slots=True)
class Job:
    """One part of an expert on its way."""

    load: Load
    part: int
    extent: Extent


@dataclass(slots=True, eq=False)
class Load:
    """An expert on its way into a slot."""

    key: int
    left: int  # parts that are not in the slot
    due: int  # the stamp of the layer that may want it; 0: it is wanted
    slot: int = -1  # -1: none yet
    under_way: int = 0  # parts taken and neither placed nor given back
    dropped: list[Job] = field(default_factory=list)  # parts not to be read unless wanted


class LoadQueue:
    """The loads in flight and their parts. Not thread-safe."""

    def __init__(self) -> None:
        self.loads: dict[int, Load] = {}  # by key
        self._wanted: deque[Job] = deque()
        self._ahead: deque[Job] = deque()
        self._reading_ahead: set[int] = set()

    @property
    def takers(self) -> int:
        """Readers that would find something to read now."""
        ahead = min(len(self._ahead), READ_AHEAD - len(self._reading_ahead))
        return len(self._wanted) + max(ahead, 0)

    @property
    def only_ahead(self) -> bool:
        """True when nothing is queued but what is to be read ahead."""
        return bool(self._ahead) and not self._wanted

    def clear(self) -> None:
        """Forget everything. No reader is at work."""
        self.loads.clear()
        self._wanted.clear()
        self._ahead.clear()
        self._reading_ahead.clear()

    def order(self, key: int, extents: Sequence[Extent], due: int = 0) -> Load:
        """Queue the parts of an expert: wanted, or with a stamp `due` to be read ahead."""
        load = self.loads[key] = Load(key, len(extents), due)
        jobs = self._ahead if due else self._wanted
        jobs += (Job(load, i, extent) for i, extent in enumerate(extents))
        return load

    def take(self, reader: int) -> Job | None:
        """The next part for a reader, named by a number, which has ended its last."""
        self._reading_ahead.discard(reader)
        if self._wanted:
            job = self._wanted.popleft()
        elif self._ahead and len(self._reading_ahead) < READ_AHEAD:
            job = self._ahead.popleft()
            self._reading_ahead.add(reader)
        else:
            return None
        job.load.under_way += 1
        return job

    def claim(self, load: Load) -> None:
        """What was read ahead is wanted: parts it lacks are wanted too."""
        load.due = 0
        self._unqueue([load])
        self._wanted += load.dropped
        load.dropped = []

    def drop(self, keys: Collection[int]) -> list[Load]:
        """Read no more of these ahead; returns those that are given up at once."""
        loads = [self.loads[key] for key in keys]
        self._unqueue(loads)
        return [load for load in loads if self._give_up(load)]

    def queued_ahead(self) -> set[int]:
        """Keys with parts that are to be read ahead."""
        return {job.load.key for job in self._ahead}

    def due_loads(self) -> int:
        """Loads that nobody has asked for."""
        return sum(load.due > 0 for load in self.loads.values())

    def give_back(self, job: Job) -> bool:
        """A part of what nobody asked for cannot be placed: drop the rest. True if given up."""
        load = job.load
        load.under_way -= 1
        load.dropped.append(job)
        self._unqueue([load])
        return self._give_up(load)

    def placed(self, job: Job) -> bool:
        """A part is in its slot: True if the expert is given up, for parts that were dropped."""
        load = job.load
        load.under_way -= 1
        load.left -= 1
        if load.left == 0:
            del self.loads[load.key]
            return False
        return self._give_up(load)

    def _unqueue(self, loads: list[Load]) -> None:
        """Move what is queued of these, none of them wanted before, to what was dropped."""
        for job in self._ahead:
            if job.load in loads:
                job.load.dropped.append(job)
        self._ahead = deque(job for job in self._ahead if job.load not in loads)

    def _give_up(self, load: Load) -> bool:
        """Whether an expert lacks parts that nobody will read."""
        given_up = bool(load.dropped) and load.under_way == 0
        if given_up:
            del self.loads[load.key]
        return given_up
