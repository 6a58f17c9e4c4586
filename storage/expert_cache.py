"""Which slot a missing expert goes into: the eviction decision, and nothing else.

Owns: a pure function over the state of the slots, and asking a policy for it. Must not know files,
threads or layers' names. Who leaves first is the policy's (expert_policy.py); what the current
layer uses leaves last under all of them, so that nothing hangs on how far the layer has come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgert.storage.expert_policy import ExpertPolicy

__all__ = ["Admission", "AdmissionPlan", "admit", "plan_admission", "plan_admission_ref"]


# Ranks of slots that are not compared by their policy's; what policies say lies between them.
_FREE = -np.inf
_LOWEST = np.finfo(np.float64).min  # of experts that a policy ranks with -inf: never used
_CURRENT = np.finfo(np.float64).max  # of the layer being computed
_BUSY = np.inf


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


def admit(
    policy: ExpertPolicy,
    wanted: Sequence[int],
    owner: npt.NDArray[np.int64],
    stamps: npt.NDArray[np.int64],
    busy: npt.NDArray[np.bool_],
    soon: Sequence[int] = (),
) -> AdmissionPlan:
    """Slots for the missing experts `wanted`, by a policy, which learns of the uses and misses.

    Shapes: owner (n_slots,), -1 free; stamps (n_keys,), those of the current layer the largest;
    busy (n_slots,). Experts that the next layer may want, `soon`, leave last, as do those of the
    current one. The engine and the simulator both come here.
    """
    policy.observe(stamps)
    rank = np.where(stamps[owner] == stamps.max(), _CURRENT, policy.ranks(owner))
    if soon:
        rank[np.isin(owner, soon)] = _CURRENT
    plan = plan_admission(wanted, owner, rank, busy)
    policy.missed(len(plan.admitted))
    return plan


def plan_admission(
    wanted: Sequence[int],
    owner: npt.NDArray[np.int64],
    rank: npt.NDArray[np.float64],
    busy: npt.NDArray[np.bool_],
) -> AdmissionPlan:
    """Slots for the experts `wanted`: free ones first, then those of the lowest rank.

    A busy slot is never taken; of equals the lower slot goes first. Pure.
    Shapes: owner (n_slots,) int64 keys, -1 free; rank (n_slots,) float64, below infinity, of each
    slot's expert; busy (n_slots,) bool.
    """
    assert owner.shape == rank.shape == busy.shape
    rank = np.where(owner >= 0, np.maximum(rank, _LOWEST), _FREE)
    rank[busy] = _BUSY
    slots = _first(rank, len(wanted)).tolist()
    owners = owner[slots].tolist()
    admitted = tuple(map(Admission, wanted, slots, owners))
    return AdmissionPlan(admitted, tuple(wanted[len(admitted) :]))


def _first(rank: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.int64]:
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
    rank: npt.NDArray[np.float64],
    busy: npt.NDArray[np.bool_],
) -> AdmissionPlan:
    """`plan_admission`, one expert after the other."""
    taken = {s for s in range(len(owner)) if busy[s]}
    places = [(o >= 0, r if o >= 0 else 0.0) for o, r in zip(owner, rank, strict=True)]
    admitted: list[Admission] = []
    waiting: list[int] = []
    for expert in wanted:
        best = -1
        for slot in range(len(owner)):
            if slot in taken:
                continue
            if best < 0 or places[slot] < places[best]:
                best = slot
        if best < 0:
            waiting.append(expert)
            continue
        taken.add(best)
        admitted.append(Admission(expert, best, int(owner[best])))
    return AdmissionPlan(tuple(admitted), tuple(waiting))
