"""A small model drafts for another: the same tokens, one budget, one vocabulary, off by itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import edgert
from edgert.draft_model import NAME, DraftModel
from edgert.errors import BudgetError, InputError
from edgert.forward import Ticket
from edgert.sampler import Sampler
from edgert.speculation import Drafter, PassCosts, Speculator
from edgert.units import MIB
from tests.command import assert_error, inside
from tests.gguf_file import write_gguf
from tests.tight import fixed_process, floor_of, tight
from tests.tiny import TinyModel, build, prompt_of, tiny_model

PROMPT = prompt_of("llama", 20)
HOW: list[dict[str, Any]] = [
    dict(temperature=0),
    dict(temperature=0.8, seed=1),
    dict(temperature=1.5, top_p=1.0, seed=3, frequency_penalty=0.7, presence_penalty=0.2),
    dict(temperature=0, max_tokens=1),
    dict(temperature=0, max_tokens=3, draft_max=1),
]


def of_metadata(path: Path, **keys: Any) -> Path:
    """The tiny model with other metadata."""
    model = build("llama", "Q4_0")
    write_gguf(path, {**model.metadata, **keys}, model.tensors)
    return path


@pytest.fixture(scope="module")
def drafts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model in fewer bits, right now and then; other weights, hardly ever; a short one."""
    folder = tmp_path_factory.mktemp("drafts")
    return {
        "alike": tiny_model("llama", "Q4_0", path=folder / "alike.gguf"),
        "other": tiny_model("llama", "Q8_0", 7, path=folder / "other.gguf"),
        "short": of_metadata(folder / "short.gguf", **{"llama.context_length": 26}),
    }


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pass verifies as many guesses of the draft model as are wanted."""

    def costly(self: Speculator, *_: object) -> Drafter | None:
        return next((d for d in self._drafters if d.name == NAME), None)

    monkeypatch.setattr("edgert.speculation._WORTH_SECONDS", 0.0)
    monkeypatch.setattr("edgert.speculation._promise", lambda *_: 0.0)
    monkeypatch.setattr(Speculator, "_costly", costly)


@pytest.fixture(scope="module")
def plain(tiny_gguf: Path) -> Iterator[edgert.Engine]:
    with tight(tiny_gguf, None, prefill_tokens=9) as engine:
        yield engine


def with_draft(draft: Path, path: Path, spare: int | None, **options: Any) -> edgert.Engine:
    """As `tight`; the draft model has memory of its own, which no test of tokens looks at."""
    options = {"threads": 2, "context_length": 256} | options
    budget = 2**62 if spare is None else floor_of(path, **options) + spare
    context = 26 if draft.stem == "short" else 256
    small = tight(draft, None, context_length=context)
    with (
        fixed_process(),
        mock.patch("edgert.draft_model.open_draft_model", lambda *_: DraftModel(small)),
    ):
        return edgert.load(path, memory_budget=budget, draft_model=draft, **options)


def said(engine: edgert.Engine, **options: Any) -> tuple[edgert.Completion, str]:
    found = engine.generate(PROMPT, **({"max_tokens": 24} | options))
    return found, found.stats.logits_hash


@pytest.mark.parametrize("streaming", [False, True], ids=["resident", "streamed"])
@pytest.mark.parametrize("kind", ["alike", "other", "short"])
def test_the_same_tokens_whatever_it_guesses(
    kind: str, streaming: bool, drafts: dict[str, Path], tiny_gguf: Path, plain: edgert.Engine,
    always: None,
) -> None:  # fmt: skip
    accepted = drafted = 0
    with with_draft(drafts[kind], tiny_gguf, 0 if streaming else None, prefill_tokens=9) as engine:
        assert bool(engine.plan.streamed_bytes) == streaming
        for how in HOW:
            expected, expected_hash = said(plain, speculate=False, **how)
            found, found_hash = said(engine, **how)
            assert (found.tokens, found.text, found_hash) == (
                expected.tokens, expected.text, expected_hash
            )  # fmt: skip
            if kind != "short":  # where its context ends, the prompt lookup may guess
                assert all(part.drafter == NAME for part in found.stats.drafts)
            drafted += found.stats.drafted_tokens
            accepted += found.stats.accepted_tokens
            if how.get("max_tokens") == 1:
                assert not found.stats.drafted_tokens
    assert drafted >= (6 if kind == "short" else 30)
    if kind == "alike":
        assert accepted > 5


def test_no_more_is_guessed_than_the_context_holds(
    drafts: dict[str, Path], tiny_gguf: Path, always: None
) -> None:
    with with_draft(drafts["alike"], tiny_gguf, None, context_length=24) as engine:
        found = engine.generate(PROMPT, temperature=0, draft_max=63)
        assert found.finish_reason == "length" and len(found.tokens) == 4


def test_it_is_off_by_itself_where_it_does_not_pay(drafts: dict[str, Path]) -> None:
    """A clock by which a guess takes two passes, and one by which it takes nothing."""
    with tight(drafts["other"], None) as small:
        for each, most in ((2.0, 3), (0.001, 10**9)):
            now = [0.0]

            def clock(now: list[float] = now, each: float = each) -> float:
                now[0] += each
                return now[0]

            model = DraftModel(small)
            costs = PassCosts(0.02)
            text, drafted = list(PROMPT), []
            drafter = model.drafter(Sampler(edgert.SamplingParams(temperature=0), 0), (), Ticket())
            speculator = Speculator([drafter], costs, 8, clock)
            for _ in range(30):
                costs.add(1, 1.0)
                guesses = speculator.draft(text, 8)
                drafted.append(len(guesses))
                speculator.learn([*guesses, 5])  # all were right
                text += [*guesses, 5]
            assert sum(drafted) <= most
            if each < 2:
                assert sum(drafted) > 100


# ------------------------------------------------------------------------ one budget


def process_of(engine: edgert.Engine) -> int:
    return next(region.nbytes for region in engine.plan.regions if region.name == "process")


def test_both_are_inside_one_budget(drafts: dict[str, Path], tiny_gguf: Path) -> None:
    """The draft model is part of the process when the large one's plan is made."""
    with edgert.load(tiny_gguf, memory_budget="2GiB", threads=1) as alone:
        before = process_of(alone)
    with edgert.load(
        tiny_gguf, memory_budget="2GiB", threads=1, draft_model=drafts["alike"]
    ) as engine:
        assert engine.plan.total_bytes <= engine.plan.budget_bytes <= 2048 * MIB
        draft = engine.draft_model
        assert draft is not None
        own = draft.engine.plan
        arena = own.total_bytes - process_of(draft.engine)
        assert process_of(engine) >= before + arena - 2 * MIB
    assert draft.engine._closed


def test_what_does_not_fit_is_refused(drafts: dict[str, Path], tiny_gguf: Path) -> None:
    with pytest.raises(BudgetError):
        edgert.load(tiny_gguf, memory_budget="64MiB", draft_model=drafts["alike"])
    with (
        tight(drafts["alike"], 0) as streamed,
        pytest.raises(BudgetError, match="the draft model must be in memory as a whole"),
    ):
        assert streamed.plan.streamed_bytes
        DraftModel(streamed)


# ------------------------------------------------------------------------ one vocabulary


def test_another_vocabulary_is_refused(tiny_gguf: Path, tmp_path: Path) -> None:
    narrow = tiny_model("llama_narrow", "Q8_0", path=tmp_path / "narrow.gguf")
    with pytest.raises(InputError, match="llama-q8_0.gguf has 288 tokens and narrow.gguf has 291"):
        edgert.load(tiny_gguf, draft_model=narrow)
    model = build("llama", "Q8_0")
    tokens = list(model.metadata["tokenizer.ggml.tokens"])
    tokens[270], tokens[271] = tokens[271], tokens[270]
    metadata = {**model.metadata, "tokenizer.ggml.tokens": tokens}
    mixed = TinyModel(metadata, model.tensors)
    write_gguf(tmp_path / "mixed.gguf", mixed.metadata, mixed.tensors)
    with pytest.raises(InputError, match="token 270 is 'l' in .* and 'u' in mixed.gguf"):
        edgert.load(tiny_gguf, draft_model=tmp_path / "mixed.gguf")


def test_the_command_says_so(tiny_gguf: Path, tmp_path: Path) -> None:
    run = inside("run", tiny_gguf, "-p", "a", "--draft-model", tmp_path / "no.gguf")
    assert_error(run, 3, "no.gguf")


def test_a_plan_counts_what_the_draft_model_takes(
    drafts: dict[str, Path], tiny_gguf: Path, tmp_path: Path
) -> None:
    """As much as the engine's own plan does, and refuses what it refuses."""
    sizes: dict[str, Any] = {"memory_budget": "2GiB", "threads": 1, "context_length": 256}
    alone = edgert.plan_model(tiny_gguf, **sizes)
    both = edgert.plan_model(tiny_gguf, draft_model=drafts["alike"], **sizes)
    more = both.region("process").nbytes - alone.region("process").nbytes
    with edgert.load(drafts["alike"], prefill_tokens=64, **sizes) as small:
        own = small.plan.total_bytes - process_of(small)
    assert own <= more <= own + MIB and both.total_bytes <= both.budget_bytes
    assert both.full_bytes == alone.full_bytes + more
    narrow = tiny_model("llama_narrow", "Q8_0", path=tmp_path / "narrow.gguf")
    with pytest.raises(InputError, match="another vocabulary"):
        edgert.plan_model(tiny_gguf, draft_model=narrow)
    shown = inside("plan", tiny_gguf, "-b", "2GiB", "--draft-model", drafts["alike"])
    assert shown.returncode == 0 and "draft    its model takes" in shown.stdout, shown.stderr
    missing = inside("plan", tiny_gguf, "--draft-model", tmp_path / "no.gguf")
    assert_error(missing, 3, "no.gguf")
