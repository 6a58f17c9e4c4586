"""A memory budget that changes while the model runs: which weights go, which come, and where.

Owns: the plan for another budget and the place of every tile. Pure. Must not know how pages are
given back (storage/arena.py) nor when (engine.py).

Only weights move: resident tiles, the token table, expert slots, and the ring with its read
buffers, which a model that was opened whole needs once it streams. Context, KV cache and the most
tokens of a pass stay.

The order in which tiles go is fixed when the model is opened, and it is also their order in memory:
resident tiles are always the first ones of it. So a smaller budget's tiles are among those of a
larger one, no tile ever moves, and what is given back is one piece at the end. (Tiles in between
would share huge pages with their neighbours: the kernel gives those back only when it must.)

What lies there are units: a tile, or its base. Bases come first and leave last; a tile of which
only the base was kept becomes resident as a second copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from edgert.errors import BudgetError
from edgert.expert_sizes import spread_order
from edgert.plan import Plan, Region
from edgert.plan_parts import Need, TilePlan, resident_why, ring_of

__all__ = ["Rooms", "Unit", "elastic_bytes", "leaving_order", "resized", "rooms_of", "units_of"]

_RING_SLOTS = 12  # when the model was opened without a ring; the most any plan takes
_RING_LEAST = 4
_RING_SHARE = 6  # a ring takes 1/6 of what there is for weights, as when a model is opened


@dataclass(frozen=True, slots=True)
class Rooms:
    """The most bytes that each elastic region may come to."""

    resident: int
    embedding: int
    window: int
    experts: int
    staging: int  # of the read buffers that only a ring beside experts needs

    @property
    def total(self) -> int:
        """All of them."""
        return self.resident + self.embedding + self.window + self.experts + self.staging


@dataclass(frozen=True, slots=True)
class Unit:
    """A piece of the resident region: a tile of the plan, or its base."""

    tile: int
    nbytes: int
    is_base: bool = False


@dataclass(frozen=True, slots=True)
class _Kept:
    """What stays in memory: the first `units` units, the ring, experts, the token table."""

    units: int
    ring: int  # slots of the size of whole tiles
    expert_slots: int
    embedding: bool


def rooms_of(opened: Plan, need: Need) -> Rooms:
    """The addresses to keep for an engine opened with this plan, to follow any budget."""
    return Rooms(
        resident=sum(unit.nbytes for unit in units_of(opened)),
        embedding=need.embedding_bytes,
        window=_ring(opened, need) * need.slot_bytes,
        experts=need.slots_bytes(need.expert_count),
        staging=opened.reader_threads * opened.staging_bytes if need.experts else 0,
    )


def elastic_bytes(plan: Plan) -> dict[str, int]:
    """Bytes in use of each elastic region, named as in `Rooms`."""
    regions = {r.name: r.nbytes for r in plan.regions}
    more = (plan.staging_buffers - plan.reader_threads) * plan.staging_bytes
    names = ("resident", "embedding", "window", "experts")
    return {name: regions[name] for name in names} | {"staging": more}


def _ring(opened: Plan, need: Need) -> int:
    """Slots of the ring, of the size of whole tiles."""
    streamed = sum(t.stream_index >= 0 for t in opened.tiles)
    if 0 < opened.slots < streamed - 1:  # else it was cut short by the number of tiles
        return opened.region("window").nbytes // need.slot_bytes
    return max(min(_RING_SLOTS, len(opened.tiles) - 1), 2)


def units_of(opened: Plan) -> tuple[Unit, ...]:
    """The units of a plan in the order of memory: bases in the order of the pass, then tiles."""
    bases = [Unit(i, t.base.nbytes, True) for i, t in enumerate(opened.tiles) if t.base]
    return (*bases, *(Unit(i, opened.tiles[i].nbytes) for i in leaving_order(opened)))


def leaving_order(opened: Plan) -> tuple[int, ...]:
    """Numbers of the tiles of a plan, the one that leaves first at the end.

    What was resident when the model was opened stays longest, and of that the output head. The
    rest follows van der Corput's sequence (the bits of a rank, read backwards): the first n of it
    are spread evenly over the pass for every n, as a short ring needs it. Ranks are those of tiles
    that were streamed, and of runs of a tensor's tiles that were resident: a run stays one piece of
    memory, and one row of the program. (Tile by tile a resident 1B model had 706 rows instead of
    210 and lost 7 % of its speed.)
    """
    resident = [i for i, tile in enumerate(opened.tiles) if tile.stream_index < 0]
    streamed = [i for i, tile in enumerate(opened.tiles) if tile.stream_index >= 0]
    order: list[int] = []
    for runs in (_runs(opened, resident), [[i] for i in streamed]):
        heads = [run for run in runs if opened.tiles[run[0]].is_head]
        others = _spread([run for run in runs if not opened.tiles[run[0]].is_head])
        order += [i for run in (*heads, *others) for i in run]
    return tuple(order)


def _runs(opened: Plan, numbers: Sequence[int]) -> list[list[int]]:
    """Tile numbers, ascending, as runs of neighbours within a tensor."""
    kinds = [(tile.tensor, tile.is_head) for tile in opened.tiles]
    runs: list[list[int]] = []
    for i in numbers:
        if runs and runs[-1][-1] == i - 1 and kinds[i - 1] == kinds[i]:
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs


def _spread(items: Sequence[list[int]]) -> list[list[int]]:
    return [items[rank] for rank in spread_order(len(items))]


def resized(opened: Plan, need: Need, budget: int, *, others: int = 0) -> Plan:
    """The plan of an engine that was opened with the plan `opened`, for another budget in bytes.

    `others`: bytes by which other engines of the process have grown since then. Raises
    `BudgetError` with the smallest budget this engine can come down to.
    """
    process = replace(opened.regions[0], nbytes=opened.regions[0].nbytes + others)
    assert process.name == "process"
    opened = replace(opened, regions=(process, *opened.regions[1:]))
    reading = opened.reader_threads * opened.staging_bytes
    fixed = opened.total_bytes - sum(elastic_bytes(opened).values())
    units = units_of(opened)
    kept = _keep(need, units, budget - fixed, reading, _ring(opened, need))
    plan = _plan(opened, need, units, kept)
    if plan.total_bytes > budget:
        raise BudgetError(
            budget, plan.total_bytes, replace(plan, budget_bytes=budget).table(),
            "a shorter context or pass needs less, but only a model that is loaded again has it",
        )  # fmt: skip
    return replace(plan, budget_bytes=budget)


def _keep(need: Need, units: Sequence[Unit], room: int, reading: int, ring: int) -> _Kept:
    """What stays in `room` bytes: weights, then experts, then the token table; or the least."""
    least = min(need.expert_count, need.experts_per_token)
    left = room - need.slots_bytes(least)
    sizes = [unit.nbytes for unit in units]
    count, slots, n_bases = len(sizes), 0, sum(unit.is_base for unit in units)
    ring = min(ring, max(_RING_LEAST, left // _RING_SHARE // need.slot_bytes))
    streaming = ring * need.slot_bytes + (reading if need.experts else 0)
    smallest = min(streaming, sum(sizes))  # of the two ways to hold the tiles
    if sum(sizes) > left and len(sizes) >= 3 and (streaming <= left or smallest == streaming):
        count = _prefix(sizes, left - streaming)
        count = min(count, len(sizes) - 3)  # no ring turns with fewer tiles
        slots = min(ring, len(sizes) - max(count, n_bases) - 1)
        left -= streaming
    left -= sum(sizes[:count])
    expert_slots = need.slots_within(need.slots_bytes(least) + max(left, 0))
    left -= need.slots_bytes(expert_slots) - need.slots_bytes(least)
    whole = slots == 0 and expert_slots == need.expert_count
    return _Kept(count, slots, expert_slots, whole and need.embedding_bytes <= left)


def _prefix(sizes: Sequence[int], room: int) -> int:
    """How many of the first `sizes` fit in `room`."""
    for count, size in enumerate(sizes):
        room -= size
        if room < 0:
            return count
    return len(sizes)


def _plan(opened: Plan, need: Need, units: Sequence[Unit], kept: _Kept) -> Plan:
    """`opened` with other weights in memory; its budget is not looked at."""
    stays = units[: kept.units]
    whole = {unit.tile for unit in stays if not unit.is_base}
    based = {unit.tile for unit in stays if unit.is_base}
    tiles: list[TilePlan] = []
    count = 0
    for i, tile in enumerate(opened.tiles):
        base = tile.base if i in based and i not in whole else None
        tiles.append(tile.placed(-1 if i in whole else count, base))
        count += i not in whole
    buffers = opened.reader_threads * (2 if need.experts and kept.ring else 1)
    window = kept.ring * need.slot_bytes
    slots, slot_bytes = ring_of(window, need, tiles)
    more = (buffers - opened.staging_buffers) * opened.staging_bytes
    regions = {r.name: r for r in opened.regions}
    new = {
        "resident": sum(unit.nbytes for unit in stays),
        "embedding": need.embedding_bytes if kept.embedding else 0,
        "window": window,
        "experts": need.slots_bytes(kept.expert_slots),
        "staging": regions["staging"].nbytes + more,
    }
    why = {
        "resident": resident_why(tiles),
        "window": f"{slots} slots for streamed tiles",
        "experts": f"{kept.expert_slots} of {need.expert_count} expert records",
        "staging": f"{buffers} read buffers, one token row",
    }
    weights = ("resident", "embedding", "experts")
    return replace(
        opened,
        regions=tuple(
            Region(r.name, new.get(r.name, r.nbytes), why.get(r.name, r.why))
            for r in opened.regions
        ),
        tiles=tuple(tiles), slots=slots, slot_bytes=slot_bytes,
        expert_slots=kept.expert_slots,
        expert_sizes=need.sizes(kept.expert_slots), staging_buffers=buffers,
        embedding_resident=kept.embedding,
        resident_bytes=opened.resident_bytes + sum(new[n] - regions[n].nbytes for n in weights),
        streamed_bytes=sum(t.read_bytes for t in tiles if t.stream_index >= 0),
    )  # fmt: skip
