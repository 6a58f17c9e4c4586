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


# Greedy drafts of a base that has not drafted yet, wrong by kind: of stories260K 0.37, 0.10, 0.00
# with 4 bits of 8 and 0.55, 0.38, 0.10, 0.02 with 3. In its first 80 tokens a model so taken gave
# 1.01 to 1.27 times the tokens a second of one taken as sampled ones are (replayed drafts).
_WRONG = 0.45


def self_acceptance(greedy: bool) -> Acceptance:
    """What is known of a base that has not drafted yet."""
    if greedy:
        return Acceptance([1 - _WRONG ** (i + 1) for i in range(SURENESS)])
    steps = [(i + 1) / (SURENESS + 1) for i in range(SURENESS)]
    return Acceptance([0.6 + 0.38 * step for step in steps])


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
