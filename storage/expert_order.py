"""How experts are ordered by their past uses: which one is wanted again soonest.

Owns: what is remembered of past use, and the rank it gives. Must not know how many slots there are,
nor which layer they belong to (expert_policy.py).

A *key* is layer * n_experts + expert. Its *stamp* is the clock of its last use, 0 for never; the
clock ticks once a layer, so n_layers ticks are a pass. Compiled code writes stamps, and a policy
learns from them what was used (`observe`). No key has two stamps in a pass: of one with several
tokens an order also learns what each token chose, as if they had come one by one. (By stamps alone
a prompt that uses nearly all experts says nothing of which are used most: the 11 tokens behind one
of 256 then missed 50 experts each, with it 33; 64 experts of which 8 act, 16 layers, half kept.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

__all__ = [
    "USUAL", "Chosen", "DecayedLfu", "ExpertPolicy", "Lfu", "Lru", "Markov", "Setting", "Shape",
    "likeliest",
]  # fmt: skip

Shape = tuple[int, int]  # n_layers, n_experts
_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]
Chosen = Sequence[_Ints]  # of each layer the experts of each token of the pass, (tokens, k)


class Setting(NamedTuple):
    """What past uses of an expert are worth; `edgert simulate --tune` compares settings."""

    half_life: float  # passes after which a use counts half of what it did
    doubt: float  # above 0: turns for which frequency counts beside what was seen to follow


# No setting is better on all routing, in whole or by halves (README).
USUAL = Setting(96.0, 4.0)
# What follows an expert is counted in bytes: halved when it has come so often.
_TURNS = 64
_MOST_COUNTS = 4 << 20  # of a model: they lie in the memory of the process


class ExpertPolicy(Protocol):
    """An order of eviction. Not thread-safe; its owner calls it under one lock."""

    @property
    def name(self) -> str:
        """What it is called in tables and options."""

    def observe(self, stamps: _Ints, chosen: Chosen | None = None) -> None:
        """Learn what was used since the last call: `stamps` (n_keys,), not kept.

        `chosen`: what the tokens of the pass chose in the layers it has come to, where there are
        several tokens.
        """

    def missed(self, count: int) -> None:
        """Learn that `count` experts had to be loaded."""

    def ranks(self, owner: _Ints) -> _Floats:
        """The rank of each slot, (n_slots,); the lowest leaves first. `owner`: keys, -1 free."""


class Lru:
    """Least recently used first. Hits exactly 0 % below the working set of one token."""

    name = "lru"

    def __init__(self, shape: Shape) -> None:
        self.seen: _Ints = np.zeros(shape[0] * shape[1], np.int64)
        self._layers, self._experts = shape

    def observe(self, stamps: _Ints, chosen: Chosen | None = None) -> None:
        """Remember the stamps."""
        self.seen[:] = stamps

    def _keys(self, layer: int) -> slice:
        """The keys of a layer."""
        return slice(layer * self._experts, (layer + 1) * self._experts)

    def _computed(self, stamps: _Ints) -> list[int]:
        """The layers with a later stamp than seen. One seen while it is stamped is so once."""
        shape = self._layers, self._experts
        latest = stamps.reshape(shape).max(1) != self.seen.reshape(shape).max(1)
        found: list[int] = np.flatnonzero(latest).tolist()
        return found

    def missed(self, count: int) -> None:
        """Misses change nothing."""

    def ranks(self, owner: _Ints) -> _Floats:
        """The stamps."""
        stamps: _Floats = self.seen[owner].astype(np.float64)
        return stamps


class Lfu(Lru):
    """Least frequently used first, of equals the one used longest ago."""

    name = "lfu"

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self._uses = np.zeros(len(self.seen))

    def observe(self, stamps: _Ints, chosen: Chosen | None = None) -> None:
        """Count what has a new stamp, or each token that chose it."""
        if chosen is None:
            self._uses += stamps != self.seen
        else:
            for layer in self._computed(stamps):
                uses = np.bincount(chosen[layer].reshape(-1), minlength=self._experts)
                self._uses[self._keys(layer)] += uses
        self.seen[:] = stamps

    def ranks(self, owner: _Ints) -> _Floats:
        """Uses, then stamps."""
        ranks: _Floats = self._uses[owner] + self.seen[owner] / (1.0 + self.seen.max())
        return ranks


class DecayedLfu(Lru):
    """Least frequently used first, each use counting half after `half_life` passes.

    The weight of a key is w(t) = sum over its uses u of 2^(-(t - u) / h): LRFU (Lee et al., 2001).
    Kept as score = log2 w(t) + t / h, which does not change while a key is not used, so that an
    order needs no clock. The last use counts `boost` x 4^-age more: what was just used is used
    again more often than its frequency says. `prior` (n_keys,): weights to begin with, of a
    profile.
    """

    name = "lfu-decay"

    def __init__(
        self,
        shape: Shape,
        prior: _Floats | None = None,
        half_life: float = USUAL.half_life,
        boost: float = 0.0,
    ) -> None:
        super().__init__(shape)
        self._ticks = half_life * shape[0]
        self._boost = boost
        # Time is the clock, and for each token but one of a pass as many ticks more.
        self._more: _Ints = np.zeros(len(self.seen), np.int64)
        self._used_at: _Ints = np.zeros(len(self.seen), np.int64)
        self.score = np.full(len(self.seen), -np.inf)
        if prior is not None:
            with np.errstate(divide="ignore"):
                self.score[:] = np.log2(prior)

    def observe(self, stamps: _Ints, chosen: Chosen | None = None) -> None:
        """Add a use to what has a new stamp, or one for each token that chose it."""
        if chosen is not None:
            for layer in self._computed(stamps):
                self._add_tokens(layer, int(stamps[self._keys(layer)].max()), chosen[layer])
            self.seen[:] = stamps
            return
        used = np.flatnonzero(stamps != self.seen)
        now = stamps[used]
        self.seen[used] = now
        now = now + self._more[used]
        self.score[used] = np.logaddexp2(self.score[used], now / self._ticks)
        self._used_at[used] = now

    def _add_tokens(self, layer: int, stamp: int, tokens: _Ints) -> None:
        """The uses of a layer by `tokens`, (tokens, k), the last of them at `stamp`."""
        keys, (count, k) = self._keys(layer), tokens.shape
        self._more[keys] += self._layers * (count - 1)
        now = stamp + self._more[keys]
        before = np.repeat(self._layers * np.arange(count)[::-1], k)
        experts = tokens.reshape(-1)
        weights = np.bincount(experts, np.exp2(-before / self._ticks), self._experts)
        with np.errstate(divide="ignore"):
            added = np.log2(weights) + now / self._ticks
        self.score[keys] = np.logaddexp2(self.score[keys], added)
        self._used_at[keys][experts] = now[experts] - before  # of one expert the last counts

    def ranks(self, owner: _Ints) -> _Floats:
        """The weights as they are now."""
        if not self._boost:
            return self.score[owner]
        used_at = self._used_at[owner]
        now = int(self._used_at.max())
        recent = np.exp2(2 * (used_at - now) / self._layers) * (used_at > 0)
        weights: _Floats = np.exp2(self.score[owner] - now / self._ticks) + self._boost * recent
        return weights


class Markov(DecayedLfu):
    """First what the next token least likely uses, after what its layer has just used.

    A Markov chain, smoothed: for an expert e of a layer that used the experts S last

        chance(e) = (sum over s in S of n[s, e] + b f[e]) / (sum over s in S of n[s] + b)

    n[s]: tokens that used s, n[s, e]: how many of them were followed by one that used e; f: the
    frequency, as `DecayedLfu`, k in all; b: `doubt`. Of many tokens the last `_TURNS` are counted.
    `prior` as there.
    """

    name = "markov"

    def __init__(
        self, shape: Shape, k: int, prior: _Floats | None = None, setting: Setting = USUAL
    ) -> None:
        super().__init__(shape, prior, setting.half_life)
        self._k, self._doubt = k, setting.doubt
        self._rows, self._scores = self.seen.reshape(shape), self.score.reshape(shape)
        self._last = [0] * shape[0]  # stamps
        self._token: list[_Ints | None] = [None] * shape[0]  # what the last of several tokens chose
        self._turns = np.zeros(shape, np.uint8)
        self._followed = np.zeros((*shape, shape[1]), np.uint8)
        self.chance = np.zeros(shape)
        if prior is not None:
            self.chance[:] = [self._frequency(layer) for layer in range(shape[0])]

    def observe(self, stamps: _Ints, chosen: Chosen | None = None) -> None:
        """Count what followed in each layer with a new stamp, and say what may follow next.

        Layer by layer, nearly always one: a miss waits for this.
        """
        new = np.flatnonzero(stamps != self.seen)
        layers = (
            range(0)
            if not len(new)
            else range(new[0] // self._experts, new[-1] // self._experts + 1)
        )
        before = [self._used(layer) for layer in layers]
        super().observe(stamps, chosen)
        for layer, then in zip(layers, before, strict=True):
            last = self._rows[layer].max()
            if last == self._last[layer]:
                continue
            self._last[layer] = last
            self._token[layer] = None if chosen is None else chosen[layer][-1].copy()
            used = self._used(layer)
            for token in [used] if chosen is None else chosen[layer][-_TURNS:]:
                if len(then) == len(token) == self._k:
                    self._count(layer, then, token)
                then = token
            likely = self._followed[layer, used].sum(0) + self._doubt * self._frequency(layer)
            likely /= self._turns[layer, used].sum() + self._doubt
            self.chance[layer] = likely

    def _used(self, layer: int) -> _Ints:
        """The experts that a layer used for its last token."""
        token = self._token[layer]
        return np.flatnonzero(self._rows[layer] == self._last[layer]) if token is None else token

    def _count(self, layer: int, before: _Ints, used: _Ints) -> None:
        """The experts `used` followed those of `before`."""
        self._followed[layer, before[:, None], used] += 1
        self._turns[layer, before] += 1
        full = before[self._turns[layer, before] == _TURNS]
        if len(full):
            self._followed[layer, full] >>= 1
            self._turns[layer, full] >>= 1

    def _frequency(self, layer: int) -> _Floats:
        """Decayed uses of the experts of a layer, k in all."""
        score = self._scores[layer]
        weights = np.exp2(score - score.max())
        found: _Floats = weights * (self._k / weights.sum())
        return found

    def ranks(self, owner: _Ints) -> _Floats:
        """The chances."""
        chances: _Floats = self.chance.reshape(-1)[owner]
        return chances


def likeliest(
    shape: Shape, k: int, slots: int, prior: _Floats | None = None, setting: Setting = USUAL
) -> ExpertPolicy:
    """The best order there is for a model in so many slots.

    By frequency where more than half of all experts have one (hits are within .2 points there, and
    a miss waits 40 us less: 4 % of decoding 3.7 GB of 64 experts in 2 GiB from a free disk, medians
    of 9, 8 and 6 turns), or where they are too many to count what follows each (384 in 60 layers).
    """
    layers, experts = shape
    if 2 * slots > layers * experts or layers * experts**2 > _MOST_COUNTS:
        return DecayedLfu(shape, prior, setting.half_life, boost=2.0)
    return Markov(shape, k, prior, setting)
