"""Who guesses in a generation, beside the prompt lookup.

Owns: the list. Must not know how guesses are weighed (speculation.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgert.forward import Ticket
from edgert.sampler import Sampler
from edgert.self_draft import self_drafter
from edgert.speculation import Drafter

if TYPE_CHECKING:
    from edgert.engine import Engine

__all__ = ["drafters_of"]


def drafters_of(engine: Engine, sampler: Sampler, ticket: Ticket) -> list[Drafter]:
    """The engine's own base and its draft model, where it has them, for a generation."""
    ends, found = engine.tokenizer.eos_ids, list[Drafter]()
    if engine.plan.can_draft:
        learnt = engine.acceptance
        found += [self_drafter(engine.forward, sampler, ends, learnt, ticket)]
    if engine.draft_model is not None:
        found += [engine.draft_model.drafter(sampler, ends, ticket)]
    return found
