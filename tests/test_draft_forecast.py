"""What drafting is predicted to give, and what is kept of how often drafts were right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgert.acceptance_file import acceptance_path, load_acceptance, save_acceptance
from edgert.draft_forecast import assumed_acceptance, draft_bits, forecast_drafting
from edgert.plan_parts import Base, TilePlan
from edgert.prediction import Prediction, Terms
from edgert.speculation import Acceptance

WHOLE = TilePlan("whole", 0, 16, 850, (), False)
BASED = TilePlan("based", 0, 16, 850, (), False, (), 0, Base(4, 1, 450, 400))


def plan_with(*tiles: TilePlan, tokens: int = 64) -> Any:
    can = any(t.base for t in tiles) and all(t.memory_bytes for t in tiles)
    return SimpleNamespace(tiles=tiles, can_draft=can, prefill_tokens=tokens, logit_rows=64)


def plain(flash: float, compute: float) -> Prediction:
    """A pass of `flash` seconds of reading beside `compute` seconds; more tokens cost little."""
    one = Terms(flash, compute, 0.0, 0.0, 0.0, 0.0, 0.0, max(flash, compute))
    many = replace(one, compute=100 * compute / 10)
    return Prediction(1 / one.total, 1.0, 1.0, 100, "flash", one, many, 1e9, None, False)


def test_bits_and_what_is_assumed_of_them() -> None:
    assert draft_bits(plan_with(BASED, BASED)) == 4
    assert draft_bits(plan_with(BASED, WHOLE)) == 6
    assert assumed_acceptance(4.0) == 0.86 < assumed_acceptance(4.5) < assumed_acceptance(8.0) == 1
    assert assumed_acceptance(2.0) == assumed_acceptance(3.0)


def test_what_drafting_gives() -> None:
    plan = plan_with(BASED, BASED)
    found = forecast_drafting(plan, plain(2.0, 0.16))
    assert found is not None and not found.is_learnt and found.acceptance == 0.86
    assert found.draft_seconds == pytest.approx(0.16 * 450 / 850)
    assert found.pass_seconds == 2.0
    expected = (1 - 0.86 ** (found.drafted_tokens + 1)) / 0.14
    assert found.tokens_per_pass == pytest.approx(expected)
    seconds = found.drafted_tokens * found.draft_seconds + 2.0
    assert found.decode_tok_s == pytest.approx(expected / seconds)
    surer = forecast_drafting(plan, plain(2.0, 0.16), 0.95)
    assert surer is not None and surer.is_learnt
    assert surer.drafted_tokens >= found.drafted_tokens
    assert surer.decode_tok_s > found.decode_tok_s > 3 * 0.5
    slow = forecast_drafting(plan, plain(2.0, 1.6))
    assert slow is not None and slow.drafted_tokens < found.drafted_tokens


def test_plans_that_cannot_draft() -> None:
    assert forecast_drafting(plan_with(WHOLE), plain(2.0, 0.1)) is None
    assert forecast_drafting(plan_with(BASED, tokens=1), plain(2.0, 0.1)) is None


# ------------------------------------------------------------------------ what was learnt


def learn(known: Acceptance, tokens: int) -> None:
    for i in range(tokens):
        known.learn(15, i % 10 > 0)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, ...]:
    monkeypatch.setattr("edgert.acceptance_file.cache_root", lambda: tmp_path / "cache" / "k")
    monkeypatch.delenv("EDGERT_ACCEPTANCE", raising=False)
    file = tmp_path / "model.edgert"
    file.write_bytes(b"x" * 10)
    return (file,)


def test_what_was_learnt_is_kept(cache: tuple[Path, ...]) -> None:
    plan = plan_with(BASED)
    known = load_acceptance(cache, plan)
    assert known.learnt == 0
    learn(known, 40)
    save_acceptance(cache, plan, known)
    assert load_acceptance(cache, plan).learnt == 0, "too few to say anything"
    learn(known, 40)
    save_acceptance(cache, plan, known)
    again = load_acceptance(cache, plan)
    assert again.state() == known.state()
    assert again.mean == known.mean == pytest.approx(0.88, abs=0.05)
    assert load_acceptance(cache, plan_with(BASED, WHOLE)).learnt == 0, "other bits"
    cache[0].write_bytes(b"x" * 11)
    assert load_acceptance(cache, plan).learnt == 0, "another file"


def test_few_files_are_kept_and_none_where_it_is_off(
    cache: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgert.acceptance_file._MOST_FILES", 3)
    plan = plan_with(BASED)
    known = load_acceptance(cache, plan)
    learn(known, 80)
    folder = acceptance_path(cache, plan).parent
    for size in range(5):
        cache[0].write_bytes(bytes(size))
        save_acceptance(cache, plan, known)
    assert len(list(folder.iterdir())) == 3 and acceptance_path(cache, plan).exists()
    monkeypatch.setenv("EDGERT_ACCEPTANCE", "off")
    assert load_acceptance(cache, plan).learnt == 0
    cache[0].write_bytes(b"another")
    save_acceptance(cache, plan, known)
    assert not acceptance_path(cache, plan).exists()


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '{"tried": {}}', "\0", '{"tried": 1, "right": 2}',
             '{"tried": [1], "right": [2], "seen": [1, 1], "learnt": 1}',
             '{"tried": ["a"], "right": [2], "seen": [1, 1], "learnt": 1}'],
)  # fmt: skip
def test_a_file_of_nonsense_counts_as_none(cache: tuple[Path, ...], text: str) -> None:
    plan = plan_with(BASED)
    path = acceptance_path(cache, plan)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert load_acceptance(cache, plan).learnt == 0


def test_a_folder_that_cannot_be_written(
    cache: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgert.acceptance_file.cache_root", lambda: cache[0] / "no" / "folder")
    known = load_acceptance(cache, plan_with(BASED))
    learn(known, 80)
    save_acceptance(cache, plan_with(BASED), known)
