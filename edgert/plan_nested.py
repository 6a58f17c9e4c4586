"""Which tiles of a nested pack keep how many of their bits in memory.

Owns: that choice. Pure. Must not know what else is in a budget (plan.py).

A nested matrix is kept whole, or its base is kept (its first bits, with which the model drafts) and
the rest is read in every pass. A model drafts only if something of every matrix is in memory, so
the base of all comes first; then wider bases, then whole tiles, for as much memory as there is. A
byte saves a byte of reading wherever it is spent, and a wider base drafts better: of 4 bits of 8
some 5 drafted tokens are right in a row, of 3 bits 3.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgert.plan_parts import Base, TilePlan, at_least
from edgert.plan_resident import spread_evenly

__all__ = ["keep_bases"]

_WHOLE = 8  # bits


def keep_bases(tiles: Sequence[TilePlan], room: int, slots: int) -> tuple[Base | None, ...] | None:
    """The base of each tile in `room` bytes, None for whole tiles; None if no base of all fits.

    More bits are spread evenly over the matrices, so that the disk sees an even demand. A ring
    needs more streamed tiles than slots.
    """
    widths = sorted({base.bits for tile in tiles for base in tile.bases})
    kept: list[Base | None] = []
    for bits in (*widths, _WHOLE) if widths else ():
        wider = [at_least(tile, bits) for tile in tiles]
        sizes = [_bytes_of(*pair) for pair in zip(tiles, wider, strict=True)]
        if not kept:
            kept = wider
            room -= sum(sizes)
            continue
        have = [_bytes_of(*pair) for pair in zip(tiles, kept, strict=True)]
        costs = [new - old for new, old in zip(sizes, have, strict=True)]
        for i in _upgrades(tiles, costs, room):
            kept[i] = wider[i]
            room -= costs[i]
    missing = slots + 1 - sum(base is not None for base in kept)
    for i, tile in enumerate(tiles):
        if missing > 0 and kept and kept[i] is None and tile.bases:
            kept[i] = tile.bases[-1]
            missing -= 1
    return None if room < 0 or missing > 0 else tuple(kept)


def _bytes_of(tile: TilePlan, base: Base | None) -> int:
    return tile.nbytes if base is None else base.nbytes


def _upgrades(tiles: Sequence[TilePlan], costs: Sequence[int], room: int) -> list[int]:
    """Tiles to spend `room` bytes on: the head, whole matrices spread evenly, then what fits.

    (Tile by tile the draft program would have a row for each; see `elastic.leaving_order`.)
    """
    groups: dict[tuple[str, bool], list[int]] = {}
    for i, tile in enumerate(tiles):
        if costs[i]:
            groups.setdefault((tile.tensor, tile.is_head), []).append(i)
    sums = [sum(costs[i] for i in group) for group in groups.values()]
    heads = [is_head for _, is_head in groups]
    taken = spread_evenly(sums, heads, room)
    found = [i for group, take in zip(groups.values(), taken, strict=True) if take for i in group]
    room -= sum(costs[i] for i in found)
    rest = [
        i for group, take in zip(groups.values(), taken, strict=True) if not take for i in group
    ]
    for i in rest:
        if costs[i] > room:
            break
        found.append(i)
        room -= costs[i]
    return found
