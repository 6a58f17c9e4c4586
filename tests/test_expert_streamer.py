"""Expert slots: the eviction plan, and the streamer with a Python consumer for compiled code."""

from __future__ import annotations

import os
import random
import threading
import time

import numpy as np
import pytest
from faults import FaultPlan, FaultyBackend, fill
from hypothesis import given, settings
from hypothesis import strategies as st
from slots import ALIGNMENT, at_address, pages, wait_for

from edgert.errors import StorageError
from edgert.storage.backend import MemoryBackend
from edgert.storage.expert_cache import plan_admission, plan_admission_ref
from edgert.storage.expert_streamer import DONE, READY, WANTED, ExpertStreamer
from edgert.storage.manifest import Extent
from edgert.storage.reader import parts_bytes
from edgert.storage.window import Window

# ---- admission ----------------------------------------------------------------------------


@st.composite
def caches(draw):
    n = draw(st.integers(1, 9))
    owner = draw(st.lists(st.integers(-1, 40), min_size=n, max_size=n))
    stamps = draw(st.lists(st.integers(0, 6), min_size=n, max_size=n))
    busy = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    wanted = draw(st.lists(st.integers(100, 140), unique=True, max_size=12))
    return wanted, np.array(owner, np.int64), np.array(stamps, np.int64), np.array(busy)


@given(caches())
def test_admission_is_what_its_slow_twin_says(cache):
    wanted, owner, stamps, busy = cache
    plan = plan_admission(*cache)
    assert plan == plan_admission_ref(*cache)
    slots = [a.slot for a in plan.admitted]
    assert len(set(slots)) == len(slots) and not busy[slots].any()
    assert [a.expert for a in plan.admitted] + list(plan.waiting) == wanted
    if plan.waiting:  # nothing waits while a slot could be had
        assert len(slots) == int((~busy).sum())
    assert all(a.evicted == owner[a.slot] for a in plan.admitted)


def test_admission_takes_free_slots_then_the_least_recently_used():
    owner = np.array([5, -1, 6, 7, -1, 8], np.int64)
    stamps = np.array([30, 0, 10, 20, 0, 5], np.int64)
    busy = np.array([0, 0, 0, 0, 0, 1], bool)
    plan = plan_admission([50, 51, 52, 53, 54, 55], owner, stamps, busy)
    assert [(a.expert, a.slot, a.evicted) for a in plan.admitted] == [
        (50, 1, -1),
        (51, 4, -1),
        (52, 2, 6),
        (53, 3, 7),
        (54, 0, 5),
    ]
    assert plan.waiting == (55,)


# ---- experts ------------------------------------------------------------------------------

N_LAYERS, N_EXPERTS, RECORD = 3, 8, 700


class Experts:
    """An expert streamer over random records of two parts, and its consumer."""

    def __init__(
        self, n_slots=4, threads=2, plan=None, n_experts=N_EXPERTS, record=RECORD, **options
    ):
        self.n_experts = n_experts
        self.data = fill((N_LAYERS, n_experts, record), seed=6)
        self.backend = FaultyBackend(MemoryBackend([self.data.tobytes()], ALIGNMENT), plan)
        self.window = Window(pages(n_slots * 4096), 4096)
        need = parts_bytes([Extent(0, ALIGNMENT - 1, record)], ALIGNMENT)  # at the worst place
        self.streamer = ExpertStreamer(
            self.backend,
            self.parts,
            (N_LAYERS, n_experts),
            self.window,
            [pages(need) for _ in range(threads)],
            self.place,
            **options,
        )
        self.clock = 0
        self.hits = self.misses = 0

    def parts(self, layer, expert):
        first = (layer * self.n_experts + expert) * RECORD
        return Extent(0, first, 300), Extent(0, first + 300, 400)

    def place(self, layer, expert, part, raw, slot):
        np.bitwise_xor(raw, 255, out=slot[300 * part : 300 * part + len(raw)])

    def check(self, layer, expert, address):
        got = at_address(self.window, int(address), RECORD)
        assert got == (self.data[layer, expert] ^ 255).tobytes()

    def compute(self, layer: int, experts: list[int], order: random.Random | None = None) -> bool:
        """One layer, as compiled code does it; False after a failure."""
        s = self.streamer
        s.board[0] = layer
        s.expert[: len(experts)] = experts
        self.clock += 1
        s.last_used[layer, experts] = self.clock
        s._team.fence()
        misses = []
        for g, e in enumerate(experts):
            address = s.slot_address[layer, e]
            if address:
                s.group_address[g], s.state[g] = address, READY
            else:
                misses.append(g)
        self.hits += len(experts) - len(misses)
        self.misses += len(misses)
        s.board[1] = len(experts)
        for g in misses:
            s.state[g] = WANTED
        if misses:
            os.write(s.request_fd, bytes(8))
        left = set(range(len(experts)))
        while left:
            if not wait_for(lambda: any(s.state[g] == READY for g in left), s.failed):
                return False
            ready = [g for g in left if s.state[g] == READY]
            g = order.choice(ready) if order else ready[0]
            self.check(layer, experts[g], s.group_address[g])
            self.clock += 1
            s.last_used[layer, experts[g]] = self.clock
            s.state[g] = DONE
            left.discard(g)
            if any(s.state[g] == WANTED for g in left):
                os.write(s.request_fd, bytes(8))
        return True

    def check_all(self):
        """What is resident is right, and the streamer's two indexes agree with it."""
        s = self.streamer
        for layer, expert in self.resident():
            self.check(layer, expert, s.slot_address[layer, expert])
        owned = {
            int(key): self.window.address(slot)
            for slot, key in enumerate(s.slots.owner)
            if key >= 0
        }
        assert owned == {k: int(a) for k, a in enumerate(s.slot_address.flat) if a}
        assert owned == {k: self.window.address(s) for k, s in enumerate(s.slots.slot_of) if s >= 0}

    def resident(self) -> set[tuple[int, int]]:
        return {(int(a), int(b)) for a, b in np.argwhere(self.streamer.slot_address)}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("n_slots", [1, 2, 3, 4, 8, 24])
def test_experts_arrive_whole_with_any_number_of_slots(n_slots, threads):
    moe = Experts(n_slots, threads)
    s = moe.streamer
    s.start()
    rng = random.Random(n_slots)
    for _ in range(60):
        for layer in range(N_LAYERS):
            assert moe.compute(layer, rng.sample(range(N_EXPERTS), rng.randint(1, 8)), rng)
        addresses = s.slot_address[s.slot_address != 0]
        assert len(set(addresses.tolist())) == len(addresses) <= n_slots
    moe.check_all()
    s.close()
    s.close()
    assert s.loads == moe.misses
    if n_slots == 24:
        assert s.loads == len(moe.resident()) <= 24
    assert moe.backend.reads == 2 * s.loads
    assert RECORD * s.loads <= s.read_bytes <= (RECORD + 4 * ALIGNMENT) * s.loads


def test_the_least_recently_used_expert_leaves():
    moe = Experts(n_slots=3, threads=1)
    moe.streamer.start()
    for expert in (0, 1, 2, 0):
        assert moe.compute(0, [expert])
    assert moe.resident() == {(0, 0), (0, 1), (0, 2)}
    assert moe.compute(1, [5])
    assert moe.resident() == {(0, 0), (0, 2), (1, 5)}
    assert moe.compute(0, [2, 7])  # 2 is a hit and may not leave; 0 is the oldest other
    assert moe.resident() == {(0, 2), (0, 7), (1, 5)}
    assert (moe.hits, moe.misses, moe.streamer.loads) == (2, 5, 5)
    moe.streamer.close()


def test_a_hit_of_the_layer_is_never_evicted_for_its_misses():
    moe = Experts(n_slots=2, threads=2, plan=FaultPlan(delay_s=0.001))
    s = moe.streamer
    s.start()
    assert moe.compute(0, [3])
    for others in ([4, 5, 6], [7, 0, 1], [2, 4, 6]):
        s.last_used[0, 3] = -1  # the oldest by far, but on the board
        assert moe.compute(0, [*others, 3], random.Random(1))
    s.close()


def test_a_hostile_clock_costs_time_and_nothing_else():
    """Stamps that lie (random, backwards) change what is evicted, never what is computed."""
    moe = Experts(n_slots=5, threads=3)
    s = moe.streamer
    s.start()
    rng = random.Random(8)
    for _ in range(40):
        s.last_used[:] = [[rng.randint(-(2**62), 2**62) for _ in range(8)] for _ in range(3)]
        assert moe.compute(rng.randrange(3), rng.sample(range(8), 6), rng)
    s.close()


def test_messages_without_a_request_do_nothing():
    moe = Experts(n_slots=2)
    s = moe.streamer
    s.start()
    for _ in range(100):
        os.write(s.request_fd, bytes(8))
    assert moe.compute(1, [1, 2, 3])
    assert s.loads == 3 and moe.backend.reads == 6
    s.close()


@pytest.mark.parametrize("n_slots", [1, 3])
def test_any_failing_expert_read_is_handed_over_and_recovered_from(n_slots):
    passes = [(0, [1, 2, 3]), (1, [4, 5]), (0, [1, 6])]
    for n in range(1, 11):
        moe = Experts(n_slots, threads=2, plan=FaultPlan(fail={n}))
        s = moe.streamer
        s.start()
        assert not all(moe.compute(layer, experts) for layer, experts in passes)
        with pytest.raises(StorageError, match=f"read {n}"):
            s.raise_if_failed()
        s.reset()
        s.raise_if_failed()
        moe.check_all()
        for _ in range(3):
            assert all(moe.compute(layer, experts) for layer, experts in passes)
        s.close()


@pytest.mark.parametrize("n", [1, 5, 12, 16])
def test_one_failing_read_among_many_in_flight(n):
    """All of a layer is wanted at once; the error is that of the read, and nothing stays taken."""
    plan = FaultPlan(fail={n}, delay_s=0.001)
    moe = Experts(n_slots=12, threads=6, plan=plan)
    s = moe.streamer
    s.start()
    assert not moe.compute(0, list(range(8)))
    with pytest.raises(StorageError, match=f"read {n}"):
        s.raise_if_failed()
    s.reset()
    moe.check_all()
    assert not s._queue.loads and not s._queue.takers and not s._without_slot
    assert int((s.slots.owner >= 0).sum()) == len(moe.resident())
    assert all(moe.compute(layer, list(range(8))) for layer in (0, 1, 0))
    moe.check_all()
    s.close()


@pytest.mark.parametrize("n_experts, n_slots", [(1, 1), (1, 3), (512, 5), (512, 600)])
def test_one_expert_and_512_of_which_all_are_active(n_experts, n_slots):
    moe = Experts(n_slots, threads=6, n_experts=n_experts)
    s = moe.streamer
    s.start()
    for layer in (0, 1, 2, 2):
        assert moe.compute(layer, list(range(n_experts)))
    moe.check_all()
    s.close()
    assert s.loads == moe.misses


def test_nothing_is_read_twice_for_a_layer():
    """Each part of each missing expert is one request, whoever asks, wakes or waits for slots."""
    moe = Experts(n_slots=6, threads=6, plan=FaultPlan(delay_s=0.0005))
    s = moe.streamer
    extents = []
    read = s._team.read
    s._team.read = lambda b, parts, into=None: (extents.extend(parts), read(b, parts, into))[1]
    s.start()
    rng = random.Random(3)
    for _ in range(30):
        for layer in range(N_LAYERS):
            extents.clear()
            chosen = rng.sample(range(N_EXPERTS), rng.randint(1, 8))
            missing = [e for e in chosen if not s.slot_address[layer, e]]
            os.write(s.request_fd, bytes(8 * rng.randrange(4)))  # nobody asked
            assert moe.compute(layer, chosen, rng)
            wanted = [part for e in missing for part in moe.parts(layer, e)]
            assert sorted(e.offset for e in extents) == sorted(p.offset for p in wanted)
    s.close()


def test_reset_with_reads_under_way_keeps_what_is_resident():
    moe = Experts(n_slots=3, threads=2, plan=FaultPlan(delay_s=0.003))
    s = moe.streamer
    s.start()
    for _ in range(15):
        assert moe.compute(2, [0, 1])
        s.board[0], s.board[1] = 1, 3  # ask and walk away
        s.expert[:3] = [5, 6, 7]
        s.state[:3] = WANTED
        os.write(s.request_fd, bytes(8))
        time.sleep(0.002)
        s.reset()
        assert s.board[1] == 0 and (s.state == DONE).all()
        moe.check_all()
    assert moe.compute(1, [0, 1, 2, 3, 4, 5, 6, 7])
    s.close()


def test_a_slot_being_filled_is_not_taken_for_another_expert():
    """The only slot is being filled for a board that is gone when the next expert is wanted."""
    gate = threading.Event()
    # Of four threads three read: two parts are under way, and the third thread looks at the board.
    moe = Experts(n_slots=1, threads=4, plan=FaultPlan(delay_s=lambda n: 0.0 * gate.wait(20)))
    s = moe.streamer
    s.start()
    for layer, expert in ((0, 5), (1, 6)):
        s.board[0], s.board[1], s.expert[0] = layer, 1, expert
        s.state[0] = WANTED
        os.write(s.request_fd, bytes(8))
        assert wait_for(lambda: s._queue.loads, s.failed)
        time.sleep(0.01)
    assert list(s._queue.loads) == [5]
    gate.set()
    assert wait_for(lambda: not s._queue.loads, s.failed)
    moe.check_all()
    assert moe.resident() == {(0, 5)} and s.state[0] == WANTED
    os.write(s.request_fd, bytes(8))
    assert wait_for(lambda: s.state[0] == READY, s.failed)
    moe.check_all()
    assert moe.resident() == {(1, 6)}
    s.close()


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 4),
    st.lists(
        st.tuples(st.integers(0, 2), st.lists(st.integers(0, 7), min_size=1, unique=True)),
        max_size=25,
    ),
)
def test_experts_under_any_sequence(n_slots, threads, sequence):
    moe = Experts(n_slots, threads)
    moe.streamer.start()
    for layer, experts in sequence:
        assert moe.compute(layer, experts)
    moe.streamer.close()
    assert moe.streamer.loads == moe.misses
