"""A small model drafts for a large one: `load(..., draft_model=...)`, --draft-model.

Owns: which models go together, and the logits of guesses. Must not know how they are drawn
(model_drafter.py) or weighed. Leviathan et al., arXiv 2211.17192.

The draft model is an engine of its own, opened first and all in memory: what it may use is part of
the process when the large model's plan is made, so both are inside one budget.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgert.errors import BudgetError, InputError
from edgert.model_drafter import ModelDrafter
from edgert.sampler import SURENESS, Sampler
from edgert.speculation import Acceptance

if TYPE_CHECKING:
    from edgert.engine import Engine
    from edgert.forward import Ticket
    from edgert.models.spec import ModelSpec
    from edgert.opening import Opened
    from edgert.plan import Plan

__all__ = ["NAME", "DraftModel", "check_vocabularies", "draft_bytes", "open_draft_model"]

NAME = "draft model"
_PREFILL = 64  # tokens of a pass: a small model reads a prompt fast enough


def check_vocabularies(model: Opened, draft: Opened) -> None:
    """Raise `InputError` unless the same token has the same number in both."""
    ours, theirs = (o.manifest.metadata.get("tokenizer.ggml.tokens", ()) for o in (model, draft))
    sizes = [(o.spec.vocab_size, o.path.name) for o in (model, draft)]
    if sizes[0][0] != sizes[1][0] or len(ours) != len(theirs):
        said = " and ".join(f"{name} has {size:,} tokens" for size, name in sizes)
        raise InputError(f"the draft model has another vocabulary: {said}; give one of the family")
    for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if one != other:
            raise InputError(
                f"the draft model has another vocabulary: token {i} is {one!r} in "
                f"{model.path.name} and {other!r} in {draft.path.name}; give one of the family"
            )


class DraftModel:
    """An open draft model, and what was learnt of its guesses."""

    def __init__(self, engine: Engine) -> None:
        """Takes over `engine`, which must hold all its weights: raises `BudgetError` if not."""
        try:
            _check_whole(engine.plan, engine.spec)
        except BudgetError:
            engine.close()
            raise
        self.engine = engine
        steps = [(i + 1) / (SURENESS + 1) for i in range(SURENESS)]
        self._acceptance = Acceptance([0.4 + 0.55 * step for step in steps])

    def drafter(self, sampler: Sampler, ends: Collection[int], ticket: Ticket) -> ModelDrafter:
        """The guesses of one generation."""
        engine = self.engine

        def logits(text: list[int]) -> npt.NDArray[np.float32] | None:
            """What its KV cache lacks of `text` is computed with the first guess."""
            if len(text) > engine.context_length:
                return None
            found = engine.forward.evaluate(text, engine.vocab_size, ticket=ticket)
            return found.reshape(-1)

        return ModelDrafter(NAME, logits, sampler, ends, self._acceptance)

    def close(self) -> None:
        """Give its memory back. Idempotent."""
        self.engine.close()


def _check_whole(plan: Plan, spec: ModelSpec) -> None:
    """Raise `BudgetError` where not all weights are in memory."""
    if plan.streamed_bytes or plan.expert_slots < spec.num_hidden_layers * spec.num_experts:
        raise BudgetError(
            plan.budget_bytes, plan.full_bytes, plan.table(),
            "the draft model must be in memory as a whole; give more memory or a smaller one",
        )  # fmt: skip


def _sizes(model: Opened, draft: Opened, context: int | None) -> dict[str, Any]:
    """The options that both plans of a draft model are made with."""
    longest = min(model.spec.max_position_embeddings, draft.spec.max_position_embeddings)
    context = None if context is None else min(context, longest)
    return {"context_length": context, "prefill_tokens": _PREFILL}


def draft_bytes(
    path: str | Path, model: Opened, budget: int | None, threads: int | None, context: int | None
) -> int:
    """What a draft model will add to the process, as planned; raises as `open_draft_model`."""
    from edgert.loading import TOKEN_BYTES
    from edgert.opening import open_model, plan_model

    draft = open_model(path)
    check_vocabularies(model, draft)
    sizes = _sizes(model, draft, context)
    plan = plan_model(path, memory_budget=budget, threads=threads, **sizes)
    _check_whole(plan, draft.spec)
    process = plan.region("process").nbytes
    return plan.total_bytes - process + TOKEN_BYTES * draft.spec.vocab_size


def open_draft_model(
    path: str | Path, model: Opened, budget: int | None, threads: int | None, context: int | None
) -> DraftModel:
    """Open `path` as the draft model of `model`, a checked header with its vocabulary.

    `budget` in bytes is for both, None where it is a share or what is free. The context is the
    draft model's own where that is shorter. Raises `InputError` for another vocabulary before any
    weight is read, `BudgetError` when it does not fit as a whole, and as `load` does.
    """
    from edgert.opening import load, open_model

    draft = open_model(path)
    check_vocabularies(model, draft)
    sizes = _sizes(model, draft, context)
    return DraftModel(load(path, memory_budget=budget, threads=threads, **sizes))
