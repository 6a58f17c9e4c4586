"""Experts whose parts lie in the file as in their slots: read there, and placed by nobody."""

from __future__ import annotations

import os
import random
import threading

import pytest

from edgert.errors import StorageError
from edgert.storage.expert_streamer import READY, WANTED
from edgert.storage.manifest import Extent
from tests.faults import FaultPlan
from tests.slots import at_address, wait_for
from tests.test_expert_streamer import N_EXPERTS, N_LAYERS, Experts


class Packed(Experts):
    """Experts whose parts lie in the file as in their slots: whole blocks of the device."""

    SIZES = (512, 1024)  # bytes of the parts

    def __init__(self, *args, **options):
        super().__init__(*args, room=self.room, record=sum(self.SIZES), **options)
        self.placed = self.kept = 0

    def parts(self, layer, expert):
        first = (layer * self.n_experts + expert) * sum(self.SIZES)
        return Extent(0, first, 512), Extent(0, first + 512, 1024)

    def place(self, layer, expert, part, raw, slot):
        slot[512 * part : 512 * part + len(raw)] = raw
        self.placed += 1

    def room(self, layer, expert, part, slot):
        self.kept += 1
        return slot[512 * part : 512 * part + self.SIZES[part]]

    def check(self, layer, expert, address):
        got = at_address(self.window, int(address), sum(self.SIZES))
        assert got == self.data[layer, expert].tobytes()


@pytest.mark.parametrize("n_slots", [1, 3, 8, 24])
@pytest.mark.parametrize("threads", [1, 6])
def test_parts_that_lie_as_in_their_slots_are_read_there(n_slots, threads):
    moe = Packed(n_slots, threads, plan=FaultPlan(delay_s=0.0002))
    s = moe.streamer
    s.start()
    rng = random.Random(n_slots)
    for _ in range(20):
        for layer in range(N_LAYERS):
            assert moe.compute(layer, rng.sample(range(N_EXPERTS), rng.randint(1, 8)), rng)
    moe.check_all()
    s.close()
    assert s.loads == moe.misses and moe.backend.reads == 2 * s.loads
    assert moe.placed + moe.kept == 2 * s.loads


def test_a_slot_is_chosen_once_the_disk_has_something_to_do():
    """The first part of a layer is read at once and placed; the others are read to their slots."""
    gate = threading.Event()
    moe = Packed(n_slots=4, threads=4, plan=FaultPlan(delay_s=lambda n: 0.0 * gate.wait(20)))
    s = moe.streamer
    s.start()
    s.board[:2], s.expert[:2], s.state[:2] = (0, 2), (5, 6), WANTED
    os.write(s.request_fd, bytes(8))
    assert wait_for(lambda: s._team._reading == 3, s.failed)  # of four threads three read
    assert (moe.kept, moe.placed) == (2, 0) and (s.slots.slot_of[[5, 6]] >= 0).all()
    gate.set()
    assert wait_for(lambda: (s.state[:2] == READY).all(), s.failed)
    assert (moe.kept, moe.placed) == (3, 1)
    moe.check_all()
    s.close()


def test_a_failing_read_into_a_slot_is_handed_over_and_recovered_from():
    for n in (1, 2, 3, 7, 12):
        moe = Packed(n_slots=6, threads=6, plan=FaultPlan(fail={n}, delay_s=0.001))
        s = moe.streamer
        s.start()
        assert not all(moe.compute(layer, list(range(8))) for layer in (0, 1))
        with pytest.raises(StorageError, match=f"read {n}"):
            s.raise_if_failed()
        s.reset()
        moe.check_all()
        assert all(moe.compute(layer, list(range(8))) for layer in (0, 1, 0))
        moe.check_all()
        s.close()
