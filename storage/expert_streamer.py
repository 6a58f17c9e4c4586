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
The consumer stamps `last_used[layer, expert]` with a clock that ticks once a layer; a policy reads
these stamps and says which expert leaves first (expert_policy.py).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgert.storage.backend import Backend
from edgert.storage.expert_cache import admit
from edgert.storage.expert_policy import ExpertPolicy, Lru
from edgert.storage.manifest import Extent
from edgert.storage.reader import Bytes, ReaderTeam
from edgert.storage.window import Window

__all__ = ["DONE", "READY", "WANTED", "ExpertStreamer", "PartsOf", "PlaceExpert", "PolicyFor"]

WANTED = 0
READY = 1
DONE = 2

_WAKE = bytes(8)

PartsOf = Callable[[int, int], Sequence[Extent]]  # (layer, expert) -> what to read, each at once
PlaceExpert = Callable[[int, int, int, Bytes, Bytes], None]  # layer, expert, part, raw, slot
PolicyFor = Callable[[int], ExpertPolicy]  # number of slots -> a policy without a past


@dataclass(frozen=True, slots=True)
class _Job:
    """One part of an expert on its way into a slot."""

    key: int
    part: int
    extent: Extent


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
        self._in_flight: dict[int, int] = {}  # key of an expert being read -> its slot, -1 none yet
        self._without_slot: list[int] = []  # those with none, all of one layer
        self._parts_left: dict[int, int] = {}  # the same key -> parts that are not in the slot
        self._jobs: deque[_Job] = deque()  # parts that no thread has taken
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
            self.policy.observe(self.last_used.reshape(-1))

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
        self._team.start_pipeline(self._take, self._fill)

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
                job = self._jobs.popleft() if self._jobs else None
                self._asleep += job is None
                others = min(len(self._jobs), self._asleep) if found else 0
            if self._team.stopping:
                return None
            if job is not None:
                if others:
                    os.write(self.request_fd, _WAKE * others)
                return (job.extent,), job
            os.read(self._request_read, 8)
            with self._team.lock:
                self._asleep -= 1
                found = self._look()

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
        first = layer * self.shape[1]
        keys = dict.fromkeys(first + e for g, e in groups.items() if g not in here)
        wanted = [key for key in keys if key not in self._in_flight]
        if not wanted:
            return False
        room = self._window.n_slots - len(self._in_flight) - int(self.board[1])
        if room < len(wanted):  # so few that they have to be counted
            taken = np.count_nonzero(self._busy()) + len(self._without_slot)
            room = self._window.n_slots - int(taken)
        for key in wanted[:room]:
            extents = self._parts(layer, key - first)
            self._parts_left[key] = len(extents)
            self._jobs += (_Job(key, i, e) for i, e in enumerate(extents))
            self._in_flight[key] = -1
            self._without_slot.append(key)
        return room > 0

    def _assign(self) -> None:
        """Give slots to the experts that were ordered without one.

        It is done beside the first reads, not before: a choice among 512 slots takes 0.2 ms, and
        0.4 beside two threads that compute.
        """
        wanted = self._without_slot
        if not wanted:
            return
        stamps = self.last_used.reshape(-1)
        plan = admit(self.policy, wanted, self._owner, stamps, self._busy())
        assert not plan.waiting, plan  # `_look` counted, and since then slots became free at most
        for item in plan.admitted:
            if item.evicted >= 0:
                self._address[item.evicted] = 0
                self._slot_of[item.evicted] = -1
            self._owner[item.slot] = item.expert
            self._slot_of[item.expert] = item.slot
            self._in_flight[item.expert] = item.slot
        wanted.clear()

    def _busy(self) -> npt.NDArray[np.bool_]:
        """Slots that may not be taken: being filled, or on the board and not DONE.

        The states are read again, after a WANTED one was seen: the consumer notes its hits before
        it wants anything, so none can be missed.
        """
        busy = np.zeros(self._window.n_slots, np.bool_)
        busy[[slot for slot in self._in_flight.values() if slot >= 0]] = True
        n_groups = int(self.board[1])
        on_board = self.expert[:n_groups][self.state[:n_groups] != DONE]
        slots = self._slot_of[int(self.board[0]) * self.shape[1] + on_board]
        busy[slots[slots >= 0]] = True
        return busy

    # ---- the threads that place -------------------------------------------------------------

    def _fill(self, job: _Job, raw: list[Bytes]) -> None:
        """Place what was read, and publish the expert with the last of its parts."""
        with self._team.lock:
            self._assign()
            slot = self._in_flight[job.key]
        layer, expert = divmod(job.key, self.shape[1])
        self._place(layer, expert, job.part, raw[0], self._window.view(slot))
        with self._team.lock:
            self._parts_left[job.key] -= 1
            if self._parts_left[job.key] == 0:
                self._publish(layer, expert, slot)

    def _publish(self, layer: int, expert: int, slot: int) -> None:
        """Make an expert visible, and grant it to the groups that want it. With the lock held."""
        self.slot_address[layer, expert] = self._window.address(slot)
        del self._in_flight[layer * self.shape[1] + expert]
        self.loads += 1
        now, groups = self._wanted()
        if now == layer:
            self._grant(layer, {g: e for g, e in groups.items() if e == expert})
