"""What drafting is predicted to give, and what is kept of how often drafts were right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from edgert.acceptance_file import acceptance_path, load_acceptance, save_acceptance
from edgert.draft_forecast import Costs, assumed_acceptance, cycle, draft_bits, forecast_drafting
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
    return Prediction(1 / one.total, 1.0, 1.0, 100, "flash", one, many, 1e9, None, False, 1.0, 2e9)


def test_bits_and_what_is_assumed_of_them() -> None:
    assert draft_bits(plan_with(BASED, BASED)) == 4
    assert draft_bits(plan_with(BASED, WHOLE)) == 6
    assert assumed_acceptance(4.0) == 0.93 < assumed_acceptance(4.5) < assumed_acceptance(8.0) == 1
    assert assumed_acceptance(2.0) == assumed_acceptance(3.0)


def test_what_drafting_gives() -> None:
    plan = plan_with(BASED, BASED)
    found = forecast_drafting(plan, plain(2.0, 0.16))
    assert found is not None and not found.is_learnt and found.acceptance == 0.93
    assert found.draft_seconds == pytest.approx(0.16 * 450 / 850)
    assert 0 < found.ready_share < 1 and found.pass_seconds == pytest.approx(2.0)
    surer = forecast_drafting(plan, plain(2.0, 0.16), 0.97)
    assert surer is not None and surer.is_learnt
    assert surer.decode_tok_s > found.decode_tok_s > 3 * 0.5
    certain = forecast_drafting(plan, plain(2.0, 0.16), 1.0)
    assert certain is not None and certain.ready_share > 0.98
    assert certain.decode_tok_s == pytest.approx(16 / 2.0, rel=0.02), "never a wait between passes"
    slow = forecast_drafting(plan, plain(2.0, 1.6))
    assert slow is not None and slow.drafted_tokens < found.drafted_tokens


def test_passes_that_leave_no_time_for_drafts() -> None:
    """The cores are the limit: every draft is made between two passes."""
    found = forecast_drafting(plan_with(BASED, BASED), plain(0.1, 0.16), 0.9)
    assert found is not None and found.ready_share == 0
    k, each = found.drafted_tokens, 0.016
    expected = (1 - 0.9 ** (k + 1)) / 0.1
    assert found.tokens_per_pass == pytest.approx(expected)
    assert found.pass_seconds == pytest.approx(0.16 + (k + 1) * each)
    seconds = k * found.draft_seconds + found.pass_seconds
    assert found.decode_tok_s == pytest.approx(expected / seconds)


def test_a_disk_that_gives_less_while_cores_work() -> None:
    """Its time is longer by that, however much the cores rest."""
    prediction = replace(plain(2.0, 0.16), busy_share=0.8)
    busy = forecast_drafting(plan_with(BASED, BASED), prediction, 0.99)
    idle = forecast_drafting(plan_with(BASED, BASED), plain(2.0, 0.16), 0.99)
    assert busy is not None and idle is not None
    assert busy.pass_seconds == pytest.approx(2.0 / 0.8)
    drafting = replace(plain(2.0, 0.16), profiled_bytes_per_s=1e9)
    slow = forecast_drafting(plan_with(BASED, BASED), drafting, 0.99)
    assert slow is not None and slow.pass_seconds == pytest.approx(2.0 / 0.65)
    assert busy.decode_tok_s < idle.decode_tok_s


@pytest.mark.parametrize("chance", [0.5, 0.8, 0.95])
@pytest.mark.parametrize(("k", "j"), [(3, 0), (6, 6), (12, 4)])
def test_the_chain_of_passes_is_what_passes_one_by_one_give(chance: float, k: int, j: int) -> None:
    costs = Costs(draft=0.1, weights=0.2, token=0.01, overhead=0.0, flash=1.2)
    found = cycle(costs, chance, k, j, True)
    random, tokens, seconds, ready = Random(k), 0, 0.0, 0
    for _ in range(40_000):
        verified = max(j, min(ready - 1, 15)) if ready else k
        seconds += 0.1 * (max(verified - ready + 1, 0) if ready else k)
        passing, made = costs.passes(verified, chance)
        seconds += passing
        right = next((i for i in range(verified + 1) if random.random() >= chance), verified + 1)
        tokens += min(right, verified) + 1
        ready = made if right == verified + 1 and made > 1 else 0
    if found.ready_share == 0:
        assert costs.passes(k, chance)[1] < 2
    assert found.decode_tok_s == pytest.approx(tokens / seconds, rel=0.03)


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
