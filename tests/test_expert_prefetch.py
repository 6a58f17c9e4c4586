"""Reading experts ahead: the hint, the queue, the account, and that lies change nothing."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgert.errors import StorageError
from edgert.kernels_cpu import rows
from edgert.kernels_cpu.abi import address_of, row_stride
from edgert.kernels_cpu.moe import moe_route_kernel, moe_route_op, moe_route_ref
from edgert.kernels_cpu.program import ProgramBuilder
from edgert.storage.expert_prefetch import HINT_MAX, Hint, Prefetcher
from edgert.storage.expert_queue import READ_AHEAD, LoadQueue
from edgert.storage.expert_streamer import DONE, READY, WANTED
from edgert.storage.manifest import Extent
from edgert.threads import ThreadTeam
from tests.answers import answer, expected, prompt
from tests.faults import FaultPlan
from tests.slots import wait_for
from tests.test_expert_streamer import N_EXPERTS, N_LAYERS, Experts
from tests.tight import tight

# ---- the hint that compiled code posts ----------------------------------------------------


def hint_ref(logits: np.ndarray, k: int) -> list[int]:
    """First choices of all tokens, then second ones and so on, each expert once."""
    ids = moe_route_ref(logits, k, norm_topk=False)[0]
    return list(dict.fromkeys(ids.T.reshape(-1).tolist()))[:HINT_MAX]


@pytest.fixture(scope="module")
def team() -> Iterator[ThreadTeam]:
    team = ThreadTeam(2)
    yield team
    team.close()


@pytest.mark.parametrize(("experts", "k"), [(1, 1), (8, 8), (40, 3), (512, 20)])
def test_a_hint_is_what_its_slow_twin_says(
    team: ThreadTeam, experts: int, k: int, rng: np.random.Generator
) -> None:
    ends = os.pipe()
    os.set_blocking(ends[0], False)
    board = np.zeros(rows.HINT_EXPERTS + rows.HINT_MAX, np.int64)
    resident = np.zeros((3, experts), np.int64)
    team.streams[:] = 0
    team.streams[rows.S_HINTS] = address_of(board)
    team.streams[rows.S_SLOT_ADDRESS] = address_of(resident)
    team.streams[rows.S_REQUEST_FD] = ends[1]
    for tokens, clock in ((1, 7), (8, 8), (5, 9), (3, 10)):
        logits = rng.normal(size=(tokens, -(-experts // 16) * 16)).astype(np.float32)
        logits[0, 0] = np.nan if tokens > 3 else logits[0, 0]
        logits[-1] = np.nan if tokens == 5 else logits[-1]
        wanted = hint_ref(logits[:, :experts].copy(), k)
        resident[2] = rng.integers(0, 2, experts) if tokens != 3 else 1
        ids, weights = np.zeros((tokens, k), np.int64), np.zeros((tokens, k), np.float32)
        builder = ProgramBuilder()
        arguments = moe_route_op(
            logits=address_of(logits), logits_stride=row_stride(logits), n_experts=experts,
            top_k=k, norm_topk=False, scale=1.0, ids=address_of(ids), ids_stride=8 * k,
            weights=address_of(weights), weights_stride=4 * k,
        )  # fmt: skip
        with builder.ahead():
            builder.hint(moe_route_kernel, arguments, 2, address_of(ids), k, experts)
        program = builder.finish()
        team.streams[rows.S_CLOCK] = clock
        team.frame[rows.F_N_TOKENS] = tokens
        team.frame[rows.F_HINTS] = 0
        before = board.copy()
        team.run(program)
        assert np.array_equal(board, before)  # a pass without hints
        team.frame[rows.F_HINTS] = 1
        team.run(program)
        due, layer, count = board[:3].tolist()
        assert (due, layer, board[3 : 3 + count].tolist()) == (clock + 1, 2, wanted)
        assert (not resident[2, wanted].all()) == _told(ends[0])
    for end in ends:
        os.close(end)
    assert HINT_MAX == rows.HINT_MAX


def _told(fd: int) -> bool:
    try:
        return len(os.read(fd, 64)) == 8
    except BlockingIOError:
        return False


def test_hints_are_the_next_router_applied_to_this_layers_state(tiny_moe_gguf: Path) -> None:
    with tight(tiny_moe_gguf, 2400 * 1024) as engine:
        streamer, control, spec = engine.weights.experts, engine.experts, engine.spec
        assert streamer is not None and control is not None
        assert streamer.hinting
        norm = engine.weights.vector_values("blk.1.ffn_norm.weight").astype(np.float64)
        entry = engine._manifest.tensors["blk.1.ffn_gate_inp.weight"]
        raw = engine.weights._read(entry.extent).copy()
        matrix = raw.view(np.float32).reshape(entry.shape).astype(np.float64)
        end = engine.forward.row_names.index("blk.0.experts") + 1
        seen: list[list[int]] = []

        def look(part: int, _n: int) -> None:
            board = streamer.prefetcher.board
            assert board[1] == 1
            h = control.buffers["x"][0, : spec.hidden_size].astype(np.float64)
            h = h / np.sqrt((h * h).mean() + spec.rms_norm_eps) * norm
            best = np.argsort(-(matrix @ h), kind="stable")[: spec.num_experts_per_tok]
            seen.append(board[3 : 3 + board[2]].tolist())
            assert seen[-1] == best.tolist()

        for token in prompt(tiny_moe_gguf)[:6]:
            engine.forward.walk_in_parts([token], spec.vocab_size, [end], look)
        assert len({tuple(s) for s in seen}) > 1


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


# ---- the streamer -------------------------------------------------------------------------


def hint(moe: Experts, layer: int, experts: list[int], due: int | None = None) -> None:
    board = moe.streamer.prefetcher.board
    board[2] = 0
    board[3 : 3 + len(experts)] = experts
    board[:2] = moe.clock + 1 if due is None else due, layer
    board[2] = len(experts)
    os.write(moe.streamer.request_fd, bytes(8))


def test_an_expert_read_ahead_is_a_hit() -> None:
    moe = Experts(n_slots=12)
    s = moe.streamer
    s.start()
    assert moe.compute(0, [1, 2])
    hint(moe, 1, [3, 4])
    assert wait_for(lambda: s.slot_address[1, 3] and s.slot_address[1, 4], s.failed)
    assert moe.compute(1, [3]) and moe.misses == 2
    s.note_pass(0, 0.0)
    counts = s.prefetcher.counts
    assert (counts.useful, counts.late, counts.wasted) == (1, 0, 1)
    moe.check_all()
    s.close()


@pytest.mark.parametrize("n_slots", [1, 2, 3])
def test_with_few_slots_nothing_is_read_ahead(n_slots: int) -> None:
    moe = Experts(n_slots, threads=3)
    s = moe.streamer
    s.start()
    for layer in (0, 1, 2, 0):
        assert moe.compute(layer, [1, 2])
        hint(moe, (layer + 1) % 3, [5, 6])
    assert moe.compute(1, [1, 2])
    s.close()
    assert s.loads == moe.misses and s.prefetcher.counts.useful == 0


def test_what_the_layer_asks_for_does_not_wait_for_what_was_guessed_wrongly() -> None:
    """Queued parts of wrong guesses are never read once their layer has asked."""
    gate, blocked = threading.Event(), threading.Event()

    def wait(_number: int) -> float:
        blocked.set()
        gate.wait(20)
        return 0.0

    moe = Experts(n_slots=24, threads=2, plan=FaultPlan())  # one thread reads, one places
    s = moe.streamer
    s.start()
    assert moe.compute(0, [0])
    moe.backend.plan = FaultPlan(delay_s=wait)
    hint(moe, 1, [2, 3, 4])
    assert wait_for(blocked.is_set, s.failed)  # a part of expert 2 is under way
    done = threading.Thread(target=lambda: moe.compute(1, [3, 7]))
    done.start()
    assert wait_for(lambda: s.board[0] == 1 and s.state[1] == WANTED, s.failed)
    gate.set()
    done.join()
    s.note_pass(0, 0.0)
    counts = s.prefetcher.counts
    assert (counts.useful, counts.late, counts.wasted) == (0, 1, 1)
    assert moe.backend.reads == 2 + 1 + 4
    assert not s._queue.loads
    moe.check_all()
    s.close()


def test_a_failing_read_of_what_nobody_asked_for_fails_nothing_until_it_is() -> None:
    moe = Experts(n_slots=24, threads=3)
    s = moe.streamer
    s.start()
    assert moe.compute(0, [0])
    moe.backend.plan = FaultPlan(fail_from=0)
    before = moe.backend.reads
    hint(moe, 1, [2])
    assert wait_for(lambda: moe.backend.reads > before and not s._queue.loads, s.failed)
    assert not s.prefetcher.on  # for a while
    assert moe.compute(0, [0]) and not s.failed[0]
    assert not moe.compute(1, [2])
    with pytest.raises(StorageError, match="read"):
        s.raise_if_failed()
    moe.backend.plan = FaultPlan()
    s.reset()
    assert moe.compute(1, [2])
    moe.check_all()
    s.close()


@pytest.mark.parametrize("threads", [1, 3, 6])
@pytest.mark.parametrize("n_slots", [1, 2, 4, 5, 9, 24])
def test_hints_that_lie_cost_time_and_nothing_else(n_slots: int, threads: int) -> None:
    """Right, wrong, duplicate, out of range, of any layer, at any moment, also while it resets."""
    moe = Experts(n_slots, threads, plan=FaultPlan(delay_s=0.0002))
    s = moe.streamer
    s.start()
    rng = random.Random(n_slots * 10 + threads)
    for turn in range(30):
        for layer in range(N_LAYERS):
            experts = [rng.randrange(-2, N_EXPERTS + 2) for _ in range(rng.randrange(12))]
            due = None if rng.random() < 0.7 else rng.randrange(-5, 2**62)
            hint(moe, rng.choice([layer, (layer + 1) % 3, 7, -1]), experts, due)
            if rng.random() < 0.3:
                assert wait_for(lambda: not s._queue.takers, s.failed)
            assert moe.compute(layer, rng.sample(range(8), rng.randint(1, 6)), rng)
        s.note_pass(0, 0.0)
        if turn % 10 == 9:
            s.reset()
            moe.check_all()
            assert not s._queue.loads
    s.close()
    addresses = s.slot_address[s.slot_address != 0]
    assert len(set(addresses.tolist())) == len(addresses) <= n_slots
    assert (s.state == DONE).all() and READY not in s.state


# ---- the engine ---------------------------------------------------------------------------


@pytest.mark.parametrize("spare", [0, 60 * 1024, 900 * 1024, 2400 * 1024])
@pytest.mark.parametrize("threads", [1, 3])
def test_no_bit_depends_on_what_is_read_ahead(
    tiny_moe_gguf: Path, spare: int, threads: int
) -> None:
    found = []
    for kind in ("right", "lying", "off"):
        with tight(tiny_moe_gguf, spare, threads=threads, prefill_tokens=1) as engine:
            streamer = engine.weights.experts
            assert streamer is not None and engine.experts is not None
            prefetcher = streamer.prefetcher
            n_keys = int(streamer.last_used.size)
            if kind == "lying":
                prefetcher.rest = lambda: None  # type: ignore[method-assign]

                def lie(p: Prefetcher = prefetcher, keys: range = range(n_keys)) -> Hint:
                    p.hint = Hint(int(p.board[0]) + 1, tuple(random.sample(keys, 4)))
                    return p.hint

                prefetcher.look = lie  # type: ignore[method-assign]
            engine.experts.set_prefetch(kind != "off")
            found.append(answer(engine))
            stats = engine.experts.stats()
            if kind == "off":
                assert (stats.ahead_useful, stats.ahead_late, stats.ahead_wasted) == (0, 0, 0)
            assert (stats.hits, stats.misses) == engine.experts.counts
    assert found == [expected(tiny_moe_gguf)[1]] * 3


def test_the_environment_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGERT_PREFETCH", "off")
    assert not Prefetcher((2, 4)).on
