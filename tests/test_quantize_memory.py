"""What calibration holds beside an engine is in the engine's plan, at every moment of it."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgert
from edgert import expert_quantizing, expert_widths
from edgert.expert_look import watch_experts
from edgert.expert_widths import ExpertActivity, observe
from edgert.loading import GROWTH_BYTES
from edgert.models.spec import ModelSpec
from edgert.units import MIB
from tests.test_quantize import SIZE, TEXT
from tests.tight import tight
from tests.tiny import prompt_of

BALLAST = 192 * MIB  # far more than a process grows by between two openings


class _Seen:
    """The engines of a run, and their accounts whenever a layer was looked at and at their end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.planned: list[int] = []
        self.looks = 0
        load = edgert.load

        def spied(*given: Any, **options: Any) -> edgert.Engine:
            engine = load(*given, **options)
            self.planned.append(engine.plan.region("process").nbytes)
            close = engine.close

            def closed() -> None:
                self.check(engine)
                close()

            monkeypatch.setattr(engine, "close", closed)
            return engine

        def watched(engine: edgert.Engine, tokens: list[int], sink: Any) -> None:
            def looked(look: Any) -> None:
                sink(look)
                self.check(engine)
                self.looks += 1

            watch_experts(engine, tokens, looked)

        monkeypatch.setattr(expert_quantizing, "load", spied)
        monkeypatch.setattr(expert_widths, "watch_experts", watched)

    def check(self, engine: edgert.Engine) -> None:
        report = engine.memory()
        for name, nbytes in report.planned.items():
            assert report.held[name] <= nbytes, name


def _quantized(path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> _Seen:
    seen = _Seen(monkeypatch)
    edgert.quantize_experts(path, out, "3bpw", text=TEXT, context_length=SIZE, threads=1)
    return seen


def test_activity_is_in_the_plan_of_both_engines(
    tiny_moe_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        small = _quantized(tiny_moe_gguf, tmp_path / "small.edgert", patch)
    empty = ExpertActivity.empty
    kept = []

    def larger(spec: ModelSpec) -> ExpertActivity:
        """As of a model with many more experts: what is not this one's is there all the same."""
        more = np.empty(BALLAST, np.uint8)
        more.fill(1)
        kept.append(more)
        return empty(spec)

    with monkeypatch.context() as patch:
        patch.setattr(ExpertActivity, "empty", larger)
        large = _quantized(tiny_moe_gguf, tmp_path / "large.edgert", patch)
    assert len(small.planned) == len(large.planned) == 2 and small.looks == large.looks > 0
    for before, after in zip(small.planned, large.planned, strict=True):
        assert after - before > 0.8 * BALLAST
    assert (tmp_path / "small.edgert").read_bytes() == (tmp_path / "large.edgert").read_bytes()


def test_what_observing_takes_beside_does_not_grow_with_the_text(
    tiny_moe_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has to fit the growth that a plan allows a process, whatever the text and the pass."""
    peaks: list[int] = []

    def watched(engine: edgert.Engine, tokens: list[int], sink: Any) -> None:
        def looked(look: Any) -> None:
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            sink(look)
            peaks.append(tracemalloc.get_traced_memory()[1] - before)

        watch_experts(engine, tokens, looked)

    monkeypatch.setattr(expert_widths, "watch_experts", watched)
    with tight(tiny_moe_gguf, None, prefill_tokens=128) as engine:
        spec = engine.spec
        tracemalloc.start()
        try:
            observe(engine, [prompt_of("olmoe", 32)] * 2)
            short = max(peaks)
            observe(engine, [prompt_of("olmoe", 128)] * 2)
        finally:
            tracemalloc.stop()
    assert max(peaks) < 1.2 * short
    # A few arrays of 16 tokens' inner values: of 8 x 4096 in float32 each takes 2 MiB.
    inner = 16 * spec.num_experts_per_tok * max(spec.moe_intermediate_size, spec.hidden_size) * 4
    assert short < 5 * inner
    assert 5 * (16 * 8 * 4096 * 4) < GROWTH_BYTES
