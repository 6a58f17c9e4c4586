"""The model drafts for itself: with what is in memory of its weights.

Owns: guesses of a nested model's base. Must not know where weights are, nor how guesses are
weighed (speculation.py). Drafting with fewer bits of the same weights: SPEQ, arXiv 2510.18525;
substitutes of what is not in memory: SubSpec, arXiv 2509.18344.
"""

from __future__ import annotations

from collections.abc import Collection

from edgert.forward import Forward, Ticket
from edgert.model_drafter import ModelDrafter
from edgert.sampler import SURENESS, Sampler
from edgert.speculation import Acceptance

__all__ = ["NAME", "self_acceptance", "self_drafter"]

NAME = "self"


# Drafts of a base that has not drafted yet, wrong by kind: of stories260K with 4 bits of 8 0.39,
# 0.16, 0.07, 0.00 greedy and 0.42, 0.20, 0.09, 0.04 at temperature 0.8, with 3 bits 0.60, 0.41,
# 0.20, 0.12 and 0.57, 0.42, 0.32, 0.22. Greedy and sampled ones share what is learnt of a kind.
_WRONG = 0.45


def self_acceptance() -> Acceptance:
    """What is known of a base that has not drafted yet."""
    return Acceptance([1 - _WRONG ** (i + 1) for i in range(SURENESS)])


def self_drafter(
    forward: Forward,
    sampler: Sampler,
    ends: Collection[int],
    acceptance: Acceptance,
    ticket: Ticket,
) -> ModelDrafter:
    """The guesses of one generation: a walk of the draft program for each.

    They raise `StorageError`, `CancelledError`.
    """
    drafter = ModelDrafter(
        NAME, lambda text: forward.draft(text, ticket), sampler, ends, acceptance
    )
    drafter.can_go_on = True
    return drafter
