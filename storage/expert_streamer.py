"""MoE experts: records read into slots when the router wants them, kept while there is room.

Owns: the slots' contents, the board on which compiled code asks, and the threads that answer.
Must not know what an expert computes. Lookups of resident experts happen in compiled code, in
`slot_address`; Python wakes up only for a miss.

The board is int64[2 + 3 * n_experts]: layer, n_groups, then expert[], state[], address[]. One
layer at a time, in this order, without which a hit could be evicted while it is being noted:
  1. all groups of the layer before are DONE;
  2. write layer and expert[]; a group whose `slot_address` is not 0 is a hit: write its address,
     then state READY;
  3. write n_groups;
  4. only now write state WANTED for the misses, and 8 bytes to `request_fd`.
A WANTED group becomes READY once its address is written. The consumer marks it DONE after use,
and writes to `request_fd` again when others are still WANTED: its slot may be the one they need.
An expert is read part by part, by threads that only read, and placed by others that only place; it
is published with its last part. Slots are chosen beside the first reads, not before them.
A second board, of hints, says what a later layer may want (expert_prefetch.py). Such experts are
read ahead while nothing that is wanted waits for a reader, into slots that are free or whose expert
would leave next. Once their layer asks, those wanted go on as its own, and what is still queued of
the others is dropped: a request never waits for more than the parts under way.
The consumer stamps `last_used[layer, expert]` with a clock that ticks once a layer; a policy reads
these stamps and says which expert leaves first (expert_policy.py).
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from edgert.storage.backend import Backend
from edgert.storage.expert_cache import AdmissionPlan, admit
from edgert.storage.expert_policy import ExpertPolicy, Lru
from edgert.storage.expert_prefetch import Prefetcher
from edgert.storage.manifest import Extent
from edgert.storage.reader import Bytes, ReaderTeam
from edgert.storage.window import Window

__all__ = ["DONE", "READY", "WANTED", "ExpertStreamer", "PartsOf", "PlaceExpert", "PolicyFor"]

WANTED = 0
READY = 1
DONE = 2

_WAKE = bytes(8)
# Threads that read ahead at a time. The others are free for what is asked next.
_READ_AHEAD = 2

PartsOf = Callable[[int, int], Sequence[Extent]]  # (layer, expert) -> what to read, each at once
PlaceExpert = Callable[[int, int, int, Bytes, Bytes], None]  # layer, expert, part, raw, slot
PolicyFor = Callable[[int], ExpertPolicy]  # number of slots -> a policy without a past


@dataclass(frozen=True, slots=True)
class _Job:
    """One part of an expert on its way into a slot."""

    load: _Load
    part: int
    extent: Extent


@dataclass(slots=True, eq=False)
class _Load:
    """An expert on its way into a slot."""

    key: int
    left: int  # parts that are not in the slot
    due: int  # the stamp of the layer that may want it; 0: it is wanted
    slot: int = -1  # -1: none yet
    under_way: int = 0  # parts that a thread has taken and that are not placed
    dropped: list[_Job] = field(default_factory=list)  # parts not to be read unless wanted


class ExpertStreamer:
    """Keeps records of `n_layers` x `n_experts` experts in the slots of `window`.

    `parts(layer, expert)` names what to read, each extent a request of its own, so that several
    threads work on one expert; `place(layer, expert, part, raw, slot)` gets the exact bytes of one
    part and the whole slot, in a thread of the team, and should release the GIL. Works with any
    number of slots from 1. One consumer at a time. `policy_for` gives the policy of eviction, LRU
    without it; it changes time, never what a slot holds.
    """

    def __init__(
        self,
        backend: Backend,
        parts: PartsOf,
        shape: tuple[int, int],
        window: Window,
        staging: Sequence[Bytes],
        place: PlaceExpert,
        policy_for: PolicyFor | None = None,
    ) -> None:
        n_layers, n_experts = shape
        self.shape = (n_layers, n_experts)
        self.board: npt.NDArray[np.int64] = np.zeros(2 + 3 * n_experts, np.int64)
        self.expert = self.board[2 : 2 + n_experts]
        self.state = self.board[2 + n_experts : 2 + 2 * n_experts]
        self.group_address = self.board[2 + 2 * n_experts :]
        self.state[:] = DONE
        self.slot_address: npt.NDArray[np.int64] = np.zeros(shape, np.int64)  # 0: not resident
        self.last_used: npt.NDArray[np.int64] = np.zeros(shape, np.int64)
        self.loads = 0
        self._parts = parts
        self._place = place
        self._window = window
        self._team = ReaderTeam(backend, staging, "edgert-expert")
        self._owner = np.full(window.n_slots, -1, np.int64)  # layer * n_experts + expert
        self._slot_of = np.full(n_layers * n_experts, -1, np.int64)  # the inverse of `_owner`
        self._address = self.slot_address.reshape(-1)  # the same memory, by key
        self._in_flight: dict[int, _Load] = {}  # by key
        self._without_slot: list[_Load] = []  # those wanted that have none, all of one layer
        self._jobs: deque[_Job] = deque()  # parts wanted that no thread has taken
        self._ahead: deque[_Job] = deque()  # parts to be read ahead
        self._reading_ahead: set[int] = set()  # threads that do
        self.prefetcher = Prefetcher(self.shape)
        self._asleep = 0  # reading threads in the pipe
        self._request_read, self.request_fd = os.pipe()
        self._closed = False
        self.set_policy(policy_for or (lambda _slots: Lru(self.shape)))

    def set_policy(self, policy_for: PolicyFor) -> None:
        """Evict by another policy from now on. It begins with the last use of each expert."""
        with self._team.lock:
            self._policy_for = policy_for
            self.policy = policy_for(self._window.n_slots)
            stamps = self.last_used.reshape(-1)
            self.policy.observe(stamps)
            self.policy.missed(int(np.count_nonzero(stamps)))  # each was loaded once at least

    def note_pass(self) -> None:
        """After a pass: let the policy see its uses before others hide them."""
        with self._team.lock:
            stamps = self.last_used.reshape(-1)
            self.policy.observe(stamps)
            self._settle(int(stamps.max()))
            self.prefetcher.pass_ended()

    @property
    def hinting(self) -> bool:
        """Whether compiled code is to post hints in the next pass."""
        return self.prefetcher.on and self._window.n_slots < self.shape[0] * self.shape[1]

    @property
    def failed(self) -> npt.NDArray[np.int64]:
        """int64[1]: 1 after an error in a thread, until `reset`."""
        return self._team.failed

    @property
    def n_slots(self) -> int:
        """Experts that can be resident at a time."""
        return self._window.n_slots

    @property
    def read_bytes(self) -> int:
        """Bytes asked from the backend so far, alignment included."""
        return self._team.read_bytes

    @property
    def read_ns(self) -> int:
        """Time spent in reads, summed over the threads."""
        return self._team.read_ns

    @property
    def busy_ns(self) -> int:
        """Time during which at least one read was under way."""
        return self._team.busy_ns

    def start(self) -> None:
        """Begin answering requests."""
        assert not self._closed and not self._team.running
        self._team.start_pipeline(self._take, self._fill, self._go_on_without)

    def raise_if_failed(self) -> None:
        """Raise the error a thread met (`StorageError` with file and offset for a failed read)."""
        self._team.raise_if_failed()

    def reset(self) -> None:
        """After a cancelled or failed pass: wait for reads under way and empty the board.

        Resident experts stay, and no error is pending afterwards. The consumer must have stopped.
        """
        assert not self._closed
        self.halt()
        self._team.clear()
        self._in_flight.clear()
        self._without_slot.clear()
        self._jobs.clear()
        self._ahead.clear()
        self._reading_ahead.clear()
        self.prefetcher.reset()
        self._asleep = 0
        # An expert whose read did not end has lost its old tenant already: its slot is free.
        lost = (self._slot_of >= 0) & (self._address == 0)
        self._owner[self._slot_of[lost]] = -1
        self._slot_of[lost] = -1
        self.board[1] = 0
        self.state[:] = DONE
        self.start()

    def close(self) -> None:
        """Stop the threads and close the pipe. Idempotent. The consumer must have stopped."""
        if self._closed:
            return
        self.halt()
        self._closed = True
        os.close(self._request_read)
        os.close(self.request_fd)

    def resize(self, window: Window) -> None:
        """Go on with more or fewer slots at the same addresses; `reset` begins again.

        Experts in slots that are gone are forgotten. Called between `halt` and `reset`.
        """
        assert not self._team.running
        gone = self._owner[window.n_slots :]
        gone = gone[gone >= 0]
        self._slot_of[gone] = -1
        self._address[gone] = 0
        kept = self._owner[: window.n_slots]
        self._owner = np.full(window.n_slots, -1, np.int64)
        self._owner[: len(kept)] = kept
        self._window = window
        self.set_policy(self._policy_for)

    def halt(self) -> None:
        """Stop and join the threads; a read under way is finished first. `reset` begins again."""
        self._team.stopping = True
        if self._team.running:
            os.write(self.request_fd, _WAKE * self._team.n_readers)
        self._team.join()

    # ---- the threads that read --------------------------------------------------------------

    def _take(self) -> tuple[Sequence[Extent], _Job] | None:
        """What to read next. Sleep in the pipe when there is nothing: who wakes looks at the board.

        The one that finds something wakes others and begins to read.
        """
        found = False
        while True:
            with self._team.lock:
                job = self._next_job()
                self._asleep += job is None
                others = min(len(self._jobs) + len(self._ahead), self._asleep) if found else 0
            if self._team.stopping:
                return None
            if job is not None:
                if others:
                    os.write(self.request_fd, _WAKE * others)
                return (job.extent,), job
            os.read(self._request_read, 8)
            with self._team.lock:
                self._asleep -= 1
                found = self._look() | self._look_ahead()

    def _next_job(self) -> _Job | None:
        """A part that is wanted, else one to be read ahead. With the lock held."""
        me = threading.get_ident()
        self._reading_ahead.discard(me)
        if self._jobs:
            job = self._jobs.popleft()
        elif self._ahead and len(self._reading_ahead) < _READ_AHEAD:
            job = self._ahead.popleft()
            self._reading_ahead.add(me)
        else:
            return None
        job.load.under_way += 1
        return job

    def _go_on_without(self, job: _Job, _error: BaseException) -> bool:
        """A read failed: True if nobody wants it yet. Whoever does will meet the error."""
        with self._team.lock:
            if not job.load.due:
                return False
            self._return_part(job)
            self.prefetcher.rest()
            return True

    # ---- the board, with the lock held -------------------------------------------------------

    def _wanted(self) -> tuple[int, dict[int, int]]:
        """The layer and the WANTED groups: group -> expert. Called with the lock held.

        The states are read first. A message may be late, and the consumer at its next layer
        already; but a WANTED group stays so until we answer, and the board with it, so what is
        read after the state belongs to it.
        """
        groups = np.flatnonzero(self.state[: int(self.board[1])] == WANTED).tolist()
        self._team.fence()
        return int(self.board[0]), {g: int(self.expert[g]) for g in groups}

    def _grant(self, layer: int, groups: Mapping[int, int]) -> None:
        """Turn WANTED groups READY whose experts are resident. Called with the lock held."""
        for group, expert in groups.items():
            self.group_address[group] = self.slot_address[layer, expert]
        self._team.fence()
        self.state[list(groups)] = READY

    def _look(self) -> bool:
        """Order the parts of what is wanted, as far as there will be slots: True for any."""
        layer, groups = self._wanted()
        # Loaded since the consumer looked: for another group, or before a reset.
        here = {g: e for g, e in groups.items() if self.slot_address[layer, e]}
        if here:
            self._grant(layer, here)
        first, end = layer * self.shape[1], (layer + 1) * self.shape[1]
        keys = dict.fromkeys(first + e for g, e in groups.items() if g not in here)
        loads = [self._in_flight.get(key) for key in keys]
        found = self._claim([load for load in loads if load is not None and load.slot >= 0])
        self._drop_ahead({j.load.key for j in self._ahead if first <= j.load.key < end} - set(keys))
        wanted = [key for key in keys if key not in self._in_flight or self._in_flight[key].due]
        if not wanted:
            return found
        room = self._window.n_slots - len(self._in_flight) - int(self.board[1])
        if room < len(wanted):  # so few that they have to be counted
            taken = np.count_nonzero(self._busy()) + len(self._without_slot)
            room = self._window.n_slots - int(taken)
        for key in wanted[: max(room, 0)]:
            if key in self._in_flight:
                self._claim([self._in_flight[key]])
                self._without_slot.append(self._in_flight[key])
            else:
                self._without_slot.append(self._order(key, 0, self._jobs))
        return found or room > 0

    def _order(self, key: int, due: int, jobs: deque[_Job]) -> _Load:
        """Queue the parts of an expert."""
        extents = self._parts(*divmod(key, self.shape[1]))
        load = self._in_flight[key] = _Load(key, len(extents), due)
        jobs += (_Job(load, i, e) for i, e in enumerate(extents))
        return load

    def _claim(self, loads: list[_Load]) -> bool:
        """What was read ahead is wanted now: its parts are read before others. True for any."""
        loads = [load for load in loads if load.due]
        for load in loads:
            self.prefetcher.late()
            load.due = 0
            self._jobs += load.dropped
            self._jobs += (job for job in self._ahead if job.load is load)
            load.dropped = []
        if loads:
            self._ahead = deque(job for job in self._ahead if job.load.due)
        return bool(loads)

    # ---- reading ahead, with the lock held ---------------------------------------------------

    def _look_ahead(self) -> bool:
        """Order what a new hint names, in place of what is queued of the last: True for any."""
        hint = self.prefetcher.look()
        if hint is None:
            return False
        self._settle(hint.due - 1)
        self._drop_ahead({job.load.key for job in self._ahead} - set(hint.keys))
        # Few, so that what is wanted meanwhile finds slots.
        room = self._window.n_slots // 4 - sum(load.due > 0 for load in self._in_flight.values())
        keys = [key for key in hint.keys if not self._address[key] and key not in self._in_flight]
        for key in keys[: max(room, 0)]:
            self._order(key, hint.due, self._ahead)
        return bool(self._ahead)

    def _settle(self, now: int) -> None:
        """Judge what was read ahead for layers that are over; a policy sees misses in the useful."""
        self.policy.missed(self.prefetcher.settle(self.last_used.reshape(-1), now))

    def _drop_ahead(self, keys: set[int]) -> None:
        """Drop what is queued of these."""
        if not keys:
            return
        for job in self._ahead:
            if job.load.key in keys:
                job.load.dropped.append(job)
        self._ahead = deque(job for job in self._ahead if job.load.key not in keys)
        for key in keys:
            self._forget(self._in_flight[key])

    def _return_part(self, job: _Job) -> None:
        """A part that was taken will not be placed, nor the rest read, unless it is wanted."""
        load = job.load
        load.under_way -= 1
        load.dropped.append(job)
        load.dropped += (other for other in self._ahead if other.load is load)
        self._ahead = deque(other for other in self._ahead if other.load is not load)
        self._forget(load)

    def _forget(self, load: _Load) -> None:
        """Give up an expert that lost parts, and its slot, once no part of it is under way."""
        if load.under_way or not load.dropped:
            return
        del self._in_flight[load.key]
        if load.slot >= 0:
            self._owner[load.slot] = -1
            self._slot_of[load.key] = -1
            self.prefetcher.dropped()

    def _assign_ahead(self, load: _Load) -> None:
        """A slot for an expert nobody asked for: free, or one whose expert would leave next."""
        busy = self._busy()
        slots = self._slot_of[list(self.prefetcher.hint.keys)]
        busy[slots[slots >= 0]] = True
        stamps = self.last_used.reshape(-1)
        busy |= (self._owner >= 0) & (stamps[self._owner] == stamps.max())
        self._move_in(admit(self.policy, [load.key], self._owner, stamps, busy))

    # ---- slots, with the lock held -----------------------------------------------------------

    def _assign(self) -> None:
        """Give slots to the experts that were ordered without one.

        It is done beside the first reads, not before: a choice among 512 slots takes 0.2 ms, and
        0.4 beside two threads that compute.
        """
        wanted = [load.key for load in self._without_slot]
        if not wanted:
            return
        stamps = self.last_used.reshape(-1)
        plan = admit(self.policy, wanted, self._owner, stamps, self._busy())
        assert not plan.waiting, plan  # `_look` counted, and since then slots became free at most
        self._move_in(plan)
        self._without_slot.clear()

    def _move_in(self, plan: AdmissionPlan) -> None:
        """Carry out a plan for experts in flight."""
        for item in plan.admitted:
            if item.evicted >= 0:
                self._address[item.evicted] = 0
                self._slot_of[item.evicted] = -1
            self._owner[item.slot] = item.expert
            self._slot_of[item.expert] = item.slot
            self._in_flight[item.expert].slot = item.slot

    def _busy(self) -> npt.NDArray[np.bool_]:
        """Slots that may not be taken: being filled, or on the board and not DONE.

        The states are read again, after a WANTED one was seen: the consumer notes its hits before
        it wants anything, so none can be missed.
        """
        busy = np.zeros(self._window.n_slots, np.bool_)
        busy[[load.slot for load in self._in_flight.values() if load.slot >= 0]] = True
        n_groups = int(self.board[1])
        on_board = self.expert[:n_groups][self.state[:n_groups] != DONE]
        slots = self._slot_of[int(self.board[0]) * self.shape[1] + on_board]
        busy[slots[slots >= 0]] = True
        return busy

    # ---- the threads that place -------------------------------------------------------------

    def _fill(self, job: _Job, raw: list[Bytes]) -> None:
        """Place what was read, and publish the expert with the last of its parts."""
        load = job.load
        layer, expert = divmod(load.key, self.shape[1])
        with self._team.lock:
            self._assign()
            if load.slot < 0:
                self._assign_ahead(load)
            if load.slot < 0:
                self._return_part(job)
                self._serve_starved()
                return
        self._place(layer, expert, job.part, raw[0], self._window.view(load.slot))
        with self._team.lock:
            load.under_way -= 1
            load.left -= 1
            if load.left == 0:
                self._publish(load)
            else:
                self._forget(load)
            if load.due and not load.left:
                self._serve_starved()

    def _publish(self, load: _Load) -> None:
        """Make an expert visible, and grant it to the groups that want it. With the lock held."""
        self._address[load.key] = self._window.address(load.slot)
        del self._in_flight[load.key]
        self.loads += 1
        if load.due:
            self.prefetcher.loaded(load.key, load.due)
        now, groups = self._wanted()
        layer, expert = divmod(load.key, self.shape[1])
        if now == layer:
            self._grant(layer, {g: e for g, e in groups.items() if e == expert})

    def _serve_starved(self) -> None:
        """A slot is free again that was being filled ahead: the board may have waited for it."""
        if self._look():
            os.write(self.request_fd, _WAKE * min(len(self._jobs), self._asleep))
