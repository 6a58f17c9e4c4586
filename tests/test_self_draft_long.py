"""A nested model that drafts for itself, over 1,000 prompts: every token is that of plain decoding.

pytest -m stress tests/test_self_draft_long.py
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import edgert
from edgert.units import KIB
from tests.test_self_draft import by_itself, slow_flash
from tests.tight import floor_of, plan_of, tight

__all__ = ["slow_flash"]  # a fixture of every test here too

PROMPTS = 1000
SIZES: dict[str, Any] = {"context_length": 256, "prefill_tokens": 16}


def drafting_budgets(path: Path) -> list[int]:
    """The least, a middle and the largest number of spare bytes with which a model drafts."""
    floor, full = floor_of(path, **SIZES), plan_of(path, 2**62, **SIZES).full_bytes
    spare = [s for s in range(0, full - floor, 16 * KIB)
             if plan_of(path, floor + s, **SIZES).can_draft]  # fmt: skip
    return [spare[0], spare[len(spare) // 2], spare[-1]]


@pytest.mark.stress
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("split", ["4+4", "3+1+4"])
def test_a_thousand_prompts(split: str, tiny_gguf: Path, tmp_path: Path) -> None:
    source, path = tiny_gguf, tmp_path / "nested.edgert"
    edgert.pack_model(source, path, nested=split)
    rng = random.Random(1)
    with tight(source, None, **SIZES) as engine:
        prompts = [
            [1, *(rng.randrange(3, engine.vocab_size) for _ in range(rng.randrange(1, 24)))]
            for _ in range(PROMPTS)
        ]

    def tokens(engine: edgert.Engine, number: int, **more: Any) -> tuple[int, ...]:
        how: dict[str, Any] = {"temperature": 0.8 * (number % 2), "seed": number}
        return engine.generate(prompts[number], max_tokens=64, **how, **more).tokens

    with tight(source, None, **SIZES) as engine:
        want = [tokens(engine, i, speculate=False) for i in range(PROMPTS)]
    for spare, threads in zip(drafting_budgets(path), (1, 2, 3), strict=True):
        accepted = drafted = 0
        with tight(path, spare, threads=threads, **SIZES) as engine:
            for i in range(PROMPTS):
                assert tokens(engine, i) == want[i], (i, spare, threads)
                own = by_itself(engine)
                drafted, accepted = drafted + own[0], accepted + own[1]
        assert accepted > 0.1 * drafted > 0
        print(f"{split} {spare // KIB} KiB: {accepted} of {drafted} right")
