"""Whether passes are faster one way than the other, found out by taking turns.

Owns: the turns and their verdict. Must not know what the ways are: with hints or without
(expert_prefetch.py), on fewer threads or on all (edgert/forward.py).
"""

from __future__ import annotations

from statistics import median

__all__ = ["Trial"]

_TURNS = 8  # each way
_HOLDS = 1024  # passes until the ways are compared again
_WORTH = 0.99  # of the time of the other way


class Trial:
    """Passes go one way and the other, `turn` at a time; then as the faster median says.

    Two trials at a time need turns of different length, so that neither is taken for the other.
    """

    def __init__(self, turn: int) -> None:
        self._turn = turn
        self._seconds: dict[bool, list[float]] = {True: [], False: []}
        self._verdict = True
        self._holds = 0  # passes for which the verdict does

    @property
    def on(self) -> bool:
        """Whether the next pass is to go that way."""
        if self._holds:
            return self._verdict
        return sum(map(len, self._seconds.values())) // self._turn % 2 == 0

    def add(self, seconds: float) -> None:
        """A pass of one token took so long."""
        if self._holds:
            self._holds -= 1
            return
        self._seconds[self.on].append(seconds)
        if sum(map(len, self._seconds.values())) == 2 * self._turn * _TURNS:
            self._verdict = median(self._seconds[True]) <= _WORTH * median(self._seconds[False])
            self._seconds = {True: [], False: []}
            self._holds = _HOLDS
