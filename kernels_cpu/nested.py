"""The codes of Q8_0 in parts, most significant bits first: taken apart and put together.

A part holds `bits` bits of each code u = q + 128 of a matrix in tiles, those from bit `low` on, and
the first part the scales as well. Like every format (`layout`) it is made of blocks of 16 rows x 32
weights: d (2 bytes a row) if it has scales, then `bits` units of 4 bytes a row. Units are those of
numbers of 4, 2 and 1 bits (`FIELDS`): the eight groups of four weights of a row, 4v .. 4v + 3, lie
in the bytes of unit v % width, from bit width * (v // width) on. Eight bits are Q8_0 itself:
group v is unit v, with q for u. So a first part of 3, 4 or 5 bits is what `matmul_base` computes
with, and any two parts in a row can be made into one.

Owns: moving bits between parts. Must not know: files, or which parts a matrix has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.errors import InputError
from edgert.kernels_cpu.compiler import types
from edgert.kernels_cpu.jit import kernel, void
from edgert.kernels_cpu.simd import const_of, ld_i64, loader, stack_buffer, storer, vor
from edgert.kernels_cpu.vectors import I32, operation, splat, vec

__all__ = ["FIELDS", "Part", "move_bits", "move_bits_kernel", "move_bits_ref", "part_bytes"]

_U8 = npt.NDArray[np.uint8]

# The fields of a part by its bits, in the order of their units: (width, lowest bit in the part).
FIELDS: dict[int, tuple[tuple[int, int], ...]] = {
    1: ((1, 0),), 2: ((2, 0),), 3: ((2, 0), (1, 2)), 4: ((4, 0),), 5: ((1, 4), (4, 0)),
    6: ((2, 4), (4, 0)), 7: ((1, 6), (2, 4), (4, 0)), 8: ((8, 0),),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Part:
    """Bits `low` to `low + bits` of the codes of whole tiles, contiguous in `data`."""

    data: _U8
    low: int
    bits: int

    @property
    def has_scales(self) -> bool:
        """True for the part that begins with the highest bit."""
        return self.low + self.bits == 8

    @property
    def block_bytes(self) -> int:
        """Bytes of 16 rows x 32 weights."""
        return 64 * self.bits + 32 * self.has_scales


def part_bytes(bits: int, low: int, n_blocks: int) -> int:
    """Bytes of a part of `n_blocks` blocks of 16 rows x 32 weights."""
    return n_blocks * (64 * bits + 32 * (low + bits == 8))


def move_bits(n_blocks: int, sources: Sequence[Part], targets: Sequence[Part]) -> None:
    """Write the `targets` from the `sources`, which hold all their bits. Releases the GIL.

    Raises InputError when a part has not the bytes of `n_blocks` blocks or bits are missing.
    """
    _check(n_blocks, sources, targets)
    fields = np.array([*_fields(sources), *_fields(targets)], np.int64)
    scaled = [next((p for p in parts if p.has_scales), None) for parts in (sources, targets)]
    d = [(0, 0) if p is None else (p.data.ctypes.data, p.block_bytes) for p in scaled]
    n = sum(len(FIELDS[p.bits]) for p in sources)
    move_bits_kernel(n_blocks, *d[0], *d[1], fields.ctypes.data, n, len(fields))


def _fields(parts: Sequence[Part]) -> list[tuple[int, int, int, int]]:
    """(address, bytes of a block, width, lowest bit in the code) of each field."""
    found = []
    for part in parts:
        at = part.data.ctypes.data + 32 * part.has_scales
        for width, low in FIELDS[part.bits]:
            found.append((at, part.block_bytes, width, part.low + low))
            at += 64 * width
    return found


def _check(n_blocks: int, sources: Sequence[Part], targets: Sequence[Part]) -> None:
    for part in (*sources, *targets):
        wanted = n_blocks * part.block_bytes
        data = part.data
        if data.dtype != np.uint8 or not data.flags.c_contiguous or data.nbytes != wanted:
            raise InputError(
                f"{part.bits} bits of {n_blocks:,} blocks must be {wanted:,} contiguous bytes, "
                f"not {data.dtype} {list(data.shape)}"
            )
    have = {bit for part in sources for bit in range(part.low, part.low + part.bits)}
    want = {bit for part in targets for bit in range(part.low, part.low + part.bits)}
    if not want <= have:
        raise InputError(f"bits {sorted(want - have)} of the codes are in no part")


# --- the twin ---------------------------------------------------------------------------------


def move_bits_ref(n_blocks: int, sources: Sequence[Part], targets: Sequence[Part]) -> None:
    """As `move_bits`, in NumPy."""
    _check(n_blocks, sources, targets)
    codes = np.zeros((n_blocks, 8, 64), np.uint8)
    d = np.zeros((n_blocks, 32), np.uint8)
    for part in sources:
        blocks = part.data.reshape(n_blocks, part.block_bytes)
        if part.has_scales:
            d, blocks = blocks[:, :32], blocks[:, 32:]
        for width, low, unit, first in _each_unit(part.bits):
            units = blocks[:, 64 * unit : 64 * unit + 64]
            for v in range(first, 8, width):
                field = units >> (width * (v // width)) & (2**width - 1)
                codes[:, v] |= (field ^ 128 if width == 8 else field) << (part.low + low)
    for part in targets:
        blocks = part.data.reshape(n_blocks, part.block_bytes)
        blocks[:] = 0
        if part.has_scales:
            blocks[:, :32], blocks = d, blocks[:, 32:]
        for width, low, unit, first in _each_unit(part.bits):
            for v in range(first, 8, width):
                field = codes[:, v] >> (part.low + low) & (2**width - 1)
                field = field ^ 128 if width == 8 else field << (width * (v // width))
                blocks[:, 64 * unit : 64 * unit + 64] |= field


def _each_unit(bits: int) -> list[tuple[int, int, int, int]]:
    """(width, lowest bit in the part, unit in the block, its first group) of each unit."""
    found: list[tuple[int, int, int, int]] = []
    for width, low in FIELDS[bits]:
        start = len(found)
        found += [(width, low, start + i, i) for i in range(width)]
    return found


# --- compiled ---------------------------------------------------------------------------------

_WORDS, _HALVES = vec("i32", 16), vec("i16", 16)
_ld, _st, _zero = loader(_WORDS), storer(_WORDS), const_of(_WORDS, [0])
_ld_d, _st_d = loader(_HALVES), storer(_HALVES)
_codes = stack_buffer(8 * 64)


@(lambda f: operation(_WORDS, (_WORDS, types.intp, types.intp, types.intp), f))
def _moved(context: Any, b: Any, sig: Any, args: Any) -> Any:
    """moved(v, width, right, left) -> the `width` bits from `right` on of each byte, to `left`.

    Whole bytes are q and become u = q + 128, or the reverse: their top bit turns. No bit of a field
    leaves its byte, so words are shifted.
    """
    words = args[0]
    width, right, left = (b.trunc(a, I32) for a in args[1:])
    mask = b.sub(b.shl(I32(1), width), I32(1))
    flip = b.shl(b.and_(width, I32(8)), I32(4))
    n = words.type.count
    mask, flip = (splat(b, b.mul(v, I32(0x01010101)), n) for v in (mask, flip))
    field = b.xor(b.and_(b.lshr(words, splat(b, right, n)), mask), flip)
    return b.shl(field, splat(b, left, n))


@kernel(void("i" * 8))
def move_bits_kernel(
    n_blocks: int, d: int, d_step: int, d_out: int, d_out_step: int, fields: int, n_sources: int,
    n_fields: int,
) -> None:  # fmt: skip
    """`fields` is the address of int64[n_fields, 4], see `_fields`; the sources come first.

    `d`, `d_out`: addresses of the first scales to copy, or 0; a block of them is `d_step` bytes.
    """
    codes = _codes()
    for block in range(n_blocks):
        if d_out != 0:
            _st_d(d_out + block * d_out_step, _ld_d(d + block * d_step))
        for v in range(8):
            _st(codes + 64 * v, _zero())
        for f in range(n_fields):
            at = ld_i64(fields + 32 * f) + block * ld_i64(fields + 32 * f + 8)
            width, low = ld_i64(fields + 32 * f + 16), ld_i64(fields + 32 * f + 24)
            for i in range(width):
                unit = _zero()
                if f < n_sources:
                    unit = _ld(at + 64 * i)
                for v in range(i, 8, width):  # the groups in unit i; v - i = width * (v // width)
                    code = _ld(codes + 64 * v)
                    if f < n_sources:
                        _st(codes + 64 * v, vor(code, _moved(unit, width, v - i, low)))
                    else:
                        unit = vor(unit, _moved(code, width, low, v - i))
                if f >= n_sources:
                    _st(at + 64 * i, unit)
