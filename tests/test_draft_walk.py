"""Drafting while a pass waits for weights: the same tokens, and guesses that are ready after it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgert
from edgert.draft_walk import Ahead, DraftWalk
from edgert.errors import StorageError
from edgert.kernels_cpu.program import Program
from edgert.model_drafter import ModelDrafter
from edgert.storage.backend import FileBackend
from edgert.threads import ThreadTeam
from tests.test_self_draft import HOW, PROMPT, SIZES, SPARE, by_itself, say, slow_flash
from tests.tight import tight

__all__ = ["slow_flash"]  # a fixture of every test here too


class Slow(FileBackend):
    """Weights come late, or not at all."""

    seconds = 0.0005
    broken = False

    def read_into(self, file_index: int, offset: int, buffer: memoryview) -> None:
        if self.broken:
            raise StorageError(Path("x"), offset, len(buffer), "the disk is gone")
        time.sleep(self.seconds)
        super().read_into(file_index, offset, buffer)


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafting goes on beside every pass, however unlikely it is to be right."""
    monkeypatch.setattr("edgert.speculation._WORTH_CHANCE", 0.0)
    monkeypatch.setattr("edgert.model_drafter._UNLIKELY", 0.0)
    monkeypatch.setattr(Slow, "broken", False)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pass waits long enough for some tokens to be drafted."""
    monkeypatch.setattr(Slow, "seconds", 0.003)


@pytest.fixture
def ready(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many guesses were ready whenever that was asked."""
    found: list[int] = []
    before = ModelDrafter.ready

    def asked(self: ModelDrafter, tokens: Any) -> int:
        found.append(before(self, tokens))
        return found[-1]

    monkeypatch.setattr(ModelDrafter, "ready", asked)
    return found


@pytest.fixture(scope="module")
def nested(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("walk") / "nested.edgert"
    edgert.pack_model(tiny_gguf, path, nested="4+4")
    return path


@pytest.fixture(params=[1, 3], ids=["1 thread", "3 threads"])
def engine(request: pytest.FixtureRequest, nested: Path) -> Iterator[edgert.Engine]:
    with tight(nested, SPARE, threads=request.param, backend=Slow, **SIZES) as engine:
        assert engine.plan.can_draft
        yield engine


@pytest.mark.parametrize("how", HOW, ids=str)
def test_the_same_tokens(engine: edgert.Engine, how: Any, ready: list[int]) -> None:
    want = say(engine, speculate=False, **how)
    assert say(engine, **how) == want
    assert by_itself(engine)[0] > 0
    for draft_max in (1, 3):
        assert say(engine, draft_max=draft_max, **how) == want


def test_guesses_are_ready_after_a_pass_that_was_right(
    engine: edgert.Engine, ready: list[int], late: None
) -> None:
    """With drafts of one token all of a draft is often right, and what comes next too."""
    say(engine, temperature=0, draft_max=1)
    assert max(ready) > 0
    assert sum(n > 0 for n in ready) < len(ready), "and at times not"


def test_what_is_ready_is_what_would_be_drafted(engine: edgert.Engine, late: None) -> None:
    """Walked beside a pass or by itself, a token's draft has nearly the same logits: keys and
    values of the tokens being verified are those of the base, or already those of all bits.
    """
    forward, vocabulary = engine.forward, engine.vocab_size
    text = [*PROMPT, 40, 41, 42]
    found: list[np.ndarray[Any, np.dtype[np.float32]]] = []

    def guess(logits: np.ndarray[Any, np.dtype[np.float32]]) -> int | None:
        found.append(logits)
        return 50 + len(found) if len(found) < 4 else None

    plain = forward.evaluate(text, vocabulary, last=3).copy()
    forward.evaluate(PROMPT, vocabulary)
    ahead = Ahead(list(text), guess)
    beside = forward.evaluate(text, vocabulary, last=3, ahead=ahead)
    assert np.array_equal(beside, plain), "the pass itself is to the bit what it was"
    assert found and ahead.guessed == [50 + i for i in range(1, len(ahead.guessed) + 1)]
    forward.evaluate(text, vocabulary)
    for i, logits in enumerate(found[1:], 1):
        alone = forward.draft([*text, *ahead.guessed[:i]])
        assert alone is not None and np.corrcoef(alone, logits)[0, 1] > 0.98
    longer = [*text, *ahead.guessed]
    assert np.array_equal(forward.evaluate(longer, vocabulary)[0], engine.logits(longer)[-1]), (
        "nothing that was drafted is taken for computed"
    )


def test_drafting_goes_on_behind_what_is_ready(engine: edgert.Engine, late: None) -> None:
    """Keys and values of tokens drafted beside a pass serve the next draft."""
    forward = engine.forward
    text, guesses = [*PROMPT, 40, 41], iter([42, 43, 44, None])
    forward.evaluate(PROMPT, engine.vocab_size)
    ahead = Ahead(list(text), lambda _: next(guesses))
    forward.evaluate(text, engine.vocab_size, last=2, ahead=ahead)
    walked = ahead.guessed[: ahead.walked]
    assert forward.draft([*text, *walked, 60]) is not None
    forward.evaluate(text, engine.vocab_size)
    if walked:
        assert forward.draft([*text, *walked, 60]) is None


def test_a_walk_that_a_pass_left_goes_on(
    engine: edgert.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it was left, to the same bits; but not behind another token or another pass."""
    forward, text = engine.forward, [*PROMPT, 40, 41]
    drafts = forward._drafts
    assert drafts is not None and drafts._program is not None
    run, walked = ThreadTeam.run, list[int]()

    def counted(self: ThreadTeam, program: Program) -> None:
        walked.append(len(program.rows))
        run(self, program)

    monkeypatch.setattr(ThreadTeam, "run", counted)
    layers, rows = len(drafts._slices), len(drafts._program.rows)
    for more in (1, layers // 2, layers):
        forward.evaluate(text, engine.vocab_size)
        steps = drafts._drafting(Ahead(list(text), lambda _: 42))
        for _ in range(layers + more):
            next(steps)
        walked.clear()
        found = forward.draft([*text, 42])
        assert walked == [rows - sum(len(part.rows) for part in drafts._slices[:more])]
        again = forward.draft([*text, 42])
        assert walked[1:] == [rows]
        assert found is not None and again is not None and np.array_equal(found, again)
    for token in (43, 42):
        steps = drafts._drafting(Ahead(list(text), lambda _: 42))
        for _ in range(layers + 1):
            next(steps)
        if token == 42:
            forward.evaluate(text, engine.vocab_size)
        walked.clear()
        assert forward.draft([*text, token]) is not None
        assert walked == [rows]


def test_the_end_of_the_context(engine: edgert.Engine) -> None:
    prompt = (PROMPT * 13)[: engine.context_length - 6]
    banned = {engine.tokenizer.eos_id: -1e6}
    how: dict[str, Any] = dict(max_tokens=None, temperature=0, logit_bias=banned)
    want = say(engine, prompt, speculate=False, **how)
    assert say(engine, prompt, **how) == want


def test_budgets_that_change_and_reads_that_fail(engine: edgert.Engine) -> None:
    want = say(engine, temperature=0.8, seed=2, speculate=False)
    walk = DraftWalk.walk_full
    opened, calls = engine.plan.budget_bytes, 0

    def disturbed(self: DraftWalk, ahead: Ahead | None) -> None:
        nonlocal calls
        calls += 1
        if calls % 3 == 1:
            self._team.stop()  # as a change does
        if calls % 3 == 2:
            Slow.broken = True
        walk(self, ahead)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DraftWalk, "walk_full", disturbed)
        for budget in (opened, engine.smallest_budget(), opened + 2**20, opened):
            engine.set_memory_budget(budget)
            try:
                assert say(engine, temperature=0.8, seed=2) == want
            except StorageError:
                Slow.broken = False
    assert calls > 3
    Slow.broken = False
    assert say(engine, temperature=0.8, seed=2) == want
