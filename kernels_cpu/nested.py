"""The codes of quantised weights in parts, most significant bits first: taken apart, put together.

A part of a nested pack holds some bits of each code of a matrix, its first part the scales as well
(FORMAT.md). The first parts together are a base, a format with a kernel (`matmul_base`), and all of
them are the matrix. `places` says where each bit lies in a part, a base and a tile; between any two
of these lies a table of moves: of a unit of 64 bytes, turned and masked, into another.

Owns: moving bits. Must not know: files, or which parts a matrix has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edgert.errors import InputError
from edgert.kernels_cpu.compiler import types
from edgert.kernels_cpu.jit import inline, kernel, void
from edgert.kernels_cpu.places import LINE, UNIT, Place, Places, part_places, tile_places
from edgert.kernels_cpu.simd import ld_i64, loader, storer, vxor
from edgert.kernels_cpu.vectors import I32, declare, operation, splat, vec
from edgert.quant.formats import QuantFormat, part_block_bytes

__all__ = [
    "Bits",
    "move_bits",
    "move_bits_kernel",
    "move_bits_ref",
    "part_bytes",
    "part_of",
    "tiles_of",
]

_U8 = npt.NDArray[np.uint8]
_I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Bits:
    """Blocks of 16 rows of a matrix, contiguous in `data`, and where the bits lie in each."""

    data: _U8
    places: Places


def tiles_of(fmt: QuantFormat, data: _U8) -> Bits:
    """Tiles of a format that can be nested, or of a base."""
    return Bits(data, tile_places(fmt))


def part_of(fmt: QuantFormat, bits: int, low: int, data: _U8) -> Bits:
    """The part of a nested matrix with bits `low` to `low + bits` of its codes."""
    return Bits(data, part_places(fmt, bits, low))


def part_bytes(fmt: QuantFormat, bits: int, is_first: bool, n_blocks: int) -> int:
    """Bytes of a part of `n_blocks` blocks of 16 rows."""
    return 16 * n_blocks * part_block_bytes(fmt, bits, is_first)


def move_bits(n_blocks: int, sources: Sequence[Bits], targets: Sequence[Bits]) -> None:
    """Write the `targets` from the `sources`, which hold all their bits. Releases the GIL.

    Raises InputError when one has not the bytes of `n_blocks` blocks or bits are missing.
    """
    _check(n_blocks, (*sources, *targets))
    moves = _moves(tuple(s.places for s in sources), tuple(t.places for t in targets))
    addresses = np.array([b.data.ctypes.data for b in (*sources, *targets)], np.int64)
    table = moves.table.copy()
    table[:, 0] += addresses[moves.which]
    move_bits_kernel(n_blocks, table.ctypes.data, moves.n_lines, moves.n_units)


def _check(n_blocks: int, held: Sequence[Bits]) -> None:
    for bits in held:
        wanted = n_blocks * bits.places.nbytes
        data = bits.data
        if data.dtype != np.uint8 or not data.flags.c_contiguous or data.nbytes != wanted:
            raise InputError(
                f"{len(bits.places.bits)} bits of {n_blocks:,} blocks must be {wanted:,} "
                f"contiguous bytes, not {data.dtype} {list(data.shape)}"
            )


# --- the moves --------------------------------------------------------------------------------


class _Moves(NamedTuple):
    """What the kernel does for a block: rows (at, bytes of a block, ...) of sources and targets.

    First two for each line: from, to. Then the units that are written, (..., bits to turn, number
    of terms), then the terms, (..., turn left by, mask).
    """

    table: _I64  # [n, 4]
    which: _I64  # [n]: the number of the source, or of the target behind all sources
    n_lines: int
    n_units: int


@cache
def _moves(sources: tuple[Places, ...], targets: tuple[Places, ...]) -> _Moves:
    have = {bit for source in sources for bit in source.bits}
    want = {bit for target in targets for bit in target.bits}
    if not want <= have:
        raise InputError(f"bits {sorted(want - have)} of the codes are in no part")
    lines: list[tuple[int, ...]] = []
    units: list[tuple[int, ...]] = []
    terms: list[tuple[int, ...]] = []
    for t, target in enumerate(targets, len(sources)):
        for s, source in enumerate(sources):
            for line, at in source.lines.items():
                if line in target.lines:
                    lines += [(at, s, 0, 0), (target.lines[line], t, 0, 0)]
        for at in dict.fromkeys(place.at for place in target.fields):
            wanted = [place for place in target.fields if place.at == at]
            turned = 128 * any(place.signed for place in wanted)
            masks: dict[tuple[int, int, int], int] = {}
            for s, field, mask, left in _terms(sources, wanted):
                turned ^= mask & _moved(128 * field.signed, left)
                key = (field.at, s, left % 32)
                masks[key] = masks.get(key, 0) | mask
            units.append((at, t, turned, len(masks)))
            terms += [(*key, mask) for key, mask in masks.items()]
    table = np.array([*lines, *units, *terms], np.int64)
    which = table[:, 1].copy()
    table[:, 1] = np.array([places.nbytes for places in (*sources, *targets)])[which]
    return _Moves(table, which, len(lines) // 2, len(units))


def _terms(
    sources: Sequence[Places], wanted: Sequence[Place]
) -> Iterator[tuple[int, Place, int, int]]:
    """(number of the source, place, bits to take after turning, turn left by) for a unit."""
    for place in wanted:
        for s, source in enumerate(sources):
            for other in source.fields:
                low = max(place.low, other.low)
                width = min(place.low + place.width, other.low + other.width) - low
                if other.group == place.group and width > 0:
                    bit = place.bit + low - place.low
                    left = bit - (other.bit + low - other.low)
                    yield s, other, (2**width - 1) << bit, left


def _moved(byte: int, left: int) -> int:
    return byte << left if left >= 0 else byte >> -left


# --- the twin ---------------------------------------------------------------------------------


def move_bits_ref(n_blocks: int, sources: Sequence[Bits], targets: Sequence[Bits]) -> None:
    """As `move_bits`, in NumPy: by way of the numbers of each group."""
    _check(n_blocks, (*sources, *targets))
    numbers: dict[int, _U8] = {}
    lines: dict[tuple[str, int], _U8] = {}
    for held in sources:
        blocks = held.data.reshape(n_blocks, held.places.nbytes)
        for key, at in held.places.lines.items():
            lines[key] = blocks[:, at : at + LINE]
        for place in held.places.fields:
            unit = blocks[:, place.at : place.at + UNIT] ^ np.uint8(128 * place.signed)
            field = unit >> np.uint8(place.bit) & np.uint8(2**place.width - 1)
            before = numbers.get(place.group, np.zeros((n_blocks, UNIT), np.uint8))
            numbers[place.group] = before | field << np.uint8(place.low)
    for held in targets:
        blocks = held.data.reshape(n_blocks, held.places.nbytes)
        blocks[:] = 0
        for key, at in held.places.lines.items():
            blocks[:, at : at + LINE] = lines[key]
        for place in held.places.fields:
            field = numbers[place.group] >> np.uint8(place.low) & np.uint8(2**place.width - 1)
            unit = field << np.uint8(place.bit) ^ np.uint8(128 * place.signed)
            blocks[:, place.at : place.at + UNIT] |= unit


# --- compiled ---------------------------------------------------------------------------------

_WORDS, _HALVES = vec("i32", 16), vec("i16", 16)
_ld, _st = loader(_WORDS), storer(_WORDS)
_ld_line, _st_line = loader(_HALVES), storer(_HALVES)


def _bytes(b: Any, number: Any) -> Any:
    """The low byte of `number` in each byte of a unit."""
    return splat(b, b.mul(b.trunc(number, I32), I32(0x01010101)), _WORDS.n)


@(lambda f: operation(_WORDS, (types.intp,), f))
def _each_byte(context: Any, b: Any, sig: Any, args: Any) -> Any:
    return _bytes(b, args[0])


@(lambda f: operation(_WORDS, (_WORDS, types.intp, _WORDS), f))
def _turned(context: Any, b: Any, sig: Any, args: Any) -> Any:
    """turned(words, left, mask) -> words rotated left, and of that the bits of `mask`.

    No bit of a field leaves its byte, so words are rotated.
    """
    words, kind = args[0], args[0].type
    left = splat(b, b.trunc(args[1], I32), kind.count)
    rotate = declare(b, f"llvm.fshl.v{kind.count}i32", kind, [kind] * 3)
    return b.and_(b.call(rotate, [words, words, left]), args[2])


@inline
def _move_units(block: Any, units: Any, n_units: Any, terms: Any) -> None:
    term = terms
    for i in range(n_units):
        row = units + 32 * i
        unit = _each_byte(ld_i64(row + 16))
        for _ in range(ld_i64(row + 24)):
            left, mask = ld_i64(term + 16), _each_byte(ld_i64(term + 24))
            at = ld_i64(term) + block * ld_i64(term + 8)
            unit = vxor(unit, _turned(_ld(at), left, mask))
            term += 32
        _st(ld_i64(row) + block * ld_i64(row + 8), unit)


@inline
def _move_four(block: Any, units: Any, n_units: Any, terms: Any) -> None:
    """As `_move_units` of four blocks, so that a row of the table is read once for all."""
    term = terms
    for i in range(n_units):
        row = units + 32 * i
        one = _each_byte(ld_i64(row + 16))
        two, three, four = one, one, one
        for _ in range(ld_i64(row + 24)):
            left, mask = ld_i64(term + 16), _each_byte(ld_i64(term + 24))
            nbytes = ld_i64(term + 8)
            at = ld_i64(term) + block * nbytes
            one = vxor(one, _turned(_ld(at), left, mask))
            two = vxor(two, _turned(_ld(at + nbytes), left, mask))
            at += 2 * nbytes
            three = vxor(three, _turned(_ld(at), left, mask))
            four = vxor(four, _turned(_ld(at + nbytes), left, mask))
            term += 32
        nbytes = ld_i64(row + 8)
        at = ld_i64(row) + block * nbytes
        _st(at, one)
        _st(at + nbytes, two)
        at += 2 * nbytes
        _st(at, three)
        _st(at + nbytes, four)


@kernel(void("i" * 4))
def move_bits_kernel(n_blocks: int, table: int, n_lines: int, n_units: int) -> None:
    """`table`: the address of that of `_Moves`, with addresses for places."""
    units = table + 64 * n_lines
    terms = units + 32 * n_units
    for block in range(n_blocks):
        for i in range(n_lines):
            row = table + 64 * i
            source = ld_i64(row) + block * ld_i64(row + 8)
            _st_line(ld_i64(row + 32) + block * ld_i64(row + 40), _ld_line(source))
        if block & 3 == 3:
            _move_four(block - 3, units, n_units, terms)
    for block in range(n_blocks & -4, n_blocks):
        _move_units(block, units, n_units, terms)
