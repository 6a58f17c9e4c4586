"""A nested model that drafts with its base: the same tokens and logits, whatever happens to it.

That every draft is verified is forced: passes are said to take as long as from slow flash.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgert
from edgert.config import SamplingParams
from edgert.errors import CancelledError, StorageError
from edgert.forward import Forward, Ticket
from edgert.opening import open_model
from edgert.plan import Plan
from edgert.plan_parts import at_least, need_of, ring_of
from edgert.sampler import SURENESS, Sampler
from edgert.self_draft import NAME
from edgert.speculation import PassCosts
from edgert.storage.backend import FileBackend
from edgert.units import KIB
from tests.tight import floor_of, plan_of, tight
from tests.tiny import prompt_of

SIZES: dict[str, Any] = {"context_length": 256, "prefill_tokens": 9}
PROMPT = prompt_of("llama", 20)
SPARE = 800 * KIB  # bytes with which the base of all matrices fits, and some tiles whole
SPLITS = ["4+4", "3+1+4"]


@pytest.fixture(scope="module", params=SPLITS)
def nested(request: pytest.FixtureRequest, tiny_gguf: Path, tmp_path_factory: Any) -> Path:
    path: Path = tmp_path_factory.mktemp("nested") / f"llama-{request.param}.edgert"
    edgert.pack_model(tiny_gguf, path, nested=request.param)
    return path


@pytest.fixture(autouse=True)
def slow_flash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And nothing is known of how often these models are right."""
    monkeypatch.setattr("edgert.acceptance_file.cache_root", lambda: tmp_path / "cache" / "k")
    monkeypatch.setattr(PassCosts, "table", lambda self, most: [1.0] * (most + 1))
    monkeypatch.setattr(PassCosts, "line", PassCosts.table)
    monkeypatch.setattr("edgert.speculation._WORTH_SECONDS", 0.0)


@pytest.fixture
def engine(nested: Path) -> Iterator[edgert.Engine]:
    with tight(nested, SPARE, **SIZES) as e:
        assert e.plan.can_draft and e.plan.streamed_bytes
        yield e


HOW: list[dict[str, Any]] = [
    dict(temperature=0),
    dict(temperature=0, repeat_penalty=1.3, repeat_last_n=8),
    dict(temperature=0.8, seed=1),
    dict(temperature=1.5, top_p=1.0, seed=3, frequency_penalty=0.7, presence_penalty=0.2),
    dict(temperature=1.0, top_k=3, seed=4, stop=["e"]),
]


def say(engine: edgert.Engine, prompt: Sequence[int] = PROMPT, **options: Any) -> tuple[Any, ...]:
    """Tokens, why they end, and the hash of the last logits."""
    done = engine.generate(prompt, **({"max_tokens": 24} | options))
    return done.tokens, done.finish_reason, done.stats.logits_hash


def by_itself(engine: edgert.Engine) -> tuple[int, int]:
    """Tokens drafted and accepted by the model itself in the last generation."""
    assert engine.last_stats is not None
    drafts = {d.drafter: d for d in engine.last_stats.drafts}
    own = drafts.get(NAME)
    return (own.drafted_tokens, own.accepted_tokens) if own else (0, 0)


# ------------------------------------------------------------------------ the same tokens


@pytest.mark.parametrize("how", HOW, ids=str)
def test_drafting_changes_nothing(engine: edgert.Engine, tiny_gguf: Path, how: Any) -> None:
    want = say(engine, speculate=False, **how)
    assert engine.last_stats is not None and by_itself(engine) == (0, 0)
    plain_passes = engine.last_stats.decode_passes
    assert say(engine, **how) == want
    drafted, accepted = by_itself(engine)
    stats = engine.last_stats
    assert 0 < accepted <= drafted
    assert stats.decode_passes == plain_passes - stats.accepted_tokens
    assert (stats.drafted_tokens, stats.accepted_tokens) >= (drafted, accepted)
    with tight(tiny_gguf, None, **SIZES) as whole:
        assert say(whole, speculate=False, **how) == want


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("spare", [600, 700, 800, 850])
def test_at_any_budget_and_number_of_threads(
    nested: Path, tiny_gguf: Path, spare: int, threads: int
) -> None:
    with tight(tiny_gguf, None, **SIZES) as whole:
        want = [say(whole, **how) for how in HOW]
    with tight(nested, spare * KIB, threads=threads, **SIZES) as engine:
        assert engine.plan.can_draft == (spare >= 700 or "3+1" in nested.name)
        assert [say(engine, **how) for how in HOW] == want
        assert bool(sum(by_itself(engine))) == engine.plan.can_draft


def test_sessions_take_turns(engine: edgert.Engine) -> None:
    """Each one's drafts end where the other's tokens are in the KV cache."""

    def both(**options: Any) -> list[Any]:
        how = engine.options(max_tokens=15, temperature=0.7, seed=3, **options)
        streams = [engine.session().generate([*PROMPT[:9], i], how) for i in (40, 50)]
        return [event for pair in zip(*streams, strict=False) for event in pair]

    want = both(speculate=False)
    assert both() == want


def test_a_context_that_fills_up(engine: edgert.Engine) -> None:
    prompt = (PROMPT * 13)[: engine.context_length - 14]
    banned = {engine.tokenizer.eos_id: -1e6}
    how: dict[str, Any] = dict(max_tokens=None, temperature=1.0, seed=5, logit_bias=banned)
    want = say(engine, prompt, speculate=False, **how)
    assert len(want[0]) == 14
    assert say(engine, prompt, **how) == want
    assert by_itself(engine)[0] > 0


# ------------------------------------------------------------------------ the draft


def test_a_draft_is_what_the_base_says(engine: edgert.Engine) -> None:
    """Drafted behind computed tokens, one by one; other logits than those of all bits, and the
    same ones when it is done again.
    """
    forward, vocabulary = engine.forward, engine.vocab_size
    text = [*PROMPT, 40, 41, 42]

    def drafts() -> list[bytes]:
        forward.evaluate(PROMPT, vocabulary)
        found = [forward.draft(text[:n]) for n in range(21, 24)]
        assert all(logits is not None for logits in found)
        return [logits.tobytes() for logits in found if logits is not None]

    first = drafts()
    assert len(set(first)) == 3 and drafts() == first
    full = forward.evaluate(text, vocabulary, last=3)
    assert [row.tobytes() for row in full] != first
    base = np.frombuffer(first[0], np.float32)
    assert np.corrcoef(base, full[0])[0, 1] > 0.9


def test_no_draft_over_tokens_that_were_not_computed(engine: edgert.Engine) -> None:
    forward, vocabulary = engine.forward, engine.vocab_size
    forward.evaluate(PROMPT, vocabulary)
    assert forward.draft([*PROMPT, 40, 41]) is None
    assert forward.draft([*PROMPT, 40]) is not None
    assert forward.draft([*PROMPT, 41, 42]) is None
    assert forward.draft([*PROMPT[:-1], 9, 40]) is None
    longest = (PROMPT * 13)[: engine.context_length]
    forward.evaluate(longest, vocabulary)
    assert forward.draft([*longest, 1]) is None


def test_a_pass_computes_again_what_was_drafted(engine: edgert.Engine) -> None:
    text = [*PROMPT, 40, 41, 42, 43]
    want = engine.logits(text)[-1].tobytes()
    forward, vocabulary = engine.forward, engine.vocab_size
    for drafted in (1, 3):
        forward.evaluate(PROMPT, vocabulary)
        for n in range(drafted):
            assert forward.draft(text[: 21 + n]) is not None
        assert forward.reused(text) == 20
        assert forward.evaluate(text, vocabulary)[0].tobytes() == want


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_sampler_guesses_what_it_would_draw(temperature: float) -> None:
    rng = np.random.default_rng(3)
    params = SamplingParams(temperature=temperature, repeat_penalty=1.1, repeat_last_n=4)
    sampler, text = Sampler(params, 7), [1, 2, 3]
    for _ in range(30):
        rows = (4 * rng.standard_normal((5, 300))).astype(np.float32)
        fork, ahead = sampler.fork(), list(text)
        for row in rows:
            token, sure = fork.guess(row, ahead)
            assert 0 <= sure < SURENESS
            ahead.append(token)
        for row in rows:
            text.append(sampler.sample(row, text))
        assert text == ahead
    flat = np.zeros(300, np.float32)
    peaked = flat.copy()
    peaked[5] = 100
    assert sampler.guess(peaked)[1] == SURENESS - 1 > sampler.guess(flat)[1]


# ------------------------------------------------------------------------ stopping and failing


@pytest.mark.parametrize("how", ["cancel", "interrupt", "close"])
def test_stopped_while_it_drafts(nested: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    with tight(nested, SPARE, **SIZES) as engine:
        want = say(engine, temperature=0, speculate=False)
        session, calls = engine.session(), []
        run = engine._team.run

        def walk(program: Any) -> None:
            if program is engine.forward._programs.draft:
                calls.append(program)
                if len(calls) == 3:
                    if how == "interrupt":
                        raise KeyboardInterrupt
                    session.cancel() if how == "cancel" else engine.forward.close()
            run(program)

        monkeypatch.setattr(engine._team, "run", walk)
        events = session.generate(PROMPT, engine.options(max_tokens=24, temperature=0))
        if how == "interrupt":
            with pytest.raises(KeyboardInterrupt):
                list(events)
        else:
            assert list(events)[-1].finish_reason == "cancelled"
        assert tuple(session.tokens[20:]) == want[0][: len(session.tokens) - 20]
        if how != "close":
            assert say(engine, temperature=0) == want


class Failing(FileBackend):
    """Reads that fail while `broken`."""

    broken = False

    def read_into(self, file_index: int, offset: int, buffer: memoryview) -> None:
        if self.broken:
            raise StorageError(Path("x"), offset, len(buffer), "the disk is gone")
        super().read_into(file_index, offset, buffer)


def test_reads_that_fail_while_it_drafts(nested: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Failing, "broken", False)
    with tight(nested, SPARE, backend=Failing, **SIZES) as engine:
        want = say(engine, temperature=0, speculate=False)
        draft = Forward.draft

        def failing(self: Forward, tokens: Any, ticket: Any = None) -> Any:
            Failing.broken = True
            return draft(self, tokens, ticket)

        for _ in range(2):
            monkeypatch.setattr(Forward, "draft", failing)
            with pytest.raises(StorageError, match="gone"):
                say(engine, temperature=0)
            monkeypatch.setattr(Forward, "draft", draft)
            Failing.broken = False
            assert say(engine, temperature=0) == want


def test_a_cancelled_ticket_drafts_nothing(engine: edgert.Engine) -> None:
    ticket = Ticket()
    engine.forward.evaluate(PROMPT, engine.vocab_size)
    engine.forward.cancel(ticket)
    with pytest.raises(CancelledError):
        engine.forward.draft([*PROMPT, 40], ticket)
    assert engine.forward.draft([*PROMPT, 40]) is not None


# ------------------------------------------------------------------------ another budget


def test_budgets_that_change_while_it_drafts(nested: Path) -> None:
    """Below the base of all it stops drafting, above it goes on; another thread changes them."""
    with tight(nested, SPARE, **SIZES) as engine:
        want = say(engine, temperature=0.8, seed=2, max_tokens=60, speculate=False)
        least, opened = engine.smallest_budget(), engine.plan.budget_bytes
        budgets = [least, opened, opened + 150 * KIB, opened + 2000 * KIB, opened - 100 * KIB]
        done = threading.Event()
        seen: set[bool] = set()

        def change() -> None:
            rng = random.Random(1)
            while not done.is_set():
                seen.add(engine.set_memory_budget(rng.choice(budgets)).can_draft)

        changer = threading.Thread(target=change)
        changer.start()
        try:
            for _ in range(4):
                assert say(engine, temperature=0.8, seed=2, max_tokens=60) == want
        finally:
            done.set()
            changer.join()
        assert seen == {True, False}
        for budget in budgets:
            plan = engine.set_memory_budget(budget)
            assert plan.total_bytes <= budget
            assert say(engine, temperature=0.8, seed=2, max_tokens=60) == want
            assert bool(sum(by_itself(engine))) == plan.can_draft


# ------------------------------------------------------------------------ plans


def plans(path: Path) -> Iterator[tuple[int, Plan]]:
    floor = floor_of(path, **SIZES)
    full = plan_of(path, 2**62, **SIZES).full_bytes
    for budget in range(floor, full + 1, 16 * KIB):
        yield budget, plan_of(path, budget, **SIZES)


def test_plans_of_nested_packs(nested: Path) -> None:
    """Bases of all, then wider ones, then whole tiles; what is read falls as memory grows."""
    seen, before = [], None
    for budget, plan in plans(nested):
        assert plan.total_bytes <= budget
        in_memory = sum(t.memory_bytes for t in plan.tiles)
        assert plan.region("resident").nbytes == in_memory
        assert plan.streamed_bytes == sum(t.read_bytes for t in plan.tiles if t.stream_index >= 0)
        bits = {t.base.bits for t in plan.tiles if t.base}
        whole = any(t.stream_index < 0 and t.tensor != "output.weight" for t in plan.tiles)
        if plan.can_draft:
            streamed = sum(t.stream_index >= 0 for t in plan.tiles)
            assert 2 <= plan.slots < streamed
            assert plan.slots * plan.slot_bytes <= plan.region("window").nbytes
            assert all(t.base.slot_bytes <= plan.slot_bytes for t in plan.tiles if t.base)
            assert len(bits) <= 2 and not (whole and 3 in bits)
            assert before is None or plan.streamed_bytes <= before.streamed_bytes
            before = plan
        elif plan.streamed_bytes:
            assert not bits and before is None, "drafting is never given up for more memory"
        seen.append(min(bits, default=0))
    assert set(seen) == ({0, 3, 4} if "3+1" in nested.name else {0, 4})


def test_a_slot_holds_what_is_read_beside_a_base(nested: Path) -> None:
    """Twice as many fit where half of each tile is in memory."""
    opened = open_model(nested)
    need = need_of(opened.spec, opened.manifest, 2, "f16", 64 * KIB)
    assert max(t.nbytes for t in need.tiles) <= need.slot_bytes
    bases = [at_least(tile, 4) for tile in need.tiles]
    halves = [t.placed(i, base) for i, (t, base) in enumerate(zip(need.tiles, bases, strict=True))]
    window = 6 * need.slot_bytes
    slots, size = ring_of(window, need, halves)
    assert size == max(base.slot_bytes for base in bases if base) < 0.6 * need.slot_bytes
    assert slots == min(window // size, len(halves) - 1) > 6
    mixed = [halves[0].placed(0), *halves[1:]]
    assert ring_of(window, need, mixed) == (6, need.slot_bytes), "one is put together in its slot"
    assert ring_of(window, need, need.tiles)[0] == 0, "all is in memory"


def test_a_context_nobody_asked_for_gives_way_to_bases(nested: Path) -> None:
    """1024 tokens more are worth less than drafting, and asked for, more."""
    whole = plan_of(nested, 2**62, prefill_tokens=9)
    drafting = [
        (plan.context_length, plan.can_draft)
        for budget in range(whole.floor_bytes, whole.full_bytes, 64 * KIB)
        if (plan := plan_of(nested, budget, prefill_tokens=9)).streamed_bytes
    ]
    assert any(can for _, can in drafting)
