"""The model drafts for itself: with what is in memory of its weights.

Owns: guesses of a nested model's base. Must not know where weights are, nor how guesses are
weighed (speculation.py). Drafting with fewer bits of the same weights: SPEQ, arXiv 2510.18525;
substitutes of what is not in memory: SubSpec, arXiv 2509.18344.

A drafted token is drawn from the base's logits with the random number that the sampler will use
for its place, so it is the right one wherever the full weights' logits are alike.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from edgert.errors import InputError, ModelError
from edgert.forward import Forward, Ticket
from edgert.sampler import SURENESS, Sampler
from edgert.speculation import Acceptance

__all__ = ["SelfDrafter", "self_acceptance"]


def self_acceptance() -> Acceptance:
    """What is known of a base that has not drafted yet; for greedy and for sampled tokens."""
    steps = [(i + 1) / (SURENESS + 1) for i in range(SURENESS)]
    return Acceptance([0.6 + 0.38 * step for step in steps])


class SelfDrafter:
    """Guesses of one generation: a walk of the draft program for each. See `Drafter`."""

    name = "self"
    is_free = False

    def __init__(
        self,
        forward: Forward,
        vocabulary: int,
        sampler: Sampler,
        ends: Collection[int],
        acceptance: Acceptance,
        ticket: Ticket,
    ) -> None:
        """`ends`: tokens that nothing follows."""
        self.acceptance = acceptance
        self._forward = forward
        self._vocabulary = vocabulary
        self._sampler = sampler
        self._ends = ends
        self._ticket = ticket

    def guesses(self, tokens: Sequence[int]) -> Iterator[tuple[int, int]]:
        """As `Drafter.guesses`; the kind is how sure the draw was (`Sampler.guess`).

        Raises `StorageError`, `CancelledError`.
        """
        sampler, text = self._sampler.fork(), list(tokens)
        while True:
            logits = self._forward.draft(text, self._vocabulary, self._ticket)
            if logits is None:
                return
            try:
                token, kind = sampler.guess(logits, text)
            except (InputError, ModelError):  # the full weights may do better, or say so
                return
            yield token, kind
            if token in self._ends:
                return
            text.append(token)
