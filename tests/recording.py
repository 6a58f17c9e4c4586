"""Runs of an engine whose routing is recorded and whose hits are counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgert.engine import Engine
from edgert.routing import Routing, join_passes
from tests.answers import prompt

__all__ = ["counted", "recorded"]


def recorded(engine: Engine, model: Path, tokens: int = 20) -> Routing:
    """What a greedy answer chose, without reading ahead."""
    passes: list[np.ndarray] = []
    assert engine.experts is not None
    engine.experts.set_prefetch(False)
    engine.experts.record(passes.append)
    engine.generate(prompt(model), max_tokens=tokens, temperature=0)
    engine.experts.record(None)
    experts, sizes = engine.spec.num_experts, engine.plan.expert_sizes
    each = None if sizes is None else sizes.records.reshape(-1, experts)
    return join_passes(passes, experts, engine.plan.expert_slot_bytes, each)


def counted(engine: Engine, model: Path) -> tuple[Routing, int, int, int]:
    """The same as the first run of an engine, its slots, and its hits and misses."""
    trace = recorded(engine, model)
    assert engine.experts is not None
    return trace, engine.plan.expert_slots, *engine.experts.counts
