"""Guessing while text is made: whatever a drafter says, tokens, texts, events and logits are those
of decoding one by one.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import edgert
from edgert.errors import InputError
from edgert.results import TokenEvent
from edgert.speculation import Acceptance, PassCosts, Speculator
from tests.command import assert_error, inside
from tests.tight import tight
from tests.tiny import prompt_of

PROMPT = prompt_of("llama", 20)

# ------------------------------------------------------------------------ the same tokens


MOST = 15  # tokens of a draft


class Scripted:
    """Guesses by a function of the tokens so far and the number that may be wanted."""

    name = "scripted"
    is_free = True

    def __init__(self, guess: Callable[[Sequence[int], int], list[int]]) -> None:
        self._guess = guess
        self.acceptance = Acceptance([0.5] * 4)

    def guesses(self, tokens: Sequence[int]) -> Iterator[tuple[int, int]]:
        return ((token, i % 4) for i, token in enumerate(self._guess(tokens, MOST)))


@pytest.fixture
def guess(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes every generation verify all that a function, or the prompt lookup, guesses."""
    monkeypatch.setattr("edgert.speculation._WORTH_SECONDS", 0.0)
    monkeypatch.setattr(
        "edgert.speculation._best_length", lambda made, costs, rate: (rate, len(made.kinds))
    )

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


def test_a_pass_is_never_longer_than_planned(
    tiny_gguf: Path, guess: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    draft = Speculator.draft

    def noted(self: Speculator, tokens: Sequence[int], most: int) -> list[int]:
        found = draft(self, tokens, most)
        lengths.append(len(found))
        return found

    guess(lambda tokens, most: [7] * most)
    monkeypatch.setattr(Speculator, "draft", noted)
    for rows, most in [(1, 15), (4, 15), (9, 2), (9, 0)]:
        lengths.clear()
        with tight(tiny_gguf, None, prefill_tokens=rows) as engine:
            say(engine, PROMPT, temperature=0, draft_max=most)
        assert max(lengths) == min(rows - 1, most)


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


def test_on_the_command_line(tiny_gguf: Path, guess: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, so that everything that is guessed is verified."""
    guess()
    monkeypatch.setenv("EDGERT_TEMP", "0")
    tale = ("run", tiny_gguf, "-p", "a tale a tale a tale", "-n", 12, "-b", "8GiB")
    found = {}
    for options in ((), ("--speculate",), ("--draft-max", 2), ("--draft", 0), ("--no-speculate",)):
        run = json.loads(inside(*tale, "--json", *options).stdout)
        found[options] = run["stats"]["drafted_tokens"]
        assert run["text"] == json.loads(inside(*tale, "--json").stdout)["text"]
    counts = list(found.values())
    assert counts[0] == counts[1] > 0 and counts[2] > 0 and counts[3:] == [0, 0]
    assert re.search(r"  guessed \d+ of \d+  peak", inside(*tale).stderr)
    assert "guessed" not in inside(*tale, "--no-speculate").stderr
    assert_error(inside(*tale, "--draft-max", 64), 2, "64 is not in the range")
