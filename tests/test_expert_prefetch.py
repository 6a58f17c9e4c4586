"""Reading experts ahead: the hint, what the streamer does with it, and that lies change nothing."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from edgert.errors import StorageError
from edgert.kernels_cpu import rows
from edgert.kernels_cpu.abi import address_of, row_stride
from edgert.kernels_cpu.moe import moe_route_kernel, moe_route_op, moe_route_ref
from edgert.kernels_cpu.program import ProgramBuilder
from edgert.storage.expert_cache import admit
from edgert.storage.expert_policy import Lru, Robust
from edgert.storage.expert_prefetch import HINT_MAX, Hint, Prefetcher
from edgert.storage.expert_slots import ExpertSlots
from edgert.storage.expert_streamer import DONE, READY, WANTED
from edgert.storage.trial import Trial
from edgert.storage.window import Window
from edgert.threads import ThreadTeam
from tests.answers import answer, expected, prompt
from tests.faults import FaultPlan
from tests.slots import pages, wait_for
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
        assert streamer.may_miss and streamer.prefetcher.on
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


def test_slots_ranked_once_a_layer_are_chosen_as_if_ranked_each_time() -> None:
    shape, rng = (N_LAYERS, N_EXPERTS), random.Random(1)
    slots = ExpertSlots(shape, Window(pages(14 * 4096), 4096), np.zeros(1, np.int64), None)
    chosen = 0
    for clock in range(1, 200):
        first = clock % N_LAYERS * N_EXPERTS
        used = [first + e for e in rng.sample(range(N_EXPERTS), 3)]
        slots.stamps[used] = clock
        busy = np.zeros(14, np.bool_)
        slots.move_in([key for key in used if slots.slot_of[key] < 0], busy)
        named = [key for key in rng.sample(range(len(slots.stamps)), 6) if key not in used]
        for key in [key for key in named if slots.slot_of[key] < 0]:
            taken = busy | np.isin(slots.owner, [*used, *named])
            plan = admit(Lru(shape), [key], slots.owner.copy(), slots.stamps, taken)
            assert slots.move_in_ahead(key, busy, named, lambda: None) == plan.admitted
            chosen += len(plan.admitted)
    assert chosen > 100


@pytest.mark.parametrize("n_slots", [9, 20])
def test_a_policy_learns_of_each_miss_once_whenever_it_was_read(n_slots: int) -> None:
    """Read ahead and used, asked for on its way, or read when asked for; the unused are none."""
    policy = Robust((N_LAYERS, N_EXPERTS), n_slots, Lru((N_LAYERS, N_EXPERTS)))
    moe = Experts(n_slots, 4, FaultPlan(delay_s=0.0002), policy_for=lambda _slots: policy)
    s = moe.streamer
    dropped = mock.Mock(side_effect=s.prefetcher.dropped)
    s.prefetcher.dropped = dropped  # type: ignore[method-assign]
    s.start()
    rng = random.Random(n_slots)
    for _ in range(40):
        for layer in range(N_LAYERS):
            hint(moe, layer, rng.sample(range(N_EXPERTS), 3))
            if rng.random() < 0.5:
                due = moe.clock + 1
                assert wait_for(
                    lambda due=due: s.prefetcher.hint.due == due and not s._queue.loads, s.failed
                )
            assert moe.compute(layer, rng.sample(range(N_EXPERTS), 2))
    assert wait_for(lambda: not s._queue.loads, s.failed)
    s.note_pass(0, 0.0)
    s.close()
    counts = s.prefetcher.counts
    assert counts.useful and counts.late and counts.wasted
    whole_and_unused = counts.wasted - dropped.call_count
    assert policy.misses == s.loads - whole_and_unused < s.loads


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


@pytest.mark.parametrize(("fewer", "all_threads"), [(0.9, 1.0), (1.0, 1.0), (1.1, 1.0)])
def test_a_core_is_left_to_readers_where_passes_are_faster_so(
    fewer: float, all_threads: float
) -> None:
    """Whatever hints cost in their own turns, which are of another length."""
    prefetcher, trial = Prefetcher((2, 4)), Trial(turn=2)
    prefetcher.allowed = True
    ways = []
    for _ in range(200):
        way = trial.on
        ways.append(way)
        hints = 1.5 if prefetcher.on else 1.0
        seconds = (fewer if way else all_threads) * hints
        prefetcher.pass_ended(1, seconds)
        trial.add(seconds)
    assert ways[:32] == [True, True, False, False] * 8
    assert ways[32:] == [fewer < 0.99] * 168


def test_no_bit_depends_on_how_many_threads_walk(tiny_moe_gguf: Path) -> None:
    with tight(tiny_moe_gguf, 60 * 1024, threads=3, prefill_tokens=1) as engine:
        walked, found = [], []
        for on in (True, False):
            trial = engine.forward.fewer_threads
            trial._holds, trial._verdict = 10**6, on
            found.append(answer(engine))
            walked.append(int(engine.forward._team.frame[rows.F_THREADS]))
            assert trial._holds < 10**6  # passes of one token are counted, and they alone
    assert walked == [2, 0]
    assert found == [expected(tiny_moe_gguf)[1]] * 2


def test_long_passes_are_no_part_of_a_trial(tiny_moe_gguf: Path) -> None:
    with tight(tiny_moe_gguf, 60 * 1024, prefill_tokens=8) as engine:
        trial = engine.forward.fewer_threads
        trial._holds = 10
        engine.logits(prompt(tiny_moe_gguf)[:8])
        assert engine.forward.stats.passes == 1 and trial._holds == 10


@pytest.mark.parametrize(("value", "on"), [("", False), ("off", False), ("on", True)])
def test_the_environment_turns_it_on(monkeypatch: pytest.MonkeyPatch, value: str, on: bool) -> None:
    monkeypatch.setenv("EDGERT_PREFETCH", value)
    assert Prefetcher((2, 4)).on == on
