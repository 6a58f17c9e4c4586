"""The regions of a plan and its record, from what was decided.

Owns: how many bytes each region has. Pure. Must not know why something was decided (plan.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

from edgert.plan_parts import Base, Need, Sizes, TilePlan, resident_why, ring_of
from edgert.plan_records import Plan, PlanOptions, Region

__all__ = ["Held", "Kept", "Shape", "record", "total_bytes"]


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes that trade speed for memory."""

    tokens: int  # of one pass
    slots: int  # of the ring
    tile_bytes: int
    readers: int  # reader threads of each stream, with a buffer each


@dataclass(frozen=True, slots=True)
class Held:
    """What of the weights is in memory: enough to add up a plan."""

    tile_bytes: int
    ring: int  # slots that would hold whole tiles
    expert_slots: int
    embedding: bool


@dataclass(frozen=True, slots=True)
class Kept:
    """What stays in memory, tile by tile."""

    tiles: tuple[TilePlan, ...]
    resident: tuple[bool, ...]  # for each tile: all of it
    bases: tuple[Base | None, ...] | None  # for each tile: what stays of it while it is streamed
    ring: int
    expert_slots: int
    embedding: bool


def total_bytes(
    need: Need, options: PlanOptions, given_bytes: int, shape: Shape, sizes: Sizes, held: Held
) -> int:
    """All regions together. `given_bytes`: the process and the checksums."""
    return sum(_regions(need, options, given_bytes, shape, sizes, held).values())


def _regions(
    need: Need, options: PlanOptions, given_bytes: int, shape: Shape, sizes: Sizes, held: Held
) -> dict[str, int]:
    """Bytes of each region."""
    return {
        "process": given_bytes - options.checksum_bytes,
        "checksums": options.checksum_bytes,
        "KV cache": sizes.kv_bytes,
        "activations": sizes.activation_bytes,
        "vectors": need.vector_bytes + sizes.table_bytes,
        "resident": held.tile_bytes,
        "embedding": need.embedding_bytes if held.embedding else 0,
        "window": held.ring * need.slot_bytes,
        "experts": need.slots_bytes(held.expert_slots),
        "staging": _buffers(need, shape, held.ring) * need.staging_bytes + need.row_bytes,
    }


def _buffers(need: Need, shape: Shape, ring: int) -> int:
    """Read buffers: one a reader thread of each stream."""
    return shape.readers * (2 if need.experts and ring else 1)


def record(
    need: Need,
    options: PlanOptions,
    given_bytes: int,
    shape: Shape,
    sizes: Sizes,
    context: int,
    kept: Kept,
) -> Plan:
    """The plan's record for what was decided."""
    tiles = _numbered(kept)
    in_memory = sum(t.memory_bytes for t in tiles)
    held = Held(in_memory, kept.ring, kept.expert_slots, kept.embedding)
    nbytes = _regions(need, options, given_bytes, shape, sizes, held)
    buffers = _buffers(need, shape, kept.ring)
    slots, slot_bytes = ring_of(nbytes["window"], need, tiles)
    why = {
        "process": "interpreter, libraries, compiled kernels, tokenizer",
        "checksums": "one for each page of the file",
        "KV cache": sizes.kv_why,
        "activations": f"one pass of {shape.tokens} tokens",
        "vectors": "norms, biases, rotary table",
        "resident": resident_why(tiles),
        "embedding": "token rows",
        "window": f"{slots} slots for streamed tiles",
        "experts": f"{kept.expert_slots} of {need.expert_count} expert records",
        "staging": f"{buffers} read buffers, one token row",
    }
    return Plan(
        budget_bytes=options.budget_bytes,
        regions=tuple(Region(name, nbytes[name], why[name]) for name in nbytes),
        floor_bytes=0, full_bytes=0,
        context_length=context, prefill_tokens=shape.tokens, logit_rows=sizes.logit_rows,
        threads=options.threads, reader_threads=shape.readers,
        kv_cache_type=options.kv_cache_type, tile_bytes=shape.tile_bytes, tiles=tiles,
        slots=slots, slot_bytes=slot_bytes, expert_slots=kept.expert_slots,
        expert_slot_bytes=need.slots_bytes(1), expert_sizes=need.sizes(kept.expert_slots),
        staging_bytes=need.staging_bytes,
        staging_buffers=buffers, embedding_resident=kept.embedding,
        resident_bytes=in_memory + need.vector_bytes + nbytes["experts"] + nbytes["embedding"],
        streamed_bytes=sum(t.read_bytes for t in tiles if t.stream_index >= 0),
        expert_bytes=need.expert_bytes, weight_bytes=need.weight_bytes,
    )  # fmt: skip


def _numbered(kept: Kept) -> tuple[TilePlan, ...]:
    """The tiles with the streamed ones numbered in execution order."""
    index, bases = count(), kept.bases or [None] * len(kept.tiles)
    return tuple(
        tile if whole else tile.placed(next(index), base)
        for tile, whole, base in zip(kept.tiles, kept.resident, bases, strict=True)
    )
