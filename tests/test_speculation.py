"""Guessed tokens: drafts against their slow twin, when guessing pays, and that it changes nothing.

Whatever a drafter says, and however much of it is verified, tokens, texts, events and logits are
those of decoding one by one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import edgert
from edgert.errors import InputError
from edgert.results import TokenEvent
from edgert.speculation import LONGEST, Draft, PassCosts, PromptLookup, Speculator, lookup_ref
from tests.tight import tight
from tests.tiny import prompt_of

PROMPT = prompt_of("llama", 20)

# ------------------------------------------------------------------------ prompt lookup


@pytest.mark.parametrize("alphabet", [1, 2, 3, 10, 600])
def test_lookup_is_its_twin(alphabet: int) -> None:
    rng = random.Random(alphabet)
    for length, most in [(0, 3), (1, 3), (2, 1), (3, 3), (40, 15), (150, 7), (150, 0)]:
        lookup, tokens = PromptLookup(walk=10**6), list[int]()
        for _ in range(length):
            tokens.append(rng.randrange(alphabet))
            draft = lookup.draft(tokens, most)
            assert draft.tokens == lookup_ref(tokens, most), tokens
            assert len(draft.kinds) == len(draft.tokens)


def test_lookup_takes_the_longest_match_then_the_latest() -> None:
    lookup = PromptLookup()
    draft = lookup.draft([9, 1, 2, 3, 50, 2, 3, 60, 2, 3, 70, 1, 2, 3], 2)
    assert draft == Draft([50, 2], [3, 4])
    assert PromptLookup().draft([2, 3, 60, 2, 3, 70, 2, 3], 1) == Draft([70], [2])
    assert PromptLookup().draft([1, 2, 3], 4) == Draft()


def test_lookup_runs_into_its_own_copy() -> None:
    assert PromptLookup().draft([5, 6, 7, 5, 6], 7).tokens == [7, 5, 6, 7, 5, 6, 7]
    draft = PromptLookup().draft([8] * 40, 3)
    assert draft == Draft([8] * 3, [LONGEST] * 3)


def test_lookup_looks_at_a_bounded_number_of_places_in_bounded_memory() -> None:
    """The latest two of many matches are not those with a long one."""
    long = [1, 2, 3, 4, 5, 6, 7]
    tokens = [*long, 40, 6, 7, 41, 6, 7, 42, *long]
    assert PromptLookup(walk=3).draft(tokens, 1).tokens == [40]
    assert PromptLookup(walk=2).draft(tokens, 1).tokens == [42]
    lookup, tokens = PromptLookup(), list(range(10_000)) * 2
    assert lookup.draft(tokens, 2).tokens == [0, 1]
    held = [value for value in vars(lookup).values() if hasattr(value, "itemsize")]
    assert sum(len(a) * a.itemsize for a in held) == 4 * len(tokens) + 64 * 1024


# ------------------------------------------------------------------------ what passes cost


def test_a_pass_of_one_is_timed_first() -> None:
    costs = PassCosts(0.5)
    costs.add(3, 4.0)
    assert costs.table(4) == []
    costs.add(1, 2.0)
    assert costs.table(2) == [0, 2, 3]


def test_costs_are_medians_and_others_follow_from_them() -> None:
    costs = PassCosts(0.5)
    for seconds in (2.0, 90.0, 2.0):
        costs.add(1, seconds)
    assert costs.table(3) == pytest.approx([0, 2, 3, 4])
    costs.add(3, 2.2)
    costs.add(5, 8.2)
    assert costs.table(6) == pytest.approx([0, 2, 2.1, 2.2, 5.2, 8.2, 9.75])
    costs.add(4, 99.0)  # a stutter: a shorter pass never costs more
    costs.add(1000, 50.0)  # a prefill
    assert costs.table(5) == pytest.approx([0, 2, 2.1, 2.2, 8.2, 8.2])


def test_costs_are_forgotten() -> None:
    costs = PassCosts(0.0)
    costs.add(1, 1.0)
    costs.add(2, 9.0)
    assert costs.table(2) == [0, 1, 9]
    for _ in range(200):
        costs.add(1, 1.0)
    assert costs.table(2) == [0, 1, 1]
    for _ in range(200):
        costs.add(3, 1.0)
    assert costs.table(2) == []


# ------------------------------------------------------------------------ when it pays


def simulate(text: Sequence[int], start: int, seconds: Callable[[int], float]) -> tuple[float, int]:
    """Says `text` from `start` on with guesses, on a clock of its own: seconds, tokens guessed."""
    costs = PassCosts(0.1)
    speculator = Speculator(PromptLookup(), costs, 15)
    at, clock, drafted = start, 0.0, 0
    while at < len(text):
        draft = speculator.draft(text[:at], len(text) - at - 1)
        right = 0
        while right < len(draft) and draft[right] == text[at + right]:
            right += 1
        clock += seconds(1 + len(draft))
        costs.add(1 + len(draft), seconds(1 + len(draft)))
        speculator.learn(text[at : at + right + 1])
        at, drafted = at + right + 1, drafted + len(draft)
    return clock, drafted


def streamed(n: int) -> float:
    return 1.0 + 0.01 * n


def in_memory(n: int) -> float:
    return 0.02 * max(1.0, 0.7 + 0.16 * n)


def serial(n: int) -> float:
    return 0.02 * n


COSTS = [streamed, in_memory, serial]


@pytest.mark.parametrize("seconds", COSTS)
@pytest.mark.parametrize("alphabet", [4, 30, 500])
def test_nothing_is_lost_where_nothing_repeats(
    seconds: Callable[[int], float], alphabet: int
) -> None:
    """Random tokens; of four letters, every second guess of one token is wrong by chance."""
    rng = random.Random(alphabet)
    text = [rng.randrange(alphabet) for _ in range(800)]
    clock, _ = simulate(text, 200, seconds)
    assert clock <= 1.03 * 600 * seconds(1)


def test_a_copy_is_as_fast_as_its_cost_allows() -> None:
    rng = random.Random(5)
    story = [rng.randrange(500) for _ in range(200)]
    text = story * 3
    plain = 400 * streamed(1)
    assert plain / simulate(text, 200, streamed)[0] > 8
    assert 400 * in_memory(1) / simulate(text, 200, in_memory)[0] > 2.5
    clock, drafted = simulate(text, 200, serial)
    assert drafted <= 60 and clock <= 1.03 * 400 * serial(1)


def test_guessing_begins_again_when_the_text_repeats_again() -> None:
    """While nothing is verified, what would have been right is still seen."""
    rng = random.Random(6)
    misleading = [x for _ in range(150) for x in (1, 2, 3, 4, 5, rng.randrange(10, 500))]
    story = [rng.randrange(500, 900) for _ in range(100)]
    text = [*misleading, *story, *story]
    first = len(misleading) + len(story)
    whole, _ = simulate(text, 100, in_memory)
    before, _ = simulate(text[:first], 100, in_memory)
    assert 100 * in_memory(1) / (whole - before) > 2


def test_passes_too_short_to_be_worth_a_guess() -> None:
    costs = PassCosts(0.1)
    speculator = Speculator(PromptLookup(), costs, 15)
    text = [1, 2, 3] * 30
    assert speculator.draft(text, 8) == []  # a pass of one is timed first
    costs.add(1, 1e-2)
    assert speculator.draft(text, 8)
    costs.add(1, 1e-4)
    assert speculator.draft(text, 8) == []


# ------------------------------------------------------------------------ the same tokens


class Scripted:
    """Guesses by a function of the tokens so far and the number that is wanted."""

    def __init__(self, guess: Callable[[Sequence[int], int], list[int]]) -> None:
        self._guess = guess

    def draft(self, tokens: Sequence[int], most: int) -> Draft:
        guessed = self._guess(tokens, most)
        return Draft(guessed, [i % (LONGEST + 1) for i in range(len(guessed))])


@pytest.fixture
def guess(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes every generation verify all that a function, or the prompt lookup, guesses."""
    monkeypatch.setattr("edgert.speculation._WORTH_SECONDS", 0.0)
    monkeypatch.setattr(Speculator, "_length", lambda self, most: len(self._guess.kinds[:most]))

    def use(function: Callable[[Sequence[int], int], list[int]] | None = None) -> None:
        if function is not None:
            monkeypatch.setattr("edgert.session.PromptLookup", lambda: Scripted(function))

    return use


@pytest.fixture(scope="module", params=["dense", "dense streamed", "experts", "experts streamed"])
def engine(
    request: pytest.FixtureRequest, tiny_gguf: Path, tiny_moe_gguf: Path
) -> Iterator[edgert.Engine]:
    path = tiny_gguf if "dense" in request.param else tiny_moe_gguf
    streaming = "streamed" in request.param
    with tight(
        path, 0 if streaming else None, threads=3 if streaming else 1, prefill_tokens=9
    ) as e:
        assert bool(e.plan.streamed_bytes or "experts" in request.param) == (
            streaming or "experts" in request.param
        )
        yield e


HOW: list[dict[str, Any]] = [
    dict(temperature=0),
    dict(temperature=0, repeat_penalty=1.3, repeat_last_n=8),
    dict(temperature=0.8, seed=1),
    dict(temperature=0.8, seed=2, stop=["e", "tt"]),
    dict(temperature=1.5, top_p=1.0, seed=3, frequency_penalty=0.7, presence_penalty=0.2),
    dict(temperature=1.0, top_k=3, seed=4, max_tokens=7),
    dict(temperature=0, max_tokens=2),
    dict(temperature=0, max_tokens=1),
    dict(temperature=0, max_tokens=0),
]


def say(
    engine: edgert.Engine, prompt: Sequence[int], **options: Any
) -> tuple[list[TokenEvent], list[int], str]:
    """Events, all tokens and hash of the last logits of a generation that may not repeat itself."""
    session = engine.session()
    events = list(session.generate(prompt, engine.options(**{"max_tokens": 16} | options)))
    assert session.last_stats is not None
    return events, session.tokens, session.last_stats.logits_hash


def drafters(truth: Sequence[int], vocabulary: int) -> dict[str, Any]:
    """Guesses of all kinds about a text whose tokens will be `truth`."""
    rng = random.Random(7)

    def right(tokens: Sequence[int], most: int) -> list[int]:
        return list(truth[len(tokens) : len(tokens) + most])

    def wrong(tokens: Sequence[int], most: int) -> list[int]:
        return [(token + 1) % vocabulary for token in right(tokens, most)] or [0]

    def mixed(tokens: Sequence[int], most: int) -> list[int]:
        known = right(tokens, most)
        if known:
            known[rng.randrange(len(known))] = rng.randrange(vocabulary)
        return known[: rng.randrange(most + 1)]

    return {
        "right": right, "wrong": wrong, "mixed": mixed, "lookup": None,
        "too many": lambda tokens, most: right(tokens, most + 5),
        "nothing": lambda tokens, most: [],
    }  # fmt: skip


KINDS = list(drafters((), 1))


@pytest.mark.parametrize("kind", KINDS)
def test_no_guess_changes_what_is_said(engine: edgert.Engine, guess: Any, kind: str) -> None:
    for how in HOW:
        want = say(engine, PROMPT, speculate=False, **how)
        eos = [engine.tokenizer.eos_id] if want[0][-1].token is None else []
        guess(drafters([*want[1], *eos], engine.vocab_size)[kind])
        assert say(engine, PROMPT, **how) == want, how
        stats = engine.last_stats
        assert stats is not None and stats.accepted_tokens <= stats.drafted_tokens
        if kind == "right" and stats.generated_tokens > 2:
            assert stats.accepted_tokens > 0
        if kind in ("wrong", "nothing"):
            assert stats.accepted_tokens == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_context_that_fills_up(engine: edgert.Engine, guess: Any, kind: str) -> None:
    prompt = (PROMPT * 13)[: engine.context_length - 14]
    banned = {engine.tokenizer.eos_id: -1e6}
    how: dict[str, Any] = dict(max_tokens=None, temperature=1.0, seed=5, logit_bias=banned)
    want = say(engine, prompt, speculate=False, **how)
    assert len(want[1]) == engine.context_length
    guess(drafters(want[1], engine.vocab_size)[kind])
    assert say(engine, prompt, **how) == want


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_guessed_wrong_leaves_no_trace(
    engine: edgert.Engine, guess: Any, kind: str
) -> None:
    """Three turns of one session, and between them the logits of all its tokens."""

    def turns(**options: Any) -> list[Any]:
        session, found = engine.session(), []
        for turn in range(3):
            how = engine.options(max_tokens=11, temperature=0.9, seed=turn, **options)
            events = list(session.generate([30 + turn, 41], how))
            rest = engine.forward.evaluate(session.tokens, engine.vocab_size)
            found.append((events, session.tokens[:], rest.tobytes()))
        return found

    want = turns(speculate=False)
    guess(drafters(want[-1][1], engine.vocab_size)[kind])
    assert turns() == want
    assert engine.logits(want[-1][1])[-1].tobytes() == want[-1][2]


@pytest.mark.parametrize("how", ["cancel", "close"])
@pytest.mark.parametrize("after", [1, 2, 5])
def test_ending_it_in_the_middle_of_right_guesses(
    engine: edgert.Engine, guess: Any, how: str, after: int
) -> None:
    truth = say(engine, PROMPT, temperature=0, speculate=False)[1]

    def some(**options: Any) -> list[Any]:
        session = engine.session()
        settings = engine.options(max_tokens=16, temperature=0, **options)
        events = session.generate(PROMPT, settings)
        found: list[Any] = []
        for event in events:
            found.append(event)
            if len(found) == after:
                session.cancel() if how == "cancel" else events.close()  # type: ignore[attr-defined]
        assert session.last_stats is not None
        found += [session.tokens[:], session.last_stats.generated_tokens]
        return [*found, *session.generate([33], settings), session.tokens]

    want = some(speculate=False)
    guess(drafters(truth, engine.vocab_size)["right"])
    assert some() == want


def test_cancelling_while_a_guess_is_made(engine: edgert.Engine, guess: Any) -> None:
    session = engine.session()

    def cancelling(tokens: Sequence[int], most: int) -> list[int]:
        session.cancel()
        return [1] * most

    guess(cancelling)
    events = list(session.generate(PROMPT, engine.options(max_tokens=9, temperature=0)))
    assert [e.finish_reason for e in events] == [None, "cancelled"]
    assert session.tokens == [*PROMPT, events[0].token]


def test_two_sessions_take_turns(engine: edgert.Engine, guess: Any) -> None:
    def both(**options: Any) -> list[TokenEvent]:
        how = engine.options(max_tokens=12, temperature=0.7, seed=3, **options)
        streams = [engine.session().generate([*PROMPT[:9], i], how) for i in (40, 50)]
        return [event for pair in zip(*streams, strict=False) for event in pair]

    want = both(speculate=False)
    guess()
    assert both() == want


# ------------------------------------------------------------------------ passes and figures


def test_right_guesses_save_passes(tiny_gguf: Path, guess: Any) -> None:
    with tight(tiny_gguf, 0, prefill_tokens=8) as engine:
        truth = say(engine, PROMPT, temperature=0, max_tokens=41, speculate=False)[1]
        assert len(truth) == 61
        plain = engine.last_stats
        guess(drafters(truth, engine.vocab_size)["right"])
        engine.logits([9])
        before = engine.forward.stats.passes
        say(engine, PROMPT, temperature=0, max_tokens=41)
        stats = engine.last_stats
        assert plain is not None and stats is not None
        # 3 passes for the prompt and the first token, then 40 tokens, 8 in each pass.
        assert engine.forward.stats.passes - before == 3 + 5
        assert (stats.drafted_tokens, stats.accepted_tokens) == (35, 35)
        assert stats.generated_tokens == 41
        assert 0 < stats.read_bytes_per_token < plain.read_bytes_per_token / 4
        assert (plain.drafted_tokens, plain.accepted_tokens) == (0, 0)


def test_a_pass_is_never_longer_than_planned(tiny_gguf: Path, guess: Any) -> None:
    asked: list[int] = []

    def sevens(tokens: Sequence[int], most: int) -> list[int]:
        asked.append(most)
        return [7] * most

    guess(sevens)
    for rows, most in [(1, 15), (4, 15), (9, 2), (9, 0)]:
        asked.clear()
        with tight(tiny_gguf, None, prefill_tokens=rows) as engine:
            say(engine, PROMPT, temperature=0, draft_max=most)
        assert max(asked, default=0) == min(rows - 1, most)


def test_left_to_itself_it_guesses_what_repeats(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real lookup and the real choice; passes are said to take as long as from slow flash."""
    monkeypatch.setattr(PassCosts, "table", lambda self, most: [1.0] * (most + 1))
    monkeypatch.setattr("edgert.speculation._WORTH_SECONDS", 0.0)
    with tight(tiny_gguf, 0, prefill_tokens=8) as engine:
        bias = {engine.tokenizer.eos_id: -1e6, 40: 60.0}
        how: dict[str, Any] = dict(temperature=0.1, seed=1, logit_bias=bias, max_tokens=60)
        want = say(engine, PROMPT, speculate=False, **how)
        assert say(engine, PROMPT, **how) == want
        stats = engine.last_stats
        assert stats is not None and stats.accepted_tokens > 30


@pytest.mark.parametrize("draft_max", [-1, 64, True, 1.5, "many"])
def test_draft_max_is_checked(engine: edgert.Engine, draft_max: Any) -> None:
    with pytest.raises(InputError, match="draft_max"):
        engine.generate(PROMPT, max_tokens=1, draft_max=draft_max)
    with pytest.raises(InputError, match="speculate"):
        engine.generate(PROMPT, max_tokens=1, speculate="lookup")
