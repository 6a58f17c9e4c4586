"""Guesses of the experts a layer will use, from routing alone: prefetchers of the simulator.

Owns: the guessers and what they learn. Must not know caches, nor the model: the engine's own guess,
the next layer's router applied to this layer's state, is in no trace (kernels_cpu/experts.py).
Statistics of transitions between layers: EdgeMoE, arXiv 2308.14352, section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["GUESSERS", "Guesser", "make_guesser"]

_Ints = npt.NDArray[np.int64]


class Guesser(Protocol):
    """Told what each layer used, in the order of the pass; asked before each."""

    wasted: int  # experts that were read ahead and not used, counted by the simulator

    def guess(self, layer: int, k: int) -> _Ints:
        """Up to `k` experts of `layer`, which is next; likeliest first."""
        ...

    def learn(self, layer: int, experts: _Ints) -> None:
        """`layer` used these."""
        ...


class _Last:
    """What the layer used for the token before."""

    def __init__(self, layers: int, experts: int) -> None:
        self.wasted = 0
        self._used: list[_Ints] = [np.zeros(0, np.int64)] * layers

    def guess(self, layer: int, k: int) -> _Ints:
        return self._used[layer][:k]

    def learn(self, layer: int, experts: _Ints) -> None:
        self._used[layer] = experts


class _Transitions:
    """What was used most often so far beside what the layer before used now.

    The layer before the first is the last one of the token before.
    """

    def __init__(self, layers: int, experts: int) -> None:
        self.wasted = 0
        self._counts = np.zeros((layers, experts, experts), np.float32)
        self._before = np.zeros(0, np.int64)

    def guess(self, layer: int, k: int) -> _Ints:
        beside = self._counts[layer, self._before].sum(axis=0)
        order = np.argsort(-beside, kind="stable")[:k]
        found: _Ints = order[beside[order] > 0]
        return found

    def learn(self, layer: int, experts: _Ints) -> None:
        self._counts[layer, self._before[:, None], experts] += 1
        self._before = experts


GUESSERS: dict[str, Callable[[int, int], Guesser]] = {"last": _Last, "transitions": _Transitions}


def make_guesser(name: str, layers: int, experts: int) -> Guesser:
    """A guesser without a past."""
    return GUESSERS[name](layers, experts)
