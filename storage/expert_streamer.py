"""MoE experts: records read into slots when the router wants them, kept while there is room.

Owns: the slots' contents, the board on which compiled code asks, and the threads that answer.
Must not know what an expert computes. Lookups of resident experts happen in compiled code, in
`slot_address`; Python wakes up only for a miss.

The board is int64[3 + 3 * n_experts]: layer, n_groups, tokens of the pass, then expert[], state[],
address[]. One layer at a time, in this order, without which a hit could be evicted while it is
being noted:
  1. all groups of the layer before are DONE;
  2. stamp them (below), then a full fence: what is read ahead may evict at any time, and sees it;
     write layer and expert[]; a group whose `slot_address` is not 0 is a hit: write its address,
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
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from edgert.storage.backend import Backend
from edgert.storage.expert_prefetch import Prefetcher
from edgert.storage.expert_queue import Job, Load, LoadQueue
from edgert.storage.expert_slots import ExpertSlots, PolicyFor
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
RoomOf = Callable[[int, int, int, Bytes], Bytes | None]  # layer, expert, part, slot


class ExpertStreamer:
    """Keeps records of `n_layers` x `n_experts` experts in the slots of `window`.

    `parts(layer, expert)` names what to read, each extent a request of its own, so that several
    threads work on one expert; `place(layer, expert, part, raw, slot)` gets the exact bytes of one
    part and the whole slot, in a thread of the team, and should release the GIL. Works with any
    number of slots from 1. One consumer at a time. `policy_for` gives the policy of eviction, LRU
    without it; it changes time, never what a slot holds. `record_bytes` [n_layers, n_experts]: what
    each takes of a slot, where slots have several sizes; one at least must hold any record.
    `room(layer, expert, part, slot)` is where a part that lies in the file as in its slot is read
    to, None for one that has to be placed.
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
        record_bytes: npt.NDArray[np.int64] | None = None,
        room: RoomOf = lambda _layer, _expert, _part, _slot: None,
    ) -> None:
        n_layers, n_experts = shape
        self.shape = (n_layers, n_experts)
        self.board: npt.NDArray[np.int64] = np.zeros(3 + 3 * n_experts, np.int64)
        self.expert, self.state, self.group_address = self.board[3:].reshape(3, n_experts)
        self.state[:] = DONE
        self.slots = ExpertSlots(shape, window, self.board[2:3], policy_for, record_bytes)
        self.slot_address, self.last_used = self.slots.addresses, self.slots.last_used
        self.loads = 0
        self._parts = parts
        self._place = place
        self._room_of = room
        self._team = ReaderTeam(backend, staging, "edgert-expert")
        self._queue = LoadQueue()
        self._without_slot: list[Load] = []  # those wanted that have none, all of one layer
        self.prefetcher = Prefetcher(shape)
        self._asleep = 0  # reading threads in the pipe
        self._request_read, self.request_fd = os.pipe()
        self._closed = False

    def set_policy(self, policy_for: PolicyFor) -> None:
        """Evict by another policy from now on. It begins with the last use of each expert."""
        with self._team.lock:
            self.slots.set_policy(policy_for)

    def note_pass(self, tokens: int, seconds: float) -> None:
        """After a pass: let the policy see its uses before others hide them, and what it took."""
        with self._team.lock:
            self.slots.observe()
            self._settle(int(self.slots.stamps.max()))
            self.prefetcher.pass_ended(tokens, seconds)

    @property
    def may_miss(self) -> bool:
        """Whether there are fewer slots than experts."""
        return self.slots.window.n_slots < self.shape[0] * self.shape[1]

    @property
    def failed(self) -> npt.NDArray[np.int64]:
        """int64[1]: 1 after an error in a thread, until `reset`."""
        return self._team.failed

    @property
    def n_slots(self) -> int:
        """Experts that can be resident at a time."""
        return self.slots.window.n_slots

    @property
    def read_bytes(self) -> int:
        """Bytes asked from the backend so far, alignment included."""
        return self._team.read_bytes

    @property
    def busy_ns(self) -> int:
        """Time during which at least one read was under way."""
        return self._team.busy_ns

    def start(self) -> None:
        """Begin answering requests."""
        assert not self._closed and not self._team.running
        self._team.start_pipeline(self._take, self._fill, self._into, self._go_on_without)

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
        self._queue.clear()
        self._without_slot.clear()
        self.prefetcher.reset()
        self._asleep = 0
        self.slots.move_out_unread()
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
        self.slots.resize(window)

    def halt(self) -> None:
        """Stop and join the threads; a read under way is finished first. `reset` begins again."""
        self._team.stopping = True
        if self._team.running:
            os.write(self.request_fd, _WAKE * self._team.n_readers)
        self._team.join()
        self.slots.touching.halt()

    # ---- the threads that read --------------------------------------------------------------

    def _take(self) -> tuple[Sequence[Extent], Job] | None:
        """What to read next. Sleep in the pipe if there is nothing: who wakes looks at the boards.

        The one that finds something wakes others and begins to read.
        """
        reader, found = threading.get_ident(), False
        while True:
            with self._team.lock:
                if self._queue.only_ahead:  # what is wanted by now comes first
                    found = self._look()
                job = self._queue.take(reader)
                self._asleep += job is None
                others = min(self._queue.takers, self._asleep) if found else 0
            if self._team.stopping:
                return None
            if job is not None:
                if others:
                    os.write(self.request_fd, _WAKE * others)
                return (job.extent,), job
            os.read(self._request_read, 8)
            with self._team.lock:
                self._asleep -= 1
                ahead = self._look_ahead()  # first: it may free slots
                found = self._look() or ahead

    def _go_on_without(self, job: Job, _error: BaseException) -> bool:
        """A read failed: True if nobody wants it yet. Whoever does will meet the error."""
        with self._team.lock:
            if not job.load.due:
                return False
            self.prefetcher.rest()
            self._give_back(job)
            self._look()  # its slot may be the one the board waits for
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
        loads = self._queue.loads
        for key in keys:
            if key in loads and loads[key].due and loads[key].slot >= 0:
                self._claim(loads[key])
        wrong = {key for key in self._queue.queued_ahead() if first <= key < end} - keys.keys()
        self._give_up(self._queue.drop(wrong))
        wanted = [key for key in keys if key not in loads or loads[key].due]
        for key in self._with_room(wanted):
            load = loads.get(key)
            if load is not None:
                self._claim(load)
            else:
                load = self._queue.order(key, self._parts(layer, key - first))
            self._without_slot.append(load)
        return self._queue.takers > 0

    def _with_room(self, wanted: Sequence[int]) -> Sequence[int]:
        """Those of what is wanted for which there will be slots."""
        slots = self.slots
        room = slots.window.n_slots - len(self._queue.loads) - int(self.board[1])
        if not wanted or (slots.sizes is None and room >= len(wanted)):
            return wanted
        # Of several sizes, or so few that they have to be counted.
        return slots.fitting(wanted, [load.key for load in self._without_slot], self._busy())

    def _busy(self) -> npt.NDArray[np.bool_]:
        """Slots that may not be taken: being filled, or on the board and not DONE.

        The states are read again, after a WANTED one was seen: the consumer notes its hits before
        it wants anything, so none can be missed.
        """
        busy = np.zeros(self.slots.window.n_slots, np.bool_)
        busy[[load.slot for load in self._queue.loads.values() if load.slot >= 0]] = True
        n_groups = int(self.board[1])
        on_board = self.expert[:n_groups][self.state[:n_groups] != DONE]
        busy[self.slots.held(int(self.board[0]) * self.shape[1] + on_board)] = True
        return busy

    # ---- the board of hints, with the lock held ----------------------------------------------

    def _look_ahead(self) -> bool:
        """Order what a new hint names, in place of what is queued of the last: True for any."""
        hint = self.prefetcher.look()
        if hint is None:
            return False
        self._settle(hint.due - 1)
        self._give_up(self._queue.drop(self._queue.queued_ahead() - set(hint.keys)))
        # Few, so that what is wanted meanwhile finds slots.
        room = self.slots.window.n_slots // 4 - self._queue.due_loads()
        loads, address = self._queue.loads, self.slots.address
        keys = [key for key in hint.keys if not address[key] and key not in loads]
        for key in keys[: max(room, 0)]:
            self._queue.order(key, self._parts(*divmod(key, self.shape[1])), hint.due)
        return self._queue.takers > 0

    def _settle(self, now: int) -> None:
        """Judge what was read ahead for layers up to the stamp `now`: the useful were misses."""
        self.slots.policy.missed(self.prefetcher.settle(self.slots.stamps, now))

    def _claim(self, load: Load) -> None:
        """An expert that is read ahead is wanted: a miss, which none was when it got its slot."""
        self.prefetcher.late()
        self.slots.policy.missed(int(load.slot >= 0))
        self._queue.claim(load)

    def _give_back(self, job: Job) -> None:
        """A part that nobody asked for will not be placed."""
        self._give_up([job.load] if self._queue.give_back(job) else [])

    def _give_up(self, loads: Sequence[Load]) -> None:
        """These will not be read to their ends."""
        for load in loads:
            if load.slot >= 0:
                self.slots.move_out(load.key)
                self.prefetcher.dropped()

    def _into(self, job: Job) -> Bytes | None:
        """Where a part is to be read to: its place in the slot, or staging.

        Slots are not chosen before the disk has something to do; what it does first is placed.
        """
        load, where = job.load, (*divmod(job.load.key, self.shape[1]), job.part)
        with self._team.lock:
            if load.slot < 0 and self._team.reading:
                self._assign(load)
            slot = load.slot
        return None if slot < 0 else self._room_of(*where, self.slots.window.view(slot))

    # ---- the threads that place -------------------------------------------------------------

    def _fill(self, job: Job, raw: list[Bytes]) -> None:
        """Place what was read, and publish the expert with the last of its parts."""
        load = job.load
        with self._team.lock:
            self._assign(load)
            if load.slot < 0:
                self._give_back(job)
                return
        view = self.slots.window.view(load.slot)
        if not np.may_share_memory(view, raw[0]):
            self._place(*divmod(load.key, self.shape[1]), job.part, raw[0], view)
        with self._team.lock:
            if self._queue.placed(job):
                self._give_up([load])
            elif load.left == 0:
                self._publish(load)
            starved = load.due > 0 and load.key not in self._queue.loads and self._look()
            others = min(self._queue.takers, self._asleep) if starved else 0
        if others:
            os.write(self.request_fd, _WAKE * others)

    def _assign(self, load: Load) -> None:
        """Slots for what was ordered without one, then for `load`. With the lock held.

        It is done beside the first reads, not before: a choice among 512 slots takes 0.2 ms, and
        0.4 beside two threads that compute.
        """
        if self._without_slot:
            wanted = [other.key for other in self._without_slot]
            found = self.slots.move_in(wanted, self._busy(), self._soon())
            assert len(found) == len(wanted)  # `_look` counted; since then some became free at most
            for item in found:
                self._queue.loads[item.expert].slot = item.slot
            self._without_slot.clear()
        if load.slot < 0:
            busy, soon = self._busy(), self._soon()
            for item in self.slots.move_in_ahead(load.key, busy, soon, self._team.fence):
                load.slot = item.slot

    def _soon(self) -> tuple[int, ...]:
        """What the next layer may want, if a hint is about it."""
        hint = self.prefetcher.hint
        return hint.keys if hint.due > int(self.slots.stamps.max()) else ()

    def _publish(self, load: Load) -> None:
        """Make an expert visible, and grant it to the groups that want it. With the lock held."""
        self._team.fence()  # its bytes first: compiled code may look it up at once
        self.slots.publish(load.key)
        self.loads += 1
        if load.due:
            self.prefetcher.loaded(load.key, load.due)
        now, groups = self._wanted()
        layer, expert = divmod(load.key, self.shape[1])
        if now == layer:
            self._grant(layer, {g: e for g, e in groups.items() if e == expert})
