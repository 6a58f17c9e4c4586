"""Which tiles stay in memory whole.

Owns: spending bytes on tiles, evenly. Pure. Must not know what else is in a budget (plan.py), nor
bases (plan_nested.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from edgert.plan_parts import TilePlan

__all__ = ["choose_resident", "spread_evenly"]


def spread_evenly(costs: Sequence[int], first: Sequence[bool], room: int) -> list[bool]:
    """Which items to spend `room` on: those that come first, if all fit, then others, evenly."""
    taken = [False] * len(costs)
    total = sum(costs)
    ahead = sum(cost for cost, is_first in zip(costs, first, strict=True) if is_first)
    if ahead <= room:
        taken = list(first)
        room -= ahead
        total -= ahead
    share = room / total if total else 0.0
    owed = 0.0
    for i, cost in enumerate(costs):
        if taken[i]:
            continue
        owed += cost * share
        if owed >= cost and cost <= room:
            taken[i] = True
            owed -= cost
            room -= cost
    return taken


def choose_resident(tiles: Sequence[TilePlan], room: int, slots: int) -> tuple[bool, ...]:
    """Which tiles stay in `room` bytes: the head first, then spread evenly, then what still fits.

    A ring needs more streamed tiles than slots, so either nothing or more than `slots` is streamed.
    """
    total = sum(t.nbytes for t in tiles)
    if total <= room:
        return tuple(True for _ in tiles)
    keep = spread_evenly([t.nbytes for t in tiles], [t.is_head for t in tiles], room)
    left = room - sum(t.nbytes for t, kept in zip(tiles, keep, strict=True) if kept)
    for i in sorted(range(len(tiles)), key=lambda i: -tiles[i].nbytes):
        if not keep[i] and tiles[i].nbytes <= left:
            keep[i] = True
            left -= tiles[i].nbytes
    for i in range(len(tiles)):
        if len(tiles) - sum(keep) > slots:
            break
        keep[i] = False
    return tuple(keep)
