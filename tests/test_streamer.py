"""The dense streamer, with a Python consumer in the place of compiled code."""

from __future__ import annotations

import os
import random
import threading
import time

import numpy as np
import pytest
from faults import FaultPlan, FaultyBackend, fill
from slots import ALIGNMENT, at_address, pages, wait_for

from edgert.errors import StorageError
from edgert.storage.backend import MemoryBackend
from edgert.storage.manifest import Extent
from edgert.storage.reader import parts_bytes
from edgert.storage.streamer import Streamer, Tile, staging_bytes
from edgert.storage.window import Window


class Dense:
    """A streamer over random bytes whose `place` flips every bit, and its consumer.

    With `stay` the parts of every second tile are read into its slot.
    """

    def __init__(self, n_tiles=7, n_slots=2, threads=2, seed=0, plan=None, stay=False):
        rng = random.Random(seed)
        self.data = [fill(60_000, seed=seed), fill(30_001, seed=seed + 1)]
        self.backend = FaultyBackend(
            MemoryBackend([d.tobytes() for d in self.data], ALIGNMENT), plan
        )
        self.tiles = []
        for i in range(n_tiles):
            parts = []
            for _ in range(rng.randint(1, 3)):
                file = rng.randint(0, 1)
                nbytes = rng.randint(1, 1500)
                parts.append(Extent(file, rng.randint(0, len(self.data[file]) - nbytes), nbytes))
            room = parts_bytes(parts, ALIGNMENT) if stay and i % 2 else 0
            self.tiles.append(Tile(i, tuple(parts), sum(p.nbytes for p in parts), room))
        self.window = Window(pages(n_slots * 12288), 12288)
        need = staging_bytes(self.tiles, ALIGNMENT)
        staging = [pages(need) for _ in range(threads)]
        self.streamer = Streamer(self.backend, self.tiles, self.window, staging, self.place)

    def place(self, tile, raw, slot):
        assert [r.nbytes for r in raw] == [p.nbytes for p in tile.parts]
        assert slot.nbytes == tile.nbytes
        inside = [self.window.address(0) <= r.ctypes.data < slot.ctypes.data for r in raw]
        assert not tile.raw_bytes or all(inside)
        np.bitwise_xor(np.concatenate(raw), 255, out=slot)

    def expected(self, tile) -> bytes:
        parts = [self.data[p.file_index][p.offset : p.offset + p.nbytes] for p in tile.parts]
        return (np.concatenate(parts) ^ 255).tobytes()

    def consume(self, first_pass: int, passes: int, until: int | None = None) -> int:
        """Use tiles in order; returns how many before the end, `until` or a failure."""
        s = self.streamer
        used = 0
        for turn in range(first_pass, first_pass + passes):
            for tile in self.tiles:
                if used == until:
                    return used
                i = tile.index
                if not wait_for(lambda i=i, turn=turn: s.ready[i] == turn + 1, s.failed):
                    return used
                start = int(s.address[i]) - tile.raw_bytes
                found = at_address(self.window, start, tile.raw_bytes + tile.nbytes)
                assert found[tile.raw_bytes :] == self.expected(tile)
                slot = int(s.slot_of[i])
                assert self.window.address(slot) == start
                self.window.view(slot)[:] = 0  # what is handed back may be overwritten
                os.write(s.free_fd, slot.to_bytes(8, "little"))
                used += 1
        return used


@pytest.mark.parametrize("stay", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("n_slots", [2, 3, 6])
def test_tiles_arrive_whole_and_in_order_pass_after_pass(threads, n_slots, stay):
    dense = Dense(n_slots=n_slots, threads=threads, seed=threads * 10 + n_slots, stay=stay)
    dense.streamer.start()
    assert dense.consume(0, 30) == 30 * 7
    dense.streamer.close()
    dense.streamer.close()
    assert 30 * 7 <= dense.streamer.tiles_loaded <= 30 * 7 + n_slots
    per_pass = sum(parts_bytes(t.parts, ALIGNMENT) for t in dense.tiles)
    assert 30 * per_pass <= dense.streamer.read_bytes <= 31 * per_pass
    assert 0 < dense.streamer.busy_ns <= dense.streamer.read_ns
    assert dense.streamer.failed[0] == 0
    dense.streamer.raise_if_failed()


def test_slots_handed_back_out_of_order_and_slow_reads():
    """Two tiles held at a time, the later one handed back first; the reads vary in time."""
    rng = random.Random(5)
    plan = FaultPlan(delay_s=lambda n: rng.random() * 0.002)
    dense = Dense(n_tiles=6, n_slots=4, threads=4, seed=9, plan=plan)
    s = dense.streamer
    s.start()
    for turn in range(10):
        for i in range(0, 6, 2):
            for tile in dense.tiles[i : i + 2]:
                assert wait_for(lambda t=tile, p=turn: s.ready[t.index] == p + 1, s.failed)
            for tile in reversed(dense.tiles[i : i + 2]):
                got = at_address(dense.window, int(s.address[tile.index]), tile.nbytes)
                assert got == dense.expected(tile)
                os.write(s.free_fd, int(s.slot_of[tile.index]).to_bytes(8, "little"))
    s.close()


def test_readers_run_ahead_until_the_slots_are_full_and_then_sleep():
    dense = Dense(n_tiles=7, n_slots=5, threads=2)
    s = dense.streamer
    s.start()
    assert wait_for(lambda: s.tiles_loaded == 5, s.failed)
    assert wait_for(lambda: s.ready.tolist() == [1, 1, 1, 1, 1, 0, 0], s.failed)
    reads = dense.backend.reads
    time.sleep(0.05)
    assert dense.backend.reads == reads
    os.write(s.free_fd, int(s.slot_of[0]).to_bytes(8, "little"))
    assert wait_for(lambda: s.ready[5] == 1, s.failed)
    s.close()


@pytest.mark.parametrize("threads", [1, 2, 3, 6])
def test_threads_that_place_leave_others_that_read(threads):
    """While no tile is placed, reads go on into every buffer; a third at most is being placed."""
    dense = Dense(n_tiles=9, n_slots=8, threads=threads)
    true, go_on, inside, taken = dense.place, threading.Event(), [], []

    def place(tile, raw, slot):
        inside.append(tile.index)
        taken.append(len(inside))
        assert go_on.wait(60)
        true(tile, raw, slot)
        inside.remove(tile.index)

    s = dense.streamer
    s._place = place
    s.start()
    placing = max(1, threads // 3)
    assert wait_for(lambda: len(inside) == placing, s.failed)
    first = sum(len(tile.parts) for tile in dense.tiles[:threads])
    assert wait_for(lambda: dense.backend.reads == first, s.failed)
    time.sleep(0.02)
    assert dense.backend.reads == first and s.tiles_loaded == 0
    go_on.set()
    assert dense.consume(0, 3) == 27
    assert max(taken) == placing
    s.close()


@pytest.mark.parametrize("threads", [1, 3])
def test_reset_in_mid_pass_begins_again_at_tile_0(threads):
    dense = Dense(n_slots=3, threads=threads, seed=4, plan=FaultPlan(delay_s=0.0005))
    s = dense.streamer
    ready, address, slot_of = s.ready.ctypes.data, s.address.ctypes.data, s.slot_of.ctypes.data
    s.start()
    for until in range(0, 20):
        assert dense.consume(0, 4, until) == until
        s.reset()
    assert dense.consume(0, 3) == 21
    assert (s.ready.ctypes.data, s.address.ctypes.data, s.slot_of.ctypes.data) == (
        ready,
        address,
        slot_of,
    )
    s.close()


@pytest.mark.parametrize("stay", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_any_failing_read_is_handed_over_and_can_be_recovered_from(threads, stay):
    reads_per_pass = sum(len(t.parts) for t in Dense(seed=2).tiles)
    for n in range(1, 2 * reads_per_pass + 2):
        dense = Dense(seed=2, threads=threads, plan=FaultPlan(fail={n}), stay=stay)
        s = dense.streamer
        s.start()
        assert dense.consume(0, 4) < 28
        assert s.failed[0] == 1
        with pytest.raises(StorageError, match=f"Input/output error .read {n}") as info:
            s.raise_if_failed()
        assert info.value.path in dense.backend.paths
        with pytest.raises(StorageError):
            s.raise_if_failed()  # until reset
        s.reset()
        s.raise_if_failed()
        assert dense.consume(0, 2) == 14
        s.close()


def test_an_error_that_stays_fails_again_and_close_still_works():
    dense = Dense(plan=FaultPlan(fail_from=1))
    s = dense.streamer
    s.start()
    for _ in range(3):
        assert dense.consume(0, 1) == 0
        with pytest.raises(StorageError):
            s.raise_if_failed()
        s.reset()
    s.close()
    assert threading.active_count() < 10


@pytest.mark.parametrize("stay", [False, True])
def test_an_error_in_place_reaches_the_caller(stay):
    dense = Dense(stay=stay)

    def place(tile, raw, slot):
        if bool(tile.raw_bytes) == stay:
            raise ZeroDivisionError("in place")

    dense.streamer._place = place
    dense.streamer.start()
    assert dense.streamer.failed[0] or wait_for(lambda: False, dense.streamer.failed) is False
    with pytest.raises(ZeroDivisionError, match="in place"):
        dense.streamer.raise_if_failed()
    dense.streamer.close()


@pytest.mark.parametrize("slot", [99, -7])
def test_a_slot_that_does_not_exist_is_our_bug(slot):
    dense = Dense()
    dense.streamer.start()
    os.write(dense.streamer.free_fd, slot.to_bytes(8, "little", signed=True))
    assert wait_for(lambda: False, dense.streamer.failed) is False
    with pytest.raises(AssertionError, match=f"slot {slot} does not exist"):
        dense.streamer.raise_if_failed()
    dense.streamer.close()


def test_closing_before_starting_and_threads_that_end():
    before = threading.active_count()
    dense = Dense(threads=4)
    dense.streamer.close()
    dense = Dense(threads=4)
    dense.streamer.start()
    assert threading.active_count() == before + 4
    dense.streamer.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("refused", [1, 2, 4])
def test_a_system_out_of_threads_leaves_nothing_behind(monkeypatch, refused):
    before = threading.active_count()
    dense = Dense(threads=4)
    true, started = threading.Thread.start, []

    def start(thread):
        started.append(thread)
        if len(started) == refused:
            raise RuntimeError("can't start new thread")
        true(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="can't start"):
        dense.streamer.start()
    dense.streamer.close()
    assert threading.active_count() == before


def test_a_streamer_needs_two_slots_and_more_tiles_than_slots():
    for n_tiles, n_slots in ((7, 1), (3, 3), (2, 4)):
        with pytest.raises(AssertionError):
            Dense(n_tiles=n_tiles, n_slots=n_slots)
