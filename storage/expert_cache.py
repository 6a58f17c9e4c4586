"""Which slot a missing expert goes into: the eviction decision, and nothing else.

Owns: a pure function over the state of the slots, and asking a policy for it. Must not know files,
threads or layers' names. Who leaves first is the policy's (expert_policy.py); what the current
layer uses leaves last under all of them, so that nothing hangs on how far the layer has come.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgert.storage.expert_order import Chosen, ExpertPolicy

__all__ = [
    "Admission", "AdmissionPlan", "SlotSizes", "admit", "admit_by", "fitting", "leaving",
    "plan_admission", "plan_admission_ref", "plan_sized_admission", "that_fit",
]  # fmt: skip


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


@dataclass(frozen=True, slots=True, eq=False)
class SlotSizes:
    """Bytes of records (n_keys,) and of slots (n_slots,), where there are several sizes."""

    records: npt.NDArray[np.int64]
    slots: npt.NDArray[np.int64]

    @classmethod
    def of(
        cls, records: npt.NDArray[np.int64] | None, slots: npt.NDArray[np.int64]
    ) -> SlotSizes | None:
        """None where all records are of one size, and so are slots."""
        if records is None or not len(slots) or records.min() == records.max():
            return None
        return cls(records.reshape(-1), slots)


def admit(
    policy: ExpertPolicy,
    wanted: Sequence[int],
    owner: npt.NDArray[np.int64],
    stamps: npt.NDArray[np.int64],
    busy: npt.NDArray[np.bool_],
    sizes: SlotSizes | None = None,
    chosen: Chosen | None = None,
) -> AdmissionPlan:
    """Slots for the missing experts `wanted`, by a policy, which learns of the uses and misses.

    Shapes: owner (n_slots,), -1 free; stamps (n_keys,), those of the current layer the largest;
    busy (n_slots,); `chosen` as in `ExpertPolicy.observe`. The simulator comes here; the engine
    keeps ranks, and comes to `admit_by`.
    """
    plan = admit_by(leaving(policy, owner, stamps, chosen), wanted, owner, busy, (), sizes)
    policy.missed(len(plan.admitted))
    return plan


def leaving(
    policy: ExpertPolicy, owner: npt.NDArray[np.int64], stamps: npt.NDArray[np.int64],
    chosen: Chosen | None = None,
) -> npt.NDArray[np.float64]:  # fmt: skip
    """The rank of each slot's expert, (n_slots,), of which the lowest leaves first."""
    policy.observe(stamps, chosen)
    return np.where(stamps[owner] == stamps.max(), _CURRENT, policy.ranks(owner))


def admit_by(
    rank: npt.NDArray[np.float64],
    wanted: Sequence[int],
    owner: npt.NDArray[np.int64],
    busy: npt.NDArray[np.bool_],
    soon: Sequence[int] = (),
    sizes: SlotSizes | None = None,
) -> AdmissionPlan:
    """As `admit`, by ranks that are known, and no miss for a policy to learn of.

    Experts that the next layer may want, `soon`, leave last, as do those of the current one.
    """
    if soon:
        rank = np.where(np.isin(owner, soon), _CURRENT, rank)
    if sizes is None:
        return plan_admission(wanted, owner, rank, busy)
    return plan_sized_admission(wanted, owner, rank, busy, sizes)


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


def plan_sized_admission(
    wanted: Sequence[int],
    owner: npt.NDArray[np.int64],
    rank: npt.NDArray[np.float64],
    busy: npt.NDArray[np.bool_],
    sizes: SlotSizes,
) -> AdmissionPlan:
    """As `plan_admission`, but each expert gets a slot that is as large as its record. Pure.

    The largest choose first, so all get one if there is any way. Of free slots the smallest that
    fits is taken: with a slot for each expert, each finds one of its own size.
    """
    rank, busy = np.maximum(rank, _LOWEST), busy.copy()
    need = sizes.records[list(wanted)]
    slot_of: dict[int, int] = {}
    for nbytes in sorted(set(need.tolist()), reverse=True):
        keys = [key for key, n in zip(wanted, need.tolist(), strict=True) if n == nbytes]
        fits = ~busy & (sizes.slots >= nbytes)
        free = np.flatnonzero(fits & (owner < 0))
        free = free[np.argsort(sizes.slots[free], kind="stable")][: len(keys)]
        tenants = np.where(fits & (owner >= 0), rank, _BUSY)
        slots = [*free.tolist(), *_first(tenants, len(keys) - len(free)).tolist()]
        busy[slots] = True
        slot_of |= dict(zip(keys, slots, strict=False))
    return AdmissionPlan(
        tuple(Admission(key, slot_of[key], int(owner[slot_of[key]])) for key in slot_of),
        tuple(key for key in wanted if key not in slot_of),
    )


def fitting(
    keys: Iterable[int], sizes: SlotSizes, free: npt.NDArray[np.bool_], before: Iterable[int] = ()
) -> list[int]:
    """Those of `keys` that can have a `free` slot each, (n_slots,) bool, once `before` have theirs;
    who comes first is served first. Pure.
    """
    left, found = np.sort(sizes.slots[free]).tolist(), []
    waiting = [*before]
    for key in (*waiting, *keys):
        at = bisect_left(left, int(sizes.records[key]))  # the smallest is what others miss least
        if at < len(left):
            left.pop(at)
            found.append(key)
    return found[len(waiting) :]


def that_fit(
    layers: Sequence[npt.NDArray[np.int64]], sizes: SlotSizes
) -> list[npt.NDArray[np.int64]]:
    """Of experts of each layer those that find a slot each while none leaves one."""
    if not len(layers):
        return []
    each, free = len(sizes.records) // len(layers), np.ones(len(sizes.slots), np.bool_)
    wanted = [layer * each + e for layer, part in enumerate(layers) for e in part.tolist()]
    keys = np.array(fitting(wanted, sizes, free), np.int64)
    return [keys[keys // each == layer] % each for layer in range(len(layers))]


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
