"""Guesses drawn from a model's logits: of the model's own base, or of a smaller model.

Owns: drawing them one after the other. Must not know whose logits they are, nor how guesses are
weighed (speculation.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from edgert.draft_walk import Ahead
from edgert.errors import InputError, ModelError
from edgert.sampler import Sampler
from edgert.speculation import Acceptance

__all__ = ["ModelDrafter"]

_UNLIKELY = 0.1  # guesses that are right less often are not worth the memory's time


class ModelDrafter:
    """Guesses of one generation: a pass for each. See `Drafter`.

    A token is drawn with the noise that the sampler will use for its place, so it is the right one
    wherever the logits are like those of the full model.
    """

    is_free = False
    can_go_on = False  # beside a pass that verifies its guesses

    def __init__(
        self,
        name: str,
        logits: Callable[[list[int]], npt.NDArray[np.float32] | None],
        sampler: Sampler,
        ends: Collection[int],
        acceptance: Acceptance,
    ) -> None:
        """`logits` of the token after a text, None where there is no room for it; `ends`: tokens
        that nothing follows.
        """
        self.name = name
        self.acceptance = acceptance
        self._logits = logits
        self._sampler = sampler
        self._ends = ends
        self._fork = sampler  # draws guesses; a fork at the end of `_line`
        self._line: list[int] = []  # a text and the guesses behind it
        self._kinds: list[int] = []  # of those

    def ready(self, tokens: Sequence[int]) -> int:
        """As `Drafter.ready`."""
        more = len(self._line) - len(tokens)
        is_line = 0 < more <= len(self._kinds) and self._line[: len(tokens)] == tokens
        return more if is_line else 0

    def guesses(self, tokens: Sequence[int]) -> Iterator[tuple[int, int]]:
        """As `Drafter.guesses`; the kind is how sure the draw was (`Sampler.guess`).

        Raises what `logits` raises.
        """
        if not self.ready(tokens):
            self._line, self._kinds, self._fork = list(tokens), [], self._sampler.fork()
        at = len(tokens)
        while at < len(self._line) or self._guess(self._logits(self._line)) is not None:
            token, kind = self._line[at], self._kinds[at - len(self._line)]
            yield token, kind
            if token in self._ends:
                return
            at += 1

    def _guess(self, logits: npt.NDArray[np.float32] | None) -> int | None:
        """One more token behind the line."""
        if logits is None:
            return None
        try:
            token, kind = self._fork.guess(logits, self._line)
        except (InputError, ModelError):  # the full model may do better, or say so
            return None
        self._line.append(token)
        self._kinds.append(kind)
        return token

    def ahead(self, text: list[int], chance: float, most: int) -> Ahead | None:
        """What to guess behind `text`, which ends in all guesses made so far, right with `chance`:
        at most `most` tokens, while one is worth it.
        """
        if self._line != text or text[-1] in self._ends:
            return None

        def guess(logits: npt.NDArray[np.float32]) -> int | None:
            nonlocal chance
            token = self._guess(logits)
            if token is None:
                return None
            chance *= self.acceptance.chance(self._kinds[-1])
            made = len(self._line) - len(text)
            is_last = chance < _UNLIKELY or made >= most or token in self._ends
            return None if is_last else token

        return Ahead(text, guess)
