"""Budgets that change: the plan for another budget, and an engine that follows it to the bit."""

from __future__ import annotations

import random
import sys
import threading
import time
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
from edgert.errors import BudgetError
from edgert.machine import resident_bytes
from edgert.opening import open_model
from edgert.plan import Plan
from edgert.plan_parts import Need, need_of
from edgert.storage.arena import Arena
from edgert.units import KIB, MIB
from tests.answers import GREEDY, answer, expected, prompt, range_of
from tests.tight import floor_of, plan_of, tight
from tests.tiny import FAMILIES, TinyFamily, tiny_model

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
        for i, tile in enumerate(tiles):
            tile.tensor = str(i // 5)

    order = leaving_order(Opened)  # type: ignore[arg-type]
    assert sorted(order) == list(range(len(resident)))
    kinds = [(not resident[i], i >= heads) for i in order]
    assert kinds == sorted(kinds)
    for a, b in pairwise(range(len(resident))):  # a tensor's resident neighbours stay neighbours
        if resident[a] and resident[b] and a // 5 == b // 5 and (a >= heads or b < heads):
            assert order.index(b) == order.index(a) + 1
    rest = [i for i in order if not resident[i] and i >= heads]
    rank = {item: position for position, item in enumerate(sorted(rest))}
    for count in range(1, len(rest) + 1):
        places = sorted(rank[i] for i in rest[:count])
        gaps = [b - a for a, b in pairwise([*places, len(rest)])]
        assert max(gaps) <= max(1, 4 * len(rest) // count)


class Tile:
    def __init__(self, stream_index: int, is_head: bool) -> None:
        self.stream_index, self.is_head, self.tensor = stream_index, is_head, ""


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
    assert promised - 10 * MIB < more < promised + 20 * MIB
