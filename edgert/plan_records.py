"""The records of a plan: what was asked for, the regions, and everything that was decided.

Owns: these records and how they are shown. Must not know how anything is decided (plan.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from edgert.plan_parts import TilePlan
from edgert.storage.expert_cache import SlotSizes
from edgert.units import format_bytes

__all__ = ["Plan", "PlanOptions", "Region"]


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What the caller asks for; None lets the planner choose."""

    budget_bytes: int
    threads: int
    context_length: int | None = None
    prefill_tokens: int | None = None
    kv_cache_type: str = "f16"
    checksum_bytes: int = 0  # of a pack whose reads are compared with them


@dataclass(frozen=True, slots=True)
class Region:
    """A named part of the budget."""

    name: str
    nbytes: int
    why: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Every byte edgert will hold, and what it reads each pass."""

    budget_bytes: int
    regions: tuple[Region, ...]
    floor_bytes: int  # the smallest budget that works with these options
    full_bytes: int  # the budget at which no weight is read twice
    context_length: int
    prefill_tokens: int  # most tokens of one pass
    logit_rows: int  # most of them whose logits one pass can give
    threads: int
    reader_threads: int
    kv_cache_type: str
    tile_bytes: int  # about the size of a tile
    tiles: tuple[TilePlan, ...] = field(repr=False)
    slots: int = 0  # of the ring; 0 when nothing is streamed
    slot_bytes: int = 0
    expert_slots: int = 0
    expert_slot_bytes: int = 0  # of the largest
    staging_bytes: int = 0  # of each read buffer
    staging_buffers: int = 0  # one a reader thread of each stream
    embedding_resident: bool = False
    resident_bytes: int = 0  # weights in memory, expert slots included
    streamed_bytes: int = 0  # read from flash in every pass
    expert_sizes: SlotSizes | None = field(default=None, repr=False, compare=False)  # of several
    expert_bytes: int = 0  # of an expert in the file, on average
    weight_bytes: int = 0  # of all tensors in the file

    @property
    def total_bytes(self) -> int:
        """The sum of all regions; never above the budget."""
        return sum(r.nbytes for r in self.regions)

    @property
    def can_draft(self) -> bool:
        """True when something of every matrix is in memory, and of some not all."""
        return any(t.base for t in self.tiles) and all(t.memory_bytes for t in self.tiles)

    def region(self, name: str) -> Region:
        """The region with this name."""
        return next(r for r in self.regions if r.name == name)

    def table(self) -> str:
        """The regions as text, one a line, with the reason for each size."""
        width = max(len(r.name) for r in self.regions)
        lines = [
            f"{r.name:<{width}}  {format_bytes(r.nbytes):>10}  {r.why}"
            for r in self.regions
            if r.nbytes
        ]
        total = f"{'total':<{width}}  {format_bytes(self.total_bytes):>10}  "
        lines.append(f"{total}of a budget of {format_bytes(self.budget_bytes)}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values for JSON; tiles are left out."""
        names = (
            "budget_bytes", "total_bytes", "floor_bytes", "full_bytes", "resident_bytes",
            "streamed_bytes", "expert_bytes", "weight_bytes", "context_length", "prefill_tokens",
            "logit_rows", "threads", "reader_threads", "kv_cache_type", "slots", "slot_bytes",
            "expert_slots", "expert_slot_bytes", "staging_bytes", "embedding_resident",
        )  # fmt: skip
        plain: dict[str, Any] = {name: getattr(self, name) for name in names}
        plain["regions"] = [
            {"name": r.name, "nbytes": r.nbytes, "why": r.why} for r in self.regions
        ]
        return plain
