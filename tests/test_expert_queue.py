"""Reading experts ahead: the order of reads, and the account of whether it pays."""

from __future__ import annotations

import numpy as np
import pytest

from edgert.storage.expert_prefetch import HINT_MAX, Hint, Prefetcher
from edgert.storage.expert_queue import READ_AHEAD, LoadQueue
from edgert.storage.expert_slots import ExpertSlots
from edgert.storage.manifest import Extent
from edgert.storage.window import Window
from tests.slots import pages

# ---- the queue ----------------------------------------------------------------------------


def extents(count: int) -> list[Extent]:
    return [Extent(0, 100 * i, 100) for i in range(count)]


def test_what_is_wanted_is_read_first_and_few_read_ahead() -> None:
    queue = LoadQueue()
    ahead = queue.order(5, extents(3), due=9)
    assert queue.takers == READ_AHEAD
    jobs = [queue.take(reader) for reader in range(READ_AHEAD)]
    assert all(job is not None and job.load is ahead for job in jobs)
    assert queue.take(99) is None and queue.takers == 0
    wanted = queue.order(6, extents(2))
    assert queue.takers == 2
    again = [queue.take(reader) for reader in (0, 1, 2)]
    assert [None if job is None else job.load for job in again] == [wanted, wanted, ahead]
    assert ahead.under_way == 3 and queue.queued_ahead() == set()


def test_what_is_claimed_goes_on_with_the_parts_it_lacks() -> None:
    queue = LoadQueue()
    load = queue.order(5, extents(4), due=9)
    first, second = queue.take(0), queue.take(1)
    assert first is not None and second is not None
    assert queue.drop({5}) == [] and len(load.dropped) == 2  # parts are under way
    assert queue.take(2) is None
    assert queue.give_back(second) is False and len(load.dropped) == 3
    queue.claim(load)
    parts = [queue.take(reader) for reader in (3, 4, 5)]
    assert sorted(job.part for job in parts if job is not None) == [1, 2, 3]
    for job in (first, *parts):
        assert job is not None and queue.placed(job) is False
    assert load.left == 0 and not queue.loads


def test_what_is_dropped_is_given_up_with_its_last_part_under_way() -> None:
    queue = LoadQueue()
    queue.order(5, extents(3), due=9)
    other = queue.order(7, extents(1), due=9)
    job = queue.take(0)
    assert job is not None
    assert queue.drop({5, 7}) == [other]
    assert queue.placed(job) is True and not queue.loads


# ---- the account --------------------------------------------------------------------------


def post(prefetcher: Prefetcher, due: int, layer: int, experts: list[int]) -> Hint | None:
    prefetcher.board[:3] = due, layer, len(experts)
    prefetcher.board[3 : 3 + len(experts)] = experts[:HINT_MAX]
    return prefetcher.look()


def test_hints_are_checked() -> None:
    prefetcher = Prefetcher((3, 8))
    assert prefetcher.look() is None
    assert post(prefetcher, 4, 2, [7, 1, 7, -3, 8, 2**40]) == Hint(4, (23, 17))
    assert prefetcher.look() is None  # seen
    for due, layer, experts in ((5, 3, [1]), (5, -1, [1]), (5, 1, []), (0, 1, [1]), (-2, 1, [1])):
        assert post(prefetcher, due, layer, experts) is None
    prefetcher.board[:3] = 6, 1, HINT_MAX + 1
    assert prefetcher.look() is None


def test_what_was_read_ahead_is_judged_when_its_layer_is_over() -> None:
    prefetcher, stamps = Prefetcher((3, 8)), np.zeros(24, np.int64)
    prefetcher.loaded(9, 5)
    prefetcher.loaded(10, 5)
    prefetcher.loaded(17, 6)
    assert prefetcher.settle(stamps, 4) == 0
    stamps[9] = 5
    assert prefetcher.settle(stamps, 5) == 1
    prefetcher.late()
    prefetcher.dropped()
    counts = prefetcher.counts
    assert (counts.useful, counts.late, counts.wasted) == (1, 1, 2)
    stamps[17] = 6
    assert prefetcher.settle(stamps, 100) == 1


def test_it_rests_where_it_is_wrong_more_than_right_and_longer_each_time() -> None:
    prefetcher, rests = Prefetcher((3, 8)), []
    for _ in range(3):
        for i in range(64):
            assert prefetcher.on
            prefetcher.late() if i % 4 == 0 else prefetcher.dropped()
            prefetcher.pass_ended(0, 0.0)
        passes = 0
        while not prefetcher.on:
            prefetcher.pass_ended(0, 0.0)
            passes += 1
        rests.append(passes)
    assert rests == [64, 128, 256]
    for i in range(640):
        prefetcher.dropped() if i % 2 else prefetcher.late()
        prefetcher.pass_ended(0, 0.0)
    assert prefetcher.on  # right as often as wrong


@pytest.mark.parametrize(
    ("with_hints", "stays"), [(0.9, True), (0.985, True), (1.0, False), (1.2, False)]
)
def test_passes_with_and_without_hints_take_turns_and_the_faster_stay(
    with_hints: float, stays: bool
) -> None:
    """An eighth of the passes is disturbed tenfold, which medians do not see."""
    prefetcher = Prefetcher((3, 8))
    for _ in range(3):
        seen = []
        for i in range(64):
            seen.append(prefetcher.on)
            slow = 10 if i % 16 in (3, 7) else 1
            prefetcher.pass_ended(1, slow * (with_hints if prefetcher.on else 1.0))
            prefetcher.pass_ended(7, 1e9)  # one of several tokens says nothing
        assert seen == ([True] * 4 + [False] * 4) * 8
        for _ in range(1024):
            assert prefetcher.on == stays
            prefetcher.pass_ended(1, 1e9)


def test_what_is_not_allowed_is_not_tried() -> None:
    prefetcher = Prefetcher((3, 8))
    prefetcher.allowed = False
    for _ in range(200):
        assert not prefetcher.on
        prefetcher.pass_ended(1, 1.0)
    prefetcher.allowed = True
    assert prefetcher.on


# ---- slots --------------------------------------------------------------------------------


@pytest.mark.parametrize("used_meanwhile", [False, True])
def test_what_is_used_while_it_is_evicted_for_a_guess_is_taken_back(used_meanwhile: bool) -> None:
    """Compiled code stamps an expert, then looks it up; a guess may be evicting it just then."""
    slots = ExpertSlots((1, 8), Window(pages(2 * 4096), 4096), np.zeros(1, np.int64), None)
    for item in slots.move_in([0, 1], np.zeros(2, np.bool_)):
        slots.publish(item.expert)
    slots.stamps[[0, 1]] = 1, 2
    before = slots.address.copy()

    def meanwhile() -> None:
        assert slots.address[0] == 0 and slots.address[1], "the older one has to go"
        if used_meanwhile:
            slots.stamps[0] = 3

    found = slots.move_in_ahead(5, np.zeros(2, np.bool_), (), meanwhile)
    assert [item.expert for item in found] == ([] if used_meanwhile else [5])
    if used_meanwhile:
        assert np.array_equal(slots.address, before)
        assert slots.slot_of[[0, 1, 5]].tolist()[2] == -1 and set(slots.owner.tolist()) == {0, 1}
    else:
        assert slots.slot_of[0] == -1 and slots.owner[slots.slot_of[5]] == 5
