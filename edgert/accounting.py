"""Memory planned against memory held, region by region, and what the system says of both.

Owns: putting the figures side by side. Must not know how memory was planned or is used.

Four figures of the same memory, and how far they may lie apart:

* the ledger: what each region of the plan may hold. No region ever holds more than that;
* the resident size (RSS): the arena's pages, counted region by region, and all else, which is the
  region "process";
* the cgroup: beside page cache it is charged what is resident beside mapped files, to
  `AGREEMENT_BYTES` (page tables, and what the kernel charges in batches);
* the page cache of the model's files, which edgert keeps below `AGREEMENT_BYTES`.

A page of a library counts in the resident size of every process that maps it, and in the cgroup of
whoever read it first: 5 to 70 MiB, or none. So they are compared without file pages. The ledger
counts what is mapped, which is the larger but for what was read ahead and dropped again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgert.machine import cgroup_memory, peak_bytes, process_memory
from edgert.plan import Plan
from edgert.results import MemoryReport
from edgert.storage.arena import Arena
from edgert.storage.pages import cached_bytes, resident_in
from edgert.units import MIB

__all__ = ["AGREEMENT_BYTES", "memory_report"]

AGREEMENT_BYTES = 16 * MIB


def memory_report(
    plan: Plan, arena: Arena, files: Sequence[Path], cached_before: int
) -> MemoryReport:
    """The figures now: up to 4 ms a GiB of arena. `cached_before`: page cache at the opening."""
    process = process_memory()
    planned = {r.name: r.nbytes for r in plan.regions}
    held = dict.fromkeys(planned, 0)
    for region in arena.regions:
        found = resident_in(arena.address + region.offset, region.nbytes)
        held[_plan_region(region.name, planned)] += region.nbytes if found is None else found
    held["process"] = process.resident_bytes - sum(held.values())
    return MemoryReport(
        budget_bytes=plan.budget_bytes,
        planned=planned,
        held=held,
        resident_bytes=process.resident_bytes,
        peak_bytes=peak_bytes(),
        anonymous_bytes=process.anonymous_bytes,
        file_bytes=process.file_bytes,
        shared_bytes=process.shared_bytes,
        cgroup=cgroup_memory(),
        page_cache_bytes=max(0, cached_bytes(files) - cached_before),
    )


def _plan_region(name: str, planned: dict[str, int]) -> str:
    """The region of the plan that a region of the arena is a part of."""
    if name in planned:
        return name
    if name == "rotary table":
        return "vectors"
    return "staging" if name.startswith(("staging", "token row")) else "activations"
