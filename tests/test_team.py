"""The thread team: every unit of every row once, barriers that hold, waits that can be ended.

The op kernel of these tests counts: unit u of row r adds one to its cell, and notes when it saw a
cell of the row before the last barrier that was not complete.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgert.kernels_cpu import rows
from edgert.kernels_cpu.abi import FRAME_N_TOKENS, address_of
from edgert.kernels_cpu.atomic import atomic_add, load_int
from edgert.kernels_cpu.experts import group_pairs
from edgert.kernels_cpu.jit import kernel, void
from edgert.kernels_cpu.program import Matrix, ProgramBuilder, Rows, Segment
from edgert.quant.formats import BY_NAME
from edgert.threads import ThreadTeam

Ints = npt.NDArray[np.int64]
CELLS, BEFORE, BEFORE_UNITS, EARLY = range(8, 12)  # arguments of the counting kernel's row


@kernel(void("iiiii"))
def _count_kernel(op, frame, start, stop, tid):  # type: ignore[no-untyped-def]
    """Count each unit; count as early when a cell of the earlier row is still 0."""
    before = load_int(op + 8 * BEFORE)
    for i in range(load_int(op + 8 * BEFORE_UNITS)):
        if load_int(before + 8 * i) != 1:
            atomic_add(load_int(op + 8 * EARLY), 1)
    for unit in range(start, stop):
        atomic_add(load_int(op + 8 * CELLS) + 8 * unit, 1)


@kernel(void("iii"))
def _group_kernel(op, frame, streams):  # type: ignore[no-untyped-def]
    group_pairs(op, frame, streams)


@kernel(void("iiiii"))
def _tid_kernel(op, frame, start, stop, tid):  # type: ignore[no-untyped-def]
    """Count units by thread."""
    atomic_add(load_int(op + 8 * CELLS) + 8 * tid, stop - start)


@pytest.fixture(scope="module", params=[1, 2, 3, 5])
def team(request: pytest.FixtureRequest) -> Iterator[ThreadTeam]:
    team = ThreadTeam(request.param)
    yield team
    team.close()


def test_every_unit_of_a_random_program_once_and_none_early(
    team: ThreadTeam, rng: np.random.Generator
) -> None:
    for _ in range(12):
        tokens = int(rng.integers(1, 6))
        builder, cells, early = ProgramBuilder(), [], np.zeros(1, np.int64)
        complete: Ints | None = None
        for _ in range(rng.integers(1, 25)):
            units = int(rng.integers(1, 200))
            cells.append(np.zeros(units * tokens, np.int64))
            before = [address_of(complete), 0 if complete is None else len(complete)]
            builder.call(
                _count_kernel, [address_of(cells[-1]), *before, address_of(early)], units,
                chunk=int(rng.integers(1, 65)),
            )  # fmt: skip
            if rng.random() < 0.5:
                builder.barrier()
                complete = cells[-1]
        program = builder.finish()
        team.frame[FRAME_N_TOKENS] = tokens
        team.frame[rows.F_THREADS] = rng.integers(0, team.threads + 2)
        for turn in range(1, 4):
            team.run(program)
            assert not team.stopped
            assert [c for c in cells if not (c == 1).all()] == [], turn
            assert early[0] == 0
            for cell in cells:
                cell[:] = 0


def test_only_as_many_threads_walk_as_the_frame_says(team: ThreadTeam) -> None:
    by_thread = np.zeros(8, np.int64)
    builder = ProgramBuilder()
    for _ in range(4):
        builder.call(_tid_kernel, [address_of(by_thread)], 300)
        builder.barrier()
    program = builder.finish()
    team.arm()
    team.frame[:], team.frame[rows.F_N_TOKENS] = 0, 1
    for walkers in range(team.threads + 2):
        by_thread[:] = 0
        team.frame[rows.F_THREADS] = walkers
        team.run(program)
        assert by_thread.sum() == 4 * 300
        assert not by_thread[walkers or team.threads :].any()
    team.frame[:] = 0


def streamed_program(ready: Ints) -> tuple[Any, list[Any]]:
    """One product of a 64 x 32 matrix whose tile 0 is streamed, and what it needs kept alive."""
    fmt = BY_NAME["F32"]
    x, y, index = np.ones((1, 32), np.float32), np.zeros((1, 64), np.float32), np.arange(8)
    weights = np.ones(64 * 32, np.float32)
    builder = ProgramBuilder()
    matrix = Matrix(fmt, 32, (Segment(4, 0, 0),))
    builder.matmul(matrix, Rows(address_of(x), 128), Rows(address_of(y), 256), address_of(index))
    address = np.array([address_of(weights)], np.int64)
    slot_of = np.array([7], np.int64)
    return builder.finish(), [x, y, index, weights, address, slot_of, ready]


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def describe(team: ThreadTeam, kept: list[Any], failed: Ints, fd: int) -> None:
    address, slot_of, ready = kept[-3:]
    team.streams[:] = 0
    team.streams[rows.S_READY] = address_of(ready)
    team.streams[rows.S_ADDRESS] = address_of(address)
    team.streams[rows.S_SLOT_OF] = address_of(slot_of)
    team.streams[rows.S_FREE_FD] = fd
    team.streams[rows.S_FAILED] = address_of(failed)
    team.frame[:] = 0
    team.frame[rows.F_N_TOKENS] = 1


def test_a_streamed_tile_is_waited_for_and_its_slot_given_back_once(
    team: ThreadTeam, pipe: tuple[int, int]
) -> None:
    ready, failed = np.zeros(1, np.int64), np.zeros(1, np.int64)
    program, kept = streamed_program(ready)
    describe(team, kept, failed, pipe[1])
    team.take_stall_ns()
    timer = threading.Timer(0.05, lambda: ready.__setitem__(0, 1))
    timer.start()
    team.run(program)
    timer.join()
    assert (kept[1] == 32).all()
    assert team.take_stall_ns() > 0 and team.take_stall_ns() == 0
    os.set_blocking(pipe[0], False)
    assert os.read(pipe[0], 64) == (7).to_bytes(8, "little")
    team.streams[:] = 0


@pytest.mark.parametrize("how", ["stop", "failure"])
def test_a_tile_that_never_comes_does_not_hold_the_walk(
    team: ThreadTeam, pipe: tuple[int, int], how: str
) -> None:
    ready, failed = np.zeros(1, np.int64), np.zeros(1, np.int64)
    program, kept = streamed_program(ready)
    describe(team, kept, failed, pipe[1])
    end = team.stop if how == "stop" else lambda: failed.__setitem__(0, 1)
    timer = threading.Timer(0.05, end)
    timer.start()
    team.run(program)  # returns
    timer.join()
    assert team.stopped == (how == "stop")
    assert (kept[1] == 0).all(), "it was computed without its weights"
    failed[0], ready[0] = 0, 1
    team.arm()
    team.run(program)
    assert (kept[1] == 32).all()
    team.streams[:] = 0


def group_ref(ids: Ints, n_experts: int) -> list[tuple[int, list[int]]]:
    """(expert, ids of its pairs in ascending order) for every expert that was chosen."""
    flat = ids.ravel()
    return [(e, np.flatnonzero(flat == e).tolist()) for e in range(n_experts) if (flat == e).any()]


@pytest.mark.parametrize("routing", ["random", "one for all", "each its own"])
@pytest.mark.parametrize("tokens", [1, 5, 16])
def test_pairs_are_grouped_by_expert(
    rng: np.random.Generator, pipe: tuple[int, int], routing: str, tokens: int
) -> None:
    n_experts, k, layer = 16, 1 if routing != "random" else 3, 1
    ids = np.stack([rng.choice(n_experts, k, replace=False) for _ in range(tokens)])
    if routing == "one for all":
        ids[:] = 5
    elif routing == "each its own":
        ids[:, 0] = rng.permutation(n_experts)[:tokens]
    ids = np.ascontiguousarray(ids, np.int64)
    table = np.where(rng.random((2, n_experts)) < 0.5, 4096 + np.arange(n_experts), 0)
    table = np.ascontiguousarray(table, np.int64)
    used = np.zeros((2, n_experts), np.int64)
    board = np.full(rows.BOARD_ARRAYS + 3 * n_experts, rows.DONE, np.int64)
    groups = np.zeros(2 * n_experts, np.int64)
    pair_token, pair_id = np.zeros(tokens * k, np.int64), np.zeros(tokens * k, np.int64)
    op, frame = np.zeros(rows.OP_FIELDS, np.int64), np.zeros(rows.FRAME_FIELDS, np.int64)
    streams = np.zeros(rows.STREAM_FIELDS, np.int64)
    op[[rows.G_LAYER, rows.G_IDS, rows.G_TOP_K, rows.G_N_EXPERTS]] = (
        layer, address_of(ids), k, n_experts,
    )  # fmt: skip
    frame[rows.F_N_TOKENS] = tokens
    for field, array in (
        (rows.S_BOARD, board), (rows.S_SLOT_ADDRESS, table), (rows.S_LAST_USED, used),
        (rows.S_GROUPS, groups), (rows.S_PAIR_TOKEN, pair_token), (rows.S_PAIR_ID, pair_id),
    ):  # fmt: skip
        streams[field] = address_of(array)
    streams[rows.S_REQUEST_FD] = pipe[1]
    _group_kernel(address_of(op), address_of(frame), address_of(streams))

    want = group_ref(ids, n_experts)
    assert board[: rows.BOARD_ARRAYS].tolist() == [layer, len(want), tokens]
    expert, state, address = board[rows.BOARD_ARRAYS :].reshape(3, n_experts)
    for g, (e, pairs) in enumerate(want):
        first, count = groups[2 * g : 2 * g + 2]
        assert expert[g] == e and pair_id[first : first + count].tolist() == pairs
        assert pair_token[first : first + count].tolist() == [p // k for p in pairs]
        assert address[g] == table[layer, e]
        assert state[g] == (rows.READY if table[layer, e] else rows.WANTED)
    assert (state[len(want) :] == rows.DONE).all()
    chosen = np.isin(np.arange(n_experts), [e for e, _ in want])
    assert (used[layer] == chosen).all() and (used[0] == 0).all()
    hits = sum(bool(table[layer, e]) for e, _ in want)
    assert (streams[rows.S_HITS], streams[rows.S_MISSES]) == (hits, len(want) - hits)
    os.set_blocking(pipe[0], False)
    if hits < len(want):
        assert len(os.read(pipe[0], 64)) == 8
    else:
        with pytest.raises(BlockingIOError):
            os.read(pipe[0], 64)


def test_threads_that_sleep_are_woken_and_leave_no_messages() -> None:
    """Walks with a pause long enough to fall asleep, more often than a pipe has room for."""
    before = threading.active_count()
    team = ThreadTeam(3)
    cells, early = np.zeros(6, np.int64), np.zeros(1, np.int64)
    builder = ProgramBuilder()
    builder.call(_count_kernel, [address_of(cells), 0, 0, address_of(early)], 6, chunk=1)
    program = builder.finish()
    team.frame[FRAME_N_TOKENS] = 1
    for turn in range(1, 9001):
        if turn % 1500 == 0:
            while team.cell(rows.C_ASLEEP)[0] < 3:
                time.sleep(0.001)
        team.run(program)
        assert (cells == turn).all()
    assert int(team.cell(rows.C_ENDED)[0]) == 9000
    team.close()
    team.close()
    assert threading.active_count() == before


@pytest.mark.timeout(60)
def test_no_message_is_lost_when_walks_are_stopped_before_all_are_awake() -> None:
    """A thread that ends a stopped walk at once must not take the message that wakes another."""
    team = ThreadTeam(2)
    builder = ProgramBuilder()
    cells, early = np.zeros(4, np.int64), np.zeros(1, np.int64)
    builder.call(_count_kernel, [address_of(cells), 0, 0, address_of(early)], 4, chunk=1)
    program = builder.finish()
    team.stop()
    for turn in range(2000):
        time.sleep(0.0006 + 0.001 * (turn % 4))  # around the time after which they sleep
        team.run(program)  # would wait for ever
    assert (cells == 0).all() and int(team.cell(rows.C_ENDED)[0]) == 2000
    team.close()
