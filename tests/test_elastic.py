"""Budgets that change: the plan for another budget, and an engine that follows it to the bit."""

from __future__ import annotations

import logging
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import edgert
from edgert.elastic import leaving_order, resized, rooms_of
from edgert.engine import Engine
from edgert.errors import BudgetError, EdgertError, InputError, StorageError
from edgert.machine import resident_bytes
from edgert.opening import open_model
from edgert.plan import Plan
from edgert.plan_parts import Need, need_of
from edgert.storage.arena import Arena
from edgert.storage.backend import Backend, FileBackend
from edgert.units import KIB, MIB
from tests.faults import FaultPlan, FaultyBackend
from tests.tight import floor_of, plan_of, tight
from tests.tiny import FAMILIES, TinyFamily, prompt_of, tiny_model

GREEDY: dict[str, Any] = {"max_tokens": 12, "temperature": 0}
SPARE = [200 * KIB, 600 * KIB, None]


@pytest.fixture(scope="module", params=["llama", "olmoe"])
def model(request: pytest.FixtureRequest, tiny_gguf: Path, tiny_moe_gguf: Path) -> Path:
    return tiny_gguf if request.param == "llama" else tiny_moe_gguf


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 MB of matrices, in tiles of 2 MiB."""
    FAMILIES["wide"] = TinyFamily("llama", hidden=512, heads=8, kv_heads=2, head_dim=64, ffn=6144)
    try:
        return tiny_model("wide", "F16", path=tmp_path_factory.mktemp("wide") / "llama-f16.gguf")
    finally:
        del FAMILIES["wide"]


def prompt(path: Path) -> list[int]:
    return prompt_of("llama" if path.name.startswith("llama") else "olmoe", 30)


@cache
def expected(path: Path) -> tuple[Any, Any]:
    """All logits of the prompt, and a greedy continuation, with everything in memory."""
    with tight(path, None) as engine:
        done = engine.generate(prompt(path), **GREEDY)
        return engine.logits(prompt(path)), (done.tokens, done.stats.logits_hash)


def answer(engine: Engine) -> tuple[tuple[int, ...], str]:
    done = engine.generate(prompt(engine.path), **GREEDY)
    return done.tokens, done.stats.logits_hash


def range_of(engine: Engine) -> tuple[int, int]:
    """The smallest budget of an engine, and the smallest that holds everything."""
    return engine.smallest_budget(), engine._plan_for(2**60).total_bytes


# ----------------------------------------------------------------------------- the plan, pure


@cache
def planned(path: Path, spare: int | None) -> tuple[Plan, Need]:
    opened = open_model(path)
    budget = 2**60 if spare is None else floor_of(path, context_length=256) + spare
    plan = plan_of(path, budget, context_length=256)
    need = need_of(opened.spec, opened.manifest, 2, plan.kv_cache_type, plan.tile_bytes)
    return plan, need


def residents(plan: Plan) -> set[int]:
    return {i for i, tile in enumerate(plan.tiles) if tile.stream_index < 0}


@pytest.mark.parametrize("spare", SPARE)
def test_a_plan_for_any_budget(model: Path, spare: int | None) -> None:
    opened, need = planned(model, spare)
    with pytest.raises(BudgetError) as info:
        resized(opened, need, 1)
    floor = info.value.need_bytes
    full = resized(opened, need, 2**60)
    assert full.streamed_bytes == 0 and full.embedding_resident
    assert resized(opened, need, floor).total_bytes == floor < full.total_bytes
    with pytest.raises(BudgetError):
        resized(opened, need, floor - 1)
    rooms = rooms_of(opened, need)
    before: set[int] | None = None
    for budget in range(floor, full.total_bytes + 1, max(1, (full.total_bytes - floor) // 50)):
        plan = resized(opened, need, budget)
        assert floor <= plan.total_bytes <= budget == plan.budget_bytes
        for name in ("context_length", "prefill_tokens", "logit_rows", "threads", "staging_bytes"):
            assert getattr(plan, name) == getattr(opened, name)
        assert plan.region("KV cache") == opened.region("KV cache")
        stays = residents(plan)
        assert before is None or stays <= before or before <= stays, "a tile would move"
        before = stays
        streamed = [t.stream_index for t in plan.tiles if t.stream_index >= 0]
        assert streamed == list(range(len(streamed)))
        assert not streamed or 2 <= plan.slots < len(streamed)
        assert plan.slots * plan.slot_bytes <= rooms.window
        assert plan.expert_slots * plan.expert_slot_bytes <= rooms.experts
        assert plan.expert_slots >= need.experts_per_token
        in_memory = sum(plan.region(n).nbytes for n in ("resident", "embedding", "experts"))
        assert plan.resident_bytes == in_memory + need.vector_bytes


def test_others_of_the_process_count(tiny_gguf: Path) -> None:
    opened, need = planned(tiny_gguf, None)
    budget = opened.total_bytes
    less = resized(opened, need, budget, others=300 * KIB)
    assert less.region("process").nbytes == opened.region("process").nbytes + 300 * KIB
    assert less.total_bytes <= budget and less.streamed_bytes > 0
    assert resized(opened, need, budget, others=-MIB).streamed_bytes == 0


@given(st.lists(st.booleans(), min_size=1, max_size=200), st.integers(0, 3))
def test_tiles_leave_evenly(resident: list[bool], heads: int) -> None:
    """What was resident at first stays longest, and any first part of the order is spread out."""

    class Opened:
        tiles = [Tile(-1 if r else 0, i < heads) for i, r in enumerate(resident)]

    order = leaving_order(Opened)  # type: ignore[arg-type]
    assert sorted(order) == list(range(len(resident)))
    kinds = [(not resident[i], i >= heads) for i in order]
    assert kinds == sorted(kinds)
    rest = [i for i in order if not resident[i] and i >= heads]
    rank = {item: position for position, item in enumerate(sorted(rest))}
    for count in range(1, len(rest) + 1):
        places = sorted(rank[i] for i in rest[:count])
        gaps = [b - a for a, b in pairwise([*places, len(rest)])]
        assert max(gaps) <= max(1, 4 * len(rest) // count)


class Tile:
    def __init__(self, stream_index: int, is_head: bool) -> None:
        self.stream_index, self.is_head = stream_index, is_head


# ----------------------------------------------------------------------------- the arena


def test_an_elastic_region_keeps_its_addresses() -> None:
    arena = Arena(100_000, spare=10 * MIB)
    first = arena.take("first", 5000, room=5 * MIB)
    second = arena.take("second", 100)
    assert len(first) == 5 * MIB and second.ctypes.data == first.ctypes.data + 5 * MIB
    with pytest.raises(AssertionError, match="beyond"):
        arena.take("third", 95_000, room=95_000)
    arena.seal()
    first[:5000] = second[:] = 7
    arena.resize("first", 90_000)
    first[:90_000] = 7
    with pytest.raises(AssertionError):
        arena.resize("first", 100_000)
    arena.resize("first", 4097)
    assert (first[:4097] == 7).all() and not first[8192:90_000].any() and (second == 7).all()
    assert [(r.name, r.nbytes, r.room) for r in arena.regions] == [
        ("first", 4097, 5 * MIB),
        ("second", 100, 100),
    ]
    assert arena.used_bytes <= 4097 + 100 + 64
    arena.close()
    with pytest.raises(AssertionError, match="closed"):
        arena.resize("first", 1)


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages as Linux does")
def test_pages_exist_where_bytes_are_in_use_and_nowhere_else() -> None:
    size = 32 * MIB
    arena = Arena(size, spare=4 * size)
    space = arena.take("elastic", size // 2 + 4096, room=3 * size)
    assert arena.present_bytes() == 0
    before = resident_bytes()
    space[: size // 2 + 4096] = 1
    # A huge page at the end would have brought 2 MiB that are not in use.
    assert arena.present_bytes() == size // 2 + 4096
    arena.resize("elastic", size)
    space[:size] = 1
    assert arena.present_bytes() == size
    arena.resize("elastic", 4096)
    assert arena.present_bytes() == 4096
    assert resident_bytes() - before < 4 * MIB
    arena.close()


# ----------------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("spare", [200 * KIB, None])
def test_every_budget_gives_the_same_bits(model: Path, spare: int | None) -> None:
    logits, want = expected(model)
    seen = set()
    with tight(model, spare) as engine:
        low, high = range_of(engine)
        middle = (low + high) // 2
        for budget in (low, high, middle, low, high):
            plan = engine.set_memory_budget(budget)
            assert plan is engine.plan and plan.total_bytes <= budget
            assert engine.memory().budget_bytes == budget
            assert engine._arena.used_bytes <= engine._arena.nbytes
            taken = sum(engine.memory().planned.values()) - engine.plan.region("process").nbytes
            assert abs(engine._arena.nbytes - taken) <= 128 * KIB
            seen.add((plan.streamed_bytes, plan.expert_slots, plan.embedding_resident))
            assert np.array_equal(engine.logits(prompt(model)), logits)
            assert answer(engine) == want
    assert len(seen) >= 3


def test_changes_while_another_thread_generates(model: Path) -> None:
    _, want = expected(model)
    drawn = random.Random(0)
    with tight(model, 400 * KIB) as engine:
        low, high = range_of(engine)
        found: list[Any] = []
        worker = threading.Thread(target=lambda: [found.append(answer(engine)) for _ in range(8)])
        worker.start()
        changes = 0
        while worker.is_alive():
            budget = drawn.choice([low, high, drawn.randint(low, high)])
            assert engine.set_memory_budget(budget).total_bytes <= budget
            changes += 1
            time.sleep(drawn.choice([0, 0, 0.002, 0.01]))
        worker.join()
    assert found == [want] * 8 and changes > 8


def test_changes_between_the_tokens_of_a_stream(model: Path) -> None:
    _, (tokens, last) = expected(model)
    with tight(model, None) as engine:
        low, high = range_of(engine)
        found = []
        for event in engine.generate(prompt(model), stream=True, **GREEDY):
            found.append(event.token)
            engine.set_memory_budget(low if len(found) % 2 else high)
        assert engine.last_stats is not None and engine.last_stats.logits_hash == last
    assert tuple(found) == tokens


def test_a_change_in_the_middle_of_a_prefill(model: Path) -> None:
    logits, _ = expected(model)
    with tight(model, None, prefill_tokens=4) as engine:
        low, high = range_of(engine)
        steps = iter([low, high] * 4)

        def on_prefill(_done: int, _total: int) -> None:
            engine.set_memory_budget(next(steps))

        session = engine.session()
        options = engine.options(max_tokens=1, temperature=0, on_prefill=on_prefill)
        list(session.generate(prompt(model), options))
        assert next(steps, None) is None
        got = engine.forward.evaluate(prompt(model), engine.vocab_size)
        assert np.array_equal(got[0], logits[-1])


@pytest.mark.parametrize("smaller", [True, False])
def test_a_smaller_budget_stops_the_pass_and_a_larger_one_waits(
    tiny_gguf: Path, smaller: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tight(tiny_gguf, 400 * KIB) as engine:
        low, high = range_of(engine)
        stops = []
        monkeypatch.setattr(engine._team, "stop", lambda: stops.append(1))
        engine.set_memory_budget(low if smaller else high)
        assert len(stops) == smaller
        monkeypatch.undo()


def test_statistics_go_on_over_a_change(tiny_gguf: Path) -> None:
    with tight(tiny_gguf, 0) as engine:
        answer(engine)
        low, high = range_of(engine)
        before = engine.weights.total_read_bytes, engine.weights.busy_ns
        engine.set_memory_budget(high)
        whole = engine.weights.total_read_bytes
        assert whole > before[0] and engine.weights.busy_ns >= before[1]
        answer(engine)
        assert engine.weights.total_read_bytes == whole, "nothing is streamed any more"
        engine.set_memory_budget(low)
        stats = engine.generate(prompt(tiny_gguf), **GREEDY).stats
        assert stats.read_bytes > 0 and stats.resident_bytes == engine.plan.resident_bytes


def test_experts_that_stay_are_not_read_again(tiny_moe_gguf: Path) -> None:
    with tight(tiny_moe_gguf, None) as engine:
        _, high = range_of(engine)
        assert answer(engine) == expected(tiny_moe_gguf)[1]
        loads = engine.weights.experts.loads  # type: ignore[union-attr]
        engine.set_memory_budget(engine.plan.full_bytes - 200 * KIB)
        assert engine.plan.expert_slots < 16
        engine.set_memory_budget(high)
        assert answer(engine) == expected(tiny_moe_gguf)[1]
        more = engine.weights.experts.loads - loads  # type: ignore[union-attr]
        assert 0 <= more < 8, "only what had left is read"


# ----------------------------------------------------------------------------- memory


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages as Linux does")
@pytest.mark.parametrize("spare", [12 * MIB, None])
def test_memory_really_leaves_the_process(wide: Path, spare: int | None) -> None:
    with tight(wide, spare) as engine:
        tokens = prompt(wide)[:4]
        want = engine.logits(tokens)
        low, high = range_of(engine)
        engine.set_memory_budget(high)
        assert np.array_equal(engine.logits(tokens), want)
        full, most = resident_bytes(), engine.plan.total_bytes
        assert engine.plan.streamed_bytes == 0
        plan = engine.set_memory_budget(low)
        given = most - plan.total_bytes
        assert given > 25 * MIB
        assert full - resident_bytes() > 0.9 * given, "before anything is computed"
        assert np.array_equal(engine.logits(tokens), want)
        assert full - resident_bytes() > 0.9 * given, "and after"
        assert engine._arena.present_bytes() <= engine._arena.nbytes
        engine.set_memory_budget(high)
        assert np.array_equal(engine.logits(tokens), want)
        assert abs(resident_bytes() - full) < 4 * MIB


def test_two_engines_share_what_the_process_may_hold(tiny_gguf: Path, wide: Path) -> None:
    """Each budget is for the whole process: the other engine is part of it, as it is then."""
    with tight(wide, None) as other, tight(tiny_gguf, None) as engine:
        want, others = answer(engine), answer(other)
        budget = engine.plan.total_bytes
        low, high = range_of(other)
        before = other.plan.total_bytes
        given = before - other.set_memory_budget(low).total_bytes
        plan = engine.set_memory_budget(budget - given)
        assert plan.streamed_bytes == 0, "what the other gave back is not counted any more"
        assert answer(engine) == want and answer(other) == others
        other.set_memory_budget(high)
        with pytest.raises(BudgetError, match="too small"):
            engine.set_memory_budget(budget - given)
        assert engine.plan is plan and answer(engine) == want
        assert engine.set_memory_budget(budget).total_bytes <= budget
    with tight(tiny_gguf, None) as engine:
        assert engine.set_memory_budget(budget).total_bytes <= budget


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages as Linux does")
def test_an_engine_that_is_open_counts_with_all_it_may_use(wide: Path, tiny_gguf: Path) -> None:
    with edgert.load(tiny_gguf, threads=1, context_length=256) as engine:
        alone = engine.plan.region("process").nbytes
    with edgert.load(wide, threads=1, context_length=256) as other:
        promised = other._arena.nbytes
        with edgert.load(tiny_gguf, threads=1, context_length=256) as engine:
            more = engine.plan.region("process").nbytes - alone
    assert promised - 2 * MIB < more < promised + 16 * MIB


# ----------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (0, "memory_budget is 0; it must be between 1 and"),
        (-5, "memory_budget is -5"),
        ("", "is not a size"),
        ("abc", "'abc' is not a size; write one like 1.5GiB"),
        ("0%", "a share is above 0%"),
        ("120%", "at most 100%"),
        (1.5, "must be a whole number"),
    ],
)
def test_nonsense_is_refused(tiny_gguf: Path, budget: Any, words: str) -> None:
    with tight(tiny_gguf, 0) as engine:
        plan = engine.plan
        with pytest.raises(InputError) as info:
            engine.set_memory_budget(budget)
        assert words in str(info.value)
        assert engine.plan is plan and answer(engine) == expected(tiny_gguf)[1]


def test_a_budget_below_the_floor_names_the_smallest(tiny_gguf: Path) -> None:
    with tight(tiny_gguf, None) as engine:
        plan = engine.plan
        for budget in ("1MiB", "0.001%", engine.smallest_budget() - 1):
            with pytest.raises(BudgetError, match="loaded again has it") as info:
                engine.set_memory_budget(budget)
            assert info.value.need_bytes == engine.smallest_budget()
        assert engine.plan is plan
        engine.set_memory_budget(info.value.need_bytes)
        assert engine.set_memory_budget("100%").streamed_bytes == 0


def test_a_budget_above_the_cgroup_is_warned_of_and_cut(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with tight(tiny_gguf, 0) as engine:
        limit = engine.smallest_budget() + 100 * KIB
        monkeypatch.setattr("edgert.budget.cgroup_limit_bytes", lambda: limit)
        with caplog.at_level(logging.WARNING):
            assert engine.set_memory_budget("2GiB").budget_bytes == limit
            assert engine.set_memory_budget(limit).budget_bytes == limit
    assert len(caplog.messages) == 1
    assert "MiB counts, not the budget of 2048.0 MiB" in caplog.messages[0]


def test_a_closed_engine_has_no_budget(tiny_gguf: Path) -> None:
    engine = tight(tiny_gguf, 0)
    engine.close()
    with pytest.raises(EdgertError, match="the engine is closed"):
        engine.set_memory_budget("100%")


def test_without_spare_addresses_the_budget_stays(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def arena(nbytes: int, spare: int = 0) -> Arena:
        if spare:
            raise EdgertError("no addresses")
        return Arena(nbytes)

    monkeypatch.setattr("edgert.engine.Arena", arena)
    with tight(tiny_gguf, 200 * KIB) as engine:
        assert answer(engine) == expected(tiny_gguf)[1]
        with pytest.raises(EdgertError, match="no addresses for a budget that changes"):
            engine.set_memory_budget("100%")


# ----------------------------------------------------------------------------- failures


class Hooked(FileBackend):
    """Files that call `on_read` before each read."""

    on_read: Callable[[], None] = staticmethod(lambda: None)

    def read_into(self, file_index: int, offset: int, view: memoryview) -> None:
        self.on_read()
        super().read_into(file_index, offset, view)


@pytest.fixture
def hooked(tiny_gguf: Path) -> Iterator[tuple[Engine, Hooked]]:
    opened: list[Hooked] = []

    def backend(paths: Sequence[Path]) -> Backend:
        opened.append(Hooked(paths))
        return opened[-1]

    with tight(tiny_gguf, 0, backend=backend) as engine:
        yield engine, opened[0]


def test_a_read_that_fails_while_growing_leaves_the_old_budget(tiny_gguf: Path) -> None:
    faulty: list[FaultyBackend] = []

    def backend(paths: Sequence[Path]) -> Backend:
        faulty.append(FaultyBackend(FileBackend(paths)))
        return faulty[-1]

    with tight(tiny_gguf, 0, backend=backend) as engine:
        low, high = range_of(engine)
        want, plan, used = expected(tiny_gguf)[1], engine.plan, engine._arena.used_bytes
        assert answer(engine) == want
        for later in (1, 2, 5):
            faulty[0].plan = FaultPlan(fail_from=faulty[0].reads + later)
            with pytest.raises(StorageError, match="Input/output error"):
                engine.set_memory_budget(high)
            faulty[0].plan = FaultPlan()
            assert engine.plan is plan and engine._arena.used_bytes == used
            assert answer(engine) == want
        assert engine.set_memory_budget(high).streamed_bytes == 0
        assert answer(engine) == want
        engine.set_memory_budget(low)
        assert answer(engine) == want


@pytest.mark.skipif(sys.platform == "win32", reason="signals are a POSIX thing")
def test_ctrl_c_while_growing_ends_the_reading(hooked: tuple[Engine, Hooked]) -> None:
    engine, files = hooked
    sent: list[int] = []

    def on_read() -> None:
        if not sent:
            sent.append(1)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.02)

    want, plan = expected(engine.path)[1], engine.plan
    files.on_read = on_read
    with pytest.raises(KeyboardInterrupt):
        engine.set_memory_budget(range_of(engine)[1])
    files.on_read = lambda: None
    assert engine.plan is plan and sent == [1]
    assert answer(engine) == want


def test_close_while_growing_ends_it(hooked: tuple[Engine, Hooked]) -> None:
    engine, files = hooked
    closers: list[threading.Thread] = []

    def on_read() -> None:
        if not closers:
            closers.append(threading.Thread(target=engine.close))
            closers[0].start()
        time.sleep(0.02)

    files.on_read = on_read
    with pytest.raises(EdgertError, match="the engine is closed"):
        engine.set_memory_budget(range_of(engine)[1])
    closers[0].join(60)
    assert not closers[0].is_alive()


def test_a_ring_that_cannot_be_made_changes_nothing(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tight(tiny_gguf, None) as engine:
        plan = engine.plan

        def no_pipe() -> tuple[int, int]:
            raise OSError(24, "Too many open files")

        with monkeypatch.context() as patch:
            patch.setattr("edgert.storage.streamer.os.pipe", no_pipe)
            with pytest.raises(OSError, match="Too many open files"):
                engine.set_memory_budget(engine.smallest_budget())
        assert engine.plan is plan and answer(engine) == expected(tiny_gguf)[1]
