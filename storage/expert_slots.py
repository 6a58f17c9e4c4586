"""Which expert is in which slot.

Owns: the two indexes between slots and experts, the addresses compiled code looks up, the stamps it
writes, what a policy is told of them, and moving an expert in where a policy lets another leave.
Must not know what is on its way, nor who asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from edgert.storage.expert_cache import Admission, SlotSizes, admit_by, fitting, leaving
from edgert.storage.expert_order import Chosen, ExpertPolicy, Lru
from edgert.storage.pages import TouchAhead
from edgert.storage.window import Window

__all__ = ["ExpertSlots", "PolicyFor"]

PolicyFor = Callable[[int], ExpertPolicy]  # number of slots -> a policy without a past
_Bits = npt.NDArray[np.bool_]


class ExpertSlots:
    """The slots of `window` for experts of `shape` (n_layers, n_experts). Not thread-safe.

    A *key* is layer * n_experts + expert. An expert that has moved in has a slot; it has an address
    too once `publish` says that all of it is there. `tokens` (1,): of the pass under way, compiled
    code's, as are `choices`: of each layer the experts of its tokens, (most tokens, k).
    """

    def __init__(
        self,
        shape: tuple[int, int],
        window: Window,
        tokens: npt.NDArray[np.int64],
        policy_for: PolicyFor | None,
        record_bytes: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self.addresses: npt.NDArray[np.int64] = np.zeros(shape, np.int64)  # 0: not resident
        self.last_used: npt.NDArray[np.int64] = np.zeros(shape, np.int64)
        self.address = self.addresses.reshape(-1)  # the same memory, by key
        self.stamps = self.last_used.reshape(-1)
        self.choices: Sequence[npt.NDArray[np.int64]] = ()
        self._tokens = tokens
        self._record_bytes = record_bytes  # [layers, experts]; None: any slot holds any expert
        self._use(window)
        self.owner = np.full(window.n_slots, -1, np.int64)  # keys
        self.slot_of = np.full(len(self.stamps), -1, np.int64)  # the inverse of `owner`
        self.set_policy(policy_for or (lambda _slots: Lru(shape)))

    def set_policy(self, policy_for: PolicyFor) -> None:
        """Evict by another policy from now on. It begins with the last use of each expert."""
        self._policy_for = policy_for
        self.policy = policy_for(self.window.n_slots)
        self._ranked_at = -1
        self.policy.observe(self.stamps)
        self.policy.missed(int(np.count_nonzero(self.stamps)))  # each was loaded once at least

    def observe(self) -> None:
        """Let the policy see the uses up to now."""
        self.policy.observe(self.stamps, self._chosen())

    def _chosen(self) -> Chosen | None:
        tokens = int(self._tokens[0])
        return [ids[:tokens] for ids in self.choices] or None if tokens > 1 else None

    def resize(self, window: Window) -> None:
        """More or fewer slots at the same addresses. Forgets experts in slots that are gone."""
        gone = self.owner[window.n_slots :]
        gone = gone[gone >= 0]
        self.slot_of[gone] = -1
        self.address[gone] = 0
        kept = self.owner[: window.n_slots]
        self.owner = np.full(window.n_slots, -1, np.int64)
        self.owner[: len(kept)] = kept
        self._use(window)
        self.set_policy(self._policy_for)

    def _use(self, window: Window) -> None:
        self.window = window
        self.touching = TouchAhead(window.room)  # slots that held nothing yet have no pages
        self.sizes = SlotSizes.of(self._record_bytes, window.sizes)
        self._ranked_at = -1  # the stamp at which slots were ranked for `move_in_ahead`

    def fitting(self, keys: Sequence[int], before: Sequence[int], busy: _Bits) -> Sequence[int]:
        """Those of `keys` that can have a slot that is not busy, once `before` have one."""
        if self.sizes is None:
            return keys[: max(int(np.count_nonzero(~busy)) - len(before), 0)]
        return fitting(keys, self.sizes, ~busy, before)

    def held(self, keys: Iterable[int]) -> npt.NDArray[np.int64]:
        """The slots of those that have one."""
        slots = self.slot_of[np.fromiter(keys, np.int64)]
        found: npt.NDArray[np.int64] = slots[slots >= 0]
        return found

    def move_in(
        self, keys: Sequence[int], busy: _Bits, soon: Sequence[int] = ()
    ) -> tuple[Admission, ...]:
        """Give slots to experts, but none that is `busy` (n_slots,); as many as there are."""
        self._rank_slots(self.stamps)
        plan = admit_by(self._rank, keys, self.owner, busy, soon, self.sizes)
        self.policy.missed(len(plan.admitted))
        return self._take(plan.admitted)

    def _rank_slots(self, stamps: npt.NDArray[np.int64]) -> None:
        self._ranked_at = int(stamps.max())
        self._rank = leaving(self.policy, self.owner, stamps, self._chosen())

    def _take(self, admitted: tuple[Admission, ...]) -> tuple[Admission, ...]:
        for item in admitted:
            if item.evicted >= 0:
                self.address[item.evicted] = 0
                self.slot_of[item.evicted] = -1
            else:
                self.touching.reached(self.window.end(item.slot))
            self.owner[item.slot] = item.expert
            self.slot_of[item.expert] = item.slot
        return admitted

    def move_in_ahead(
        self, key: int, busy: _Bits, soon: Sequence[int], fence: Callable[[], None]
    ) -> tuple[Admission, ...]:
        """A slot for an expert nobody asked for: none of the layer's, nor of those named `soon`.

        Compiled code may note a hit at any time; it stamps an expert first and looks it up then.
        So what was stamped while it was evicted is taken back (both sides with a full fence).
        """
        seen = self.stamps.copy()
        now = int(seen.max())
        if self._ranked_at != now:  # once a layer: it is most of what a choice takes (0.26 ms)
            self._rank_slots(seen)
        busy = busy | ((self.owner >= 0) & (seen[self.owner] == now))
        busy[self.held(soon)] = True
        plan = admit_by(self._rank, [key], self.owner, busy, (), self.sizes)
        found = self._take(plan.admitted)
        fence()
        for item in found:
            tenant = item.evicted
            if tenant >= 0 and self.stamps[tenant] != seen[tenant]:
                self.owner[item.slot], self.slot_of[tenant] = tenant, item.slot
                self.slot_of[key] = -1
                self.publish(tenant)
                return ()
            self._rank[item.slot] = self._rank.max()  # no place for the next one
        return found

    def publish(self, key: int) -> None:
        """All of an expert is in its slot."""
        self.address[key] = self.window.address(int(self.slot_of[key]))

    def move_out(self, key: int) -> None:
        """Free the slot of an expert that will not be read to its end."""
        self.owner[self.slot_of[key]] = -1
        self.slot_of[key] = -1

    def move_out_unread(self) -> None:
        """The same for all whose read did not end: the tenants before them are lost already."""
        lost = (self.slot_of >= 0) & (self.address == 0)
        self.owner[self.slot_of[lost]] = -1
        self.slot_of[lost] = -1
