"""Pages touched ahead of those who fill them: all of a region, or as far as the filling comes."""

from __future__ import annotations

import mmap
import sys
import threading
from pathlib import Path
from threading import Event

import numpy as np
import pytest

import edgert
import edgert.storage.pages
from edgert.storage.pages import TouchAhead, being_touched, resident_in, touch
from tests.slots import wait_for
from tests.tight import tight

PAGE = mmap.PAGESIZE
MIB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux touches")


def touching() -> bool:
    return any(t.name == "edgert-touch" for t in threading.enumerate())


@linux
def test_touched_pages_are_there_and_unchanged(rng: np.random.Generator) -> None:
    nbytes = 20 * MIB  # three pieces
    with mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapping:
        memory = np.frombuffer(mapping, np.uint8)
        memory[5 * MIB : 6 * MIB] = rng.integers(0, 256, MIB, np.uint8)
        before, region = memory[5 * MIB : 6 * MIB].copy(), memory[100 : nbytes - PAGE]
        assert touch(region, Event())
        assert resident_in(region.ctypes.data, region.nbytes) == region.nbytes
        assert (memory[5 * MIB : 6 * MIB] == before).all()
        assert not memory[: 5 * MIB].any() and not memory[6 * MIB :].any()
        del memory, region


@linux
def test_touching_ends_with_the_filling() -> None:
    with mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapping:
        memory = np.frombuffer(mapping, np.uint8)
        stop = Event()
        stop.set()
        assert not touch(memory, stop)
        assert resident_in(memory.ctypes.data, memory.nbytes) == 0
        with pytest.raises(ValueError), being_touched(memory):
            raise ValueError
        assert not touching()
        del memory


def test_a_system_that_cannot_touch(monkeypatch: pytest.MonkeyPatch, tiny_gguf: Path) -> None:
    monkeypatch.setattr(edgert.storage.pages, "_C", None)
    assert not touch(np.zeros(PAGE, np.uint8), Event())
    with tight(tiny_gguf, None) as engine:
        assert engine.generate([1, 2], max_tokens=2).tokens


@linux
def test_touching_stays_a_way_ahead_of_what_is_filled() -> None:
    with mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapping:
        memory, fine = np.frombuffer(mapping, np.uint8), np.zeros(1, np.int64)
        ahead = TouchAhead(memory, 16 * MIB)

        address = memory.ctypes.data

        def touched() -> int:
            return (resident_in(address, 64 * MIB) or 0) // MIB

        for filled, end in ((0, 16), (3, 19), (2, 19), (30, 46)):
            ahead.reached(filled * MIB)
            assert wait_for(lambda end=end: touched() == end, fine), (touched(), end)
        ahead.halt()
        assert not touching() and touched() == 46
        ahead.reached(31 * MIB)  # begins again where it was
        assert wait_for(lambda: touched() == 47, fine)
        ahead.reached(60 * MIB)
        assert wait_for(lambda: touched() == 64 and not touching(), fine)
        ahead.reached(64 * MIB)
        ahead.halt()
        ahead.halt()
        del memory, ahead


@linux
def test_slots_have_pages_before_experts_come() -> None:
    """As far as some experts reach, and nobody touches any once the engine is closed."""
    with edgert.load(edgert.bundled_model(), context_length=64) as engine:
        experts = engine.weights.experts
        assert experts is not None
        room, before = experts.slots.window.room, experts.slots.owner.max()
        assert before == -1 and not resident_in(room.ctypes.data, room.nbytes)
        engine.generate([1, 2, 3], max_tokens=1)
        whole = room.nbytes  # less than the way that touching is ahead
        assert wait_for(lambda: resident_in(room.ctypes.data, whole) == whole, experts.failed)
    assert not touching()
