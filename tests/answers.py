"""What tests of changing budgets ask an engine, and what it has to answer."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from edgert.engine import Engine
from tests.tight import tight
from tests.tiny import prompt_of

GREEDY: dict[str, Any] = {"max_tokens": 12, "temperature": 0}


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
    return engine.smallest_budget(), engine._elastic.plan_for(2**60).total_bytes
