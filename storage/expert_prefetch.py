"""Experts read before they are asked for: what a hint names, and whether following it pays.

Owns: the board of hints, the account of what was read ahead, and the switch that follows from it.
Must not know files, threads or slots.

Compiled code applies a later layer's router to the hidden state of now, and posts what it would
choose: the board is int64[3 + HINT_MAX], the stamp which that layer will write (one more than the
clock of now), the layer, the number of experts, then experts, likeliest first. It may be written
while it is read, or lie: what is read is checked, and it is advice.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgert.storage.trial import Trial

__all__ = ["ENVIRONMENT", "HINT_MAX", "Hint", "PrefetchCounts", "Prefetcher"]

ENVIRONMENT = "EDGERT_PREFETCH"  # "on": experts are read ahead where that is faster
HINT_MAX = 64
_DUE, _LAYER, _COUNT, _EXPERTS = range(4)
# Of the last `_JUDGED` experts read ahead half must have been wanted: one that was not costs the
# disk as much as one that was saves.
_JUDGED = 64
_REST = 64  # passes without hints after that, twice as many each time
# Right guesses can still cost more than they save, where reading and computing share cores: passes
# of one token take turns with and without hints.
_TURN = 4


@dataclass(frozen=True, slots=True)
class Hint:
    """Experts that a layer may want: keys of those named, likeliest first."""

    due: int
    keys: tuple[int, ...]


@dataclass(slots=True)
class PrefetchCounts:
    """Experts read ahead: in their slot when wanted, on their way then, and not wanted."""

    useful: int = 0
    late: int = 0
    wasted: int = 0


class Prefetcher:
    """Reads hints and judges them. Not thread-safe; the streamer calls it under its lock."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self._shape = shape
        self.board: npt.NDArray[np.int64] = np.zeros(_EXPERTS + HINT_MAX, np.int64)
        self.allowed = os.environ.get(ENVIRONMENT) == "on"  # by the user
        self.counts = PrefetchCounts()
        self.hint = Hint(0, ())  # the newest that was read
        self._loaded: dict[int, int] = {}  # keys in a slot, not wanted yet -> when they are due
        self._verdicts: deque[bool] = deque(maxlen=_JUDGED)
        self._trial = Trial(_TURN)
        self._rest = 0  # passes without hints that are left
        self._rests = 0

    @property
    def on(self) -> bool:
        """Whether the next pass is to post hints."""
        return self.allowed and self._rest == 0 and self._trial.on

    def look(self) -> Hint | None:
        """The hint on the board if it is a new one."""
        board = self.board.tolist()
        due, layer, count = board[_DUE], board[_LAYER], board[_COUNT]
        n_layers, n_experts = self._shape
        sound = due > 0 and 0 <= layer < n_layers and 0 < count <= HINT_MAX
        if due == self.hint.due or not sound:
            return None
        experts = dict.fromkeys(board[_EXPERTS : _EXPERTS + count])
        first = layer * n_experts
        self.hint = Hint(due, tuple(first + e for e in experts if 0 <= e < n_experts))
        return self.hint

    def loaded(self, key: int, due: int) -> None:
        """An expert nobody asked for yet is in its slot."""
        self._loaded[key] = due

    def late(self) -> None:
        """An expert was asked for while it was read ahead."""
        self.counts.late += 1
        self._verdicts.append(True)

    def dropped(self) -> None:
        """An expert of which a part was read ahead will not be read further."""
        self.counts.wasted += 1
        self._verdicts.append(False)

    def settle(self, stamps: npt.NDArray[np.int64], now: int) -> int:
        """Judge what was due up to the stamp `now`; return how many turned out useful.

        `stamps` (n_keys,): of the last use.
        """
        over = [key for key, due in self._loaded.items() if due <= now]
        useful = 0
        for key in over:
            used = int(stamps[key]) >= self._loaded.pop(key)
            useful += used
            self._verdicts.append(used)
        self.counts.useful += useful
        self.counts.wasted += len(over) - useful
        return useful

    def pass_ended(self, tokens: int, seconds: float) -> None:
        """Switch off for a while what was wrong too often, or slow; begin again after it."""
        if self.allowed and not self._rest and tokens == 1:
            self._trial.add(seconds)
        if self._rest:
            self._rest -= 1
        elif len(self._verdicts) == _JUDGED and 2 * sum(self._verdicts) < _JUDGED:
            self.rest()

    def rest(self) -> None:
        """No hints for some passes, twice as many as last time."""
        self._rest = _REST << min(self._rests, 8)
        self._rests += 1
        self._verdicts.clear()

    def reset(self) -> None:
        """Forget hints and what is not judged yet; no pass is under way."""
        self.board[_COUNT] = 0
        self.hint = Hint(int(self.board[_DUE]), ())
        self._loaded.clear()
