"""Which resident expert leaves first: the policies behind one interface, and the choice of one.

Owns: what slots belong to which layer, and when a policy is trusted. Must not know files, threads,
or whether a device or a simulator asks: both call the same functions with the same numbers. What is
made of past uses is an order's (expert_order.py, which says what keys and stamps are).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.storage.expert_order import (
    USUAL,
    Chosen,
    DecayedLfu,
    ExpertPolicy,
    Lfu,
    Lru,
    Setting,
    Shape,
    likeliest,
)

__all__ = [
    "POLICIES",
    "Keeps",
    "Partitioned",
    "Predicted",
    "Robust",
    "choose_policy",
    "hottest",
    "make_policy",
    "policy_for",
]

_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]
_Bits = npt.NDArray[np.bool_]
Keeps = Callable[[_Ints], _Bits]

# How much worse than LRU `Robust` may become before it turns into LRU.
_EXCESS = 0.05


class Predicted:
    """Follows predictions of one bit: what may go leaves before what to keep.

    `keeps(owner)` says of each slot, (n_slots,): True keep, False may go; `order` orders each part.
    """

    name = "predicted"

    def __init__(self, keeps: Keeps, order: ExpertPolicy) -> None:
        self._keeps = keeps
        self._order = order

    def observe(self, stamps: _Ints, chosen: Chosen | None = None) -> None:
        """As the order inside."""
        self._order.observe(stamps, chosen)

    def missed(self, count: int) -> None:
        """As the order inside."""
        self._order.missed(count)

    def ranks(self, owner: _Ints) -> _Floats:
        """Places: first what may go, then what to keep."""
        places = np.empty(len(owner))
        parts = (self._order.ranks(owner), self._keeps(owner))
        places[np.lexsort(parts)] = np.arange(len(owner))
        return places


class Partitioned(Predicted):
    """Keeps the best experts of each layer, as many for each, whatever other layers do.

    Below the working set of one token every layer pushes out what the layers before it left, unless
    each owns a share. The layer being computed gives up as many of its own as it misses, so that
    its misses cost no other layer anything. Where its share is less than it may miss, `reserve`
    slots are nobody's: missing experts pass through them.

    A pass of many tokens uses nearly all experts of a layer, more than its share. The others share
    what it leaves, and what was computed last leaves first: it is needed again last (in a scan
    larger than the cache, the most recently used).
    """

    name = "partition"

    def __init__(self, shape: Shape, slots: int, reserve: int, order: ExpertPolicy) -> None:
        super().__init__(self._best, order)
        self._layers, self._n_experts = shape
        self._seen: _Ints = np.zeros(shape[0] * shape[1], np.int64)
        self._slots = slots
        self._shares = _shares(slots - reserve, shape[0])

    def observe(self, stamps: _Ints, chosen: Chosen | None = None) -> None:
        """As the order inside; the latest stamps are those of the layer being computed."""
        super().observe(stamps, chosen)
        self._seen[:] = stamps

    def ranks(self, owner: _Ints) -> _Floats:
        """Places: first what no layer keeps; in a long pass of that the layers computed last."""
        used = self._used()
        if not self._long(used):
            return super().ranks(owner)
        ahead = (owner - used[0]) // self._n_experts % self._layers
        places = np.empty(len(owner))
        parts = (self._order.ranks(owner), -ahead, self._best(owner))
        places[np.lexsort(parts)] = np.arange(len(owner))
        return places

    def _used(self) -> _Ints:
        """The experts of the layer being computed."""
        used: _Ints = np.flatnonzero(self._seen == self._seen.max())
        return used

    def _long(self, used: _Ints) -> bool:
        """True when the next pass rather uses an expert than not."""
        return 2 * len(used) > self._n_experts

    def _best(self, owner: _Ints) -> _Bits:
        """Keep what is among its layer's best, as many as its share."""
        used = self._used()
        now = used[0] // self._n_experts
        shares = self._shares.copy()
        if self._long(used):
            shares = _shares(self._slots - len(used), max(self._layers - 1, 1))
            shares = np.insert(shares, now, 0)
        shares[now] -= np.count_nonzero(~np.isin(used, owner))
        layer = owner // self._n_experts  # -1 for free slots
        ranks = self._order.ranks(owner)
        ranks[self._seen[owner] == self._seen[used[0]]] = np.inf  # these stay anyway
        by_layer = np.lexsort((-ranks, layer))
        ordered = layer[by_layer]
        place = np.arange(len(owner)) - np.searchsorted(ordered, ordered)
        kept = np.empty(len(owner), np.bool_)
        kept[by_layer] = place < shares[ordered]
        return kept


def _shares(slots: int, layers: int) -> _Ints:
    """Slots of each layer: some keep one more, spread evenly over all."""
    shares: _Ints = np.diff(np.arange(layers + 1) * max(slots, 0) // layers)
    return shares


def hottest(uses: npt.NDArray[np.floating[Any]], slots: int) -> list[_Ints]:
    """The experts of each layer to load before the first use, those used most, ascending.

    `uses` (n_layers, n_experts) of a profile. Only what a text of 14 tokens rather uses than not
    (5 % of tokens): what is not used would be read for nothing.
    """
    found = []
    for counts, share in zip(uses, _shares(slots, len(uses)), strict=True):
        tokens = max(float(counts.max()), 1.0)  # at least so many: each uses an expert once
        best = np.argsort(-counts, kind="stable")[:share]
        found.append(np.sort(best[counts[best] > 0.05 * tokens]))
    return found


class Robust(Lru):
    """Follows a policy while it is worth it, and LRU when it is not.

    Beside it runs an LRU that holds only stamps. At more than (1 + 1/20) of its misses + the number
    of slots, evictions are LRU's until that no longer holds. LRU begun in any state misses at most
    `slots` more than LRU, so the misses never exceed (1 + 1/20) LRU + 2 slots + one layer's,
    whatever is predicted: robust and consistent, as in Antoniadis et al., Paging with Succinct
    Predictions, 2023.
    """

    name = "robust"

    def __init__(self, shape: Shape, slots: int, trusted: ExpertPolicy) -> None:
        super().__init__(shape)
        self._slots = slots
        self._trusted = trusted
        self.misses = 0
        self.lru_misses = 0

    def observe(self, stamps: _Ints, chosen: Chosen | None = None) -> None:
        """Also count what LRU would have missed: all but the `slots` latest stamps."""
        used = self.seen[stamps != self.seen]
        if not len(used):
            return
        oldest = 1
        if self._slots < len(self.seen):
            oldest = max(1, int(np.partition(self.seen, -self._slots)[-self._slots]))
        self.lru_misses += int(np.count_nonzero(used < oldest))
        self.seen[:] = stamps
        self._trusted.observe(stamps, chosen)

    def missed(self, count: int) -> None:
        """Count own misses."""
        self.misses += count

    @property
    def trusting(self) -> bool:
        """False while the policy has cost too much."""
        return self.misses <= (1 + _EXCESS) * self.lru_misses + self._slots

    def ranks(self, owner: _Ints) -> _Floats:
        """The policy's, or stamps."""
        return self._trusted.ranks(owner) if self.trusting else super().ranks(owner)


def _profile_weights(profile: _Floats, k: int, half_life: float) -> _Floats:
    """What a profile is worth as past uses: as many as a run of one half-life leaves."""
    share = profile / np.maximum(profile.sum(axis=1, keepdims=True), 1e-300)
    weights: _Floats = (share * k * half_life).reshape(-1)
    return weights


def make_policy(
    name: str,
    slots: int,
    shape: Shape,
    k: int,
    profile: _Floats | None = None,
    setting: Setting = USUAL,
) -> ExpertPolicy:
    """A policy of `POLICIES` for `slots` slots; `profile`: uses of each expert, as `shape`."""
    prior = None if profile is None else _profile_weights(profile, k, setting.half_life)
    if name == "lru":
        return Lru(shape)
    if name == "lfu":
        return Lfu(shape)
    if name == "lfu-decay":
        return DecayedLfu(shape, prior, setting.half_life)
    order = likeliest(shape, k, slots, prior, setting)
    if name == "pinned":
        return Predicted(_hottest(prior, slots - 2 * k), order)
    partition = Partitioned(shape, slots, k if slots < shape[0] * k else 0, order)
    if name == "partition":
        return partition
    assert name == "robust", name
    return Robust(shape, slots, partition)


def _hottest(prior: _Floats | None, count: int) -> Keeps:
    """Keep the `count` experts a profile says are used most; none without one."""
    keys = np.zeros(0, np.int64)
    if prior is not None and count > 0:
        keys = np.argsort(-prior, kind="stable")[:count]
    return lambda owner: np.isin(owner, keys)


POLICIES = ("lru", "lfu", "lfu-decay", "pinned", "partition", "robust")


def choose_policy(
    slots: int, shape: Shape, k: int, profile: _Floats | None = None, setting: Setting = USUAL
) -> ExpertPolicy:
    """The policy for a number of slots: pure.

    Below the working set of one token LRU hits nothing, so there is nothing to fall back on; above
    it, it is the limit of what can be lost. With a slot for each expert nothing ever leaves.
    """
    if slots >= shape[0] * shape[1]:
        return Lru(shape)
    name = "partition" if slots < shape[0] * k else "robust"
    return make_policy(name, slots, shape, k, profile, setting)


def policy_for(
    name: str, shape: Shape, k: int, profile: _Floats | None = None
) -> Callable[[int], ExpertPolicy]:
    """What makes the policy `name` for a number of slots; "auto" chooses."""
    if name == "auto":
        return lambda slots: choose_policy(slots, shape, k, profile)
    return lambda slots: make_policy(name, slots, shape, k, profile)
