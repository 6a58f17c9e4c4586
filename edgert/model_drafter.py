"""Guesses drawn from a model's logits: of the model's own base, or of a smaller model.

Owns: drawing them one after the other. Must not know whose logits they are, nor how guesses are
weighed (speculation.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from edgert.errors import InputError, ModelError
from edgert.sampler import Sampler
from edgert.speculation import Acceptance

__all__ = ["ModelDrafter"]


class ModelDrafter:
    """Guesses of one generation: a pass for each. See `Drafter`.

    A token is drawn with the random number that the sampler will use for its place, so it is the
    right one wherever the logits are like those of the full model.
    """

    is_free = False

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

    def guesses(self, tokens: Sequence[int]) -> Iterator[tuple[int, int]]:
        """As `Drafter.guesses`; the kind is how sure the draw was (`Sampler.guess`).

        Raises what `logits` raises.
        """
        sampler, text = self._sampler.fork(), list(tokens)
        while (logits := self._logits(text)) is not None:
            try:
                token, kind = sampler.guess(logits, text)
            except (InputError, ModelError):  # the full model may do better, or say so
                return
            yield token, kind
            if token in self._ends:
                return
            text.append(token)
