"""Where each bit of a code lies in tiles and in the parts of a nested pack.

Codes go in groups of four neighbours of a row: the bytes of a unit, 4 for each of 16 rows, 64 in
all, hold the same bits of the codes of one group, or of several groups side by side. So does a unit
of six-bit scales, four of each row, which are groups behind those of the codes. What else a block
holds (d, m, the 8-bit scales of Q6_K) is moved as it is, 32 bytes at a time.

Owns: `tile_places` and `part_places`. Places in tiles follow from the tables that make tiles
(`layout_tables`, `packing`); those in parts are FORMAT.md's. Must not know: addresses.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from edgert.kernels_cpu.layout import tile_bytes
from edgert.kernels_cpu.layout_tables import PIECES, STEPS
from edgert.quant.formats import CODE_BITS, BaseFormat, QuantFormat, part_block_bytes
from edgert.quant.packing import layout

__all__ = ["FIELDS", "Place", "Places", "are_same", "part_places", "tile_places"]

UNIT, LINE = 64, 32  # bytes of a unit, and of what is moved as it is
_SCALE_BITS = 6
# The fields of a part by its bits, in the order of their units: (width, lowest bit in the part).
FIELDS: dict[int, tuple[tuple[int, int], ...]] = {
    1: ((1, 0),), 2: ((2, 0),), 3: ((2, 0), (1, 2)), 4: ((4, 0),), 5: ((1, 4), (4, 0)),
    6: ((2, 4), (4, 0)), 7: ((1, 6), (2, 4), (4, 0)),
}  # fmt: skip


class Place(NamedTuple):
    """Bits `low` to `low + width` of the numbers of `group` are bits from `bit` on of each byte."""

    at: int  # of the unit in the block
    bit: int
    width: int
    group: int
    low: int
    signed: bool = False  # the byte is a number with a sign: its top bit is turned


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """A block of 16 rows. One object for each kind: equal means the same."""

    nbytes: int
    lines: dict[tuple[str, int], int]  # what is moved as it is: field and number -> where
    fields: tuple[Place, ...]
    bits: range  # of the codes


@cache
def are_same(one: Places, other: Places) -> bool:
    """Every byte has the same place and meaning."""
    return (one.lines, set(one.fields)) == (other.lines, set(other.fields))


@cache
def tile_places(fmt: QuantFormat) -> Places:
    """Of tiles of a format that can be nested, or of a base."""
    base = fmt if isinstance(fmt, BaseFormat) else None
    n = CODE_BITS[base.of.name if base else fmt.name]
    low = n - base.bits if base else 0
    lines: dict[tuple[str, int], int] = {}
    fields: list[Place] = []
    at = 0
    for offset, unit, count in PIECES[fmt.name]:
        for start in range(offset, offset + unit * count, max(unit, 4) if unit != 2 else 2):
            if unit == 2:
                name, skipped = _field_of(fmt, start)
                lines[name, skipped // 2] = at
            else:
                fields += _unit(fmt, start, at, low)
            at += 16 * (2 if unit == 2 else 4)
    assert at == tile_bytes(fmt, fmt.block_size), fmt.name
    return Places(at, lines, tuple(fields), range(low, n))


def _field_of(fmt: QuantFormat, offset: int) -> tuple[str, int]:
    """The field of a block that byte `offset` is in, and how far."""
    start = 0
    for part in layout(fmt):
        if offset < start + part.nbytes:
            return part.name, offset - start
        start += part.nbytes
    raise AssertionError((fmt.name, offset))


def _unit(fmt: QuantFormat, offset: int, at: int, low: int) -> list[Place]:
    """What the four bytes from `offset` on of a block hold, as a unit at `at`."""
    expanded = offset - fmt.block_bytes
    if expanded >= 0 and STEPS[fmt.name].name == "fifth_bits":
        return [Place(at, v, 1, v, 4) for v in range(8)]
    if expanded >= 0:
        return [Place(at, 0, _SCALE_BITS, fmt.block_size // 4 + expanded // 4, 0)]
    name, skipped = _field_of(fmt, offset)
    part = next(p for p in layout(fmt) if p.name == name)
    if part.kind == "i8":
        return [Place(at, 0, 8, skipped // 4, 0, signed=True)]
    lowest = next((p.bits for p in layout(fmt) if p.name == "low"), 0) if name == "high" else 0
    run, byte = divmod(skipped, part.width)
    each = 8 // part.bits
    return [
        Place(
            at, i * part.bits, part.bits, ((run * each + i) * part.width + byte) // 4, low + lowest
        )
        for i in range(each)
    ]


@cache
def part_places(fmt: QuantFormat, bits: int, low: int) -> Places:
    """Of the part with bits `low` to `low + bits` of the codes of `fmt`: FORMAT.md.

    The first part, which has the top bit, begins with all scales.
    """
    whole = tile_places(fmt)
    fields: list[Place] = []
    lines: dict[tuple[str, int], int] = {}
    at = 0
    groups = fmt.block_size // 4
    if low + bits == CODE_BITS[fmt.name]:
        lines = {key: LINE * i for i, key in enumerate(sorted(whole.lines))}
        at = LINE * len(lines)
        if any(place.group >= groups for place in whole.fields):
            fields += _fields(at, _SCALE_BITS, range(groups, groups + 4), 0)
            at += 3 * UNIT
    for first in range(0, groups, 8):
        fields += _fields(at, bits, range(first, first + 8), low)
        at += UNIT * bits
    assert at == 16 * part_block_bytes(fmt, bits, bool(lines)), (fmt.name, bits)
    return Places(at, lines, tuple(fields), range(low, low + bits))


def _fields(at: int, bits: int, groups: range, low: int) -> list[Place]:
    """`bits` bits of the numbers of `groups`: of a field of u units group v is in unit v mod u."""
    found = []
    for width, lowest in FIELDS[bits]:
        units = width * len(groups) // 8
        for v, group in enumerate(groups):
            bit = width * (v // units)
            found.append(Place(at + UNIT * (v % units), bit, width, group, low + lowest))
        at += UNIT * units
    return found
