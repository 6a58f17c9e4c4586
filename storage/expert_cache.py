"""Which slot a missing expert goes into: the eviction decision, and nothing else.

Owns: a pure function over the state of the slots. Must not know files, threads or layers' names.

Least recently used over all slots. Smarter rules gain at most some 5 points of hit rate on
recorded routing; what matters is never to evict what the current layer still needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Admission", "AdmissionPlan", "plan_admission", "plan_admission_ref"]


# Ranks of slots that are not compared by their stamp; stamps lie between them.
_FREE = np.iinfo(np.int64).min
_BUSY = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class Admission:
    """One expert gets one slot."""

    expert: int  # a key: layer * n_experts + expert
    slot: int
    evicted: int  # the key of the expert that leaves, or -1 for a free slot


@dataclass(frozen=True, slots=True)
class AdmissionPlan:
    """What to load now, and what has to wait for a slot, in the order wanted."""

    admitted: tuple[Admission, ...]
    waiting: tuple[int, ...]


def plan_admission(
    wanted: Sequence[int],
    owner: npt.NDArray[np.int64],
    last_used: npt.NDArray[np.int64],
    busy: npt.NDArray[np.bool_],
) -> AdmissionPlan:
    """Slots for the experts `wanted`: free ones first, then the least recently used.

    A busy slot is never taken; of equals the lower slot goes first. Pure.
    Shapes: owner (n_slots,) int64 keys, -1 free; last_used (n_slots,) int64, the stamp of each
    slot's expert; busy (n_slots,) bool.
    """
    assert owner.shape == last_used.shape == busy.shape
    rank = np.where(owner >= 0, last_used, _FREE)
    rank[busy] = _BUSY
    slots = _first(rank, len(wanted)).tolist()
    owners = owner[slots].tolist()
    admitted = tuple(map(Admission, wanted, slots, owners))
    return AdmissionPlan(admitted, tuple(wanted[len(admitted) :]))


def _first(rank: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """The `count` lowest ranks that are not busy, equals in slot order.

    Not by sorting them all: that was half of the 160 us a miss took in 2000 slots.
    """
    if count < len(rank):
        bound = np.partition(rank, count)[count]
        candidates = np.flatnonzero(rank <= bound)
        order = candidates[np.argsort(rank[candidates], kind="stable")][:count]
    else:
        order = np.argsort(rank, kind="stable")
    free: npt.NDArray[np.int64] = order[rank[order] != _BUSY]
    return free


def plan_admission_ref(
    wanted: Sequence[int],
    owner: npt.NDArray[np.int64],
    last_used: npt.NDArray[np.int64],
    busy: npt.NDArray[np.bool_],
) -> AdmissionPlan:
    """`plan_admission`, one expert after the other."""
    taken = {s for s in range(len(owner)) if busy[s]}
    admitted: list[Admission] = []
    waiting: list[int] = []
    for expert in wanted:
        best = -1
        for slot in range(len(owner)):
            if slot in taken:
                continue
            rank = (owner[slot] >= 0, last_used[slot])
            if best < 0 or rank < (owner[best] >= 0, last_used[best]):
                best = slot
        if best < 0:
            waiting.append(expert)
            continue
        taken.add(best)
        admitted.append(Admission(expert, best, int(owner[best])))
    return AdmissionPlan(tuple(admitted), tuple(waiting))
