"""Which bytes of a GGUF block go where in a tile, one line for each format.

A piece (offset, bytes of a unit, units) is a run of units of a block; a block in a tile is its
pieces in order, each with its units interleaved over 16 rows. Packed scales and scattered bits
that a kernel could not use as they lie are first *expanded*: the expanded bytes count as if they
followed the block, and take the place of the packed ones.

    step          packed                                       expanded
    fifth_bits    32 high bits of 5-bit weights, in order      byte j: bits 4v + j, v = 0..7
    scales_mins   12: 8 six-bit scales and mins                16: scale 0, min 0, scale 1, ...
    scales_q3     12: 16 six-bit scales                        16: scale - 32
    scales_iq4    6: 8 six-bit scales                          8: scale - 32

The order of fifth_bits puts the bits of byte j of four-byte unit v of the nibbles in byte j: of
its low nibbles in bit v, of its high ones in bit 4 + v. Owns: these tables, and the steps and
their inverses in NumPy. Must not know: addresses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.quant.formats import BASES, BaseFormat

__all__ = ["PIECES", "STEPS", "Piece", "Step"]

_Bytes = npt.NDArray[Any]  # uint8
Piece = tuple[int, int, int]  # offset in the block and what is expanded, bytes of a unit, units


@dataclass(frozen=True, slots=True)
class Step:
    """Bytes `start` to `stop` of a block become `nbytes`: (..., blocks, bytes) -> the same."""

    name: str
    start: int
    stop: int
    nbytes: int
    expand: Callable[[_Bytes], _Bytes]
    pack: Callable[[_Bytes], _Bytes]


def _fields(packed: _Bytes, bits: int) -> _Bytes:
    """The numbers of `bits` bits in bytes, lowest first: (..., n) -> (..., n * 8 / bits)."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    numbers = packed[..., None] >> shifts & np.uint8(2**bits - 1)
    return numbers.reshape(*packed.shape[:-1], -1)


def _joined(numbers: _Bytes, bits: int) -> _Bytes:
    """The inverse of `_fields`."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    parts = numbers.reshape(*numbers.shape[:-1], -1, len(shifts)) << shifts
    joined: _Bytes = np.bitwise_or.reduce(parts, axis=-1)
    return joined


def _swapped(numbers: _Bytes, inner: int) -> _Bytes:
    """(..., outer * inner) -> (..., inner * outer): the transpose of the last axis as a matrix."""
    matrix = numbers.reshape(*numbers.shape[:-1], -1, inner)
    return np.swapaxes(matrix, -1, -2).reshape(numbers.shape)


def _expand_fifth_bits(packed: _Bytes) -> _Bytes:
    return _joined(_swapped(_fields(packed, 1), 4), 1)


def _pack_fifth_bits(expanded: _Bytes) -> _Bytes:
    return _joined(_swapped(_fields(expanded, 1), 8), 1)


def _expand_scales_mins(packed: _Bytes) -> _Bytes:
    low, high, mixed = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scales = (low & 63, (mixed & 15) | (low >> 6 << 4))
    mins = (high & 63, (mixed >> 4) | (high >> 6 << 4))
    return _swapped(np.concatenate([*scales, *mins], axis=-1), 8)


def _pack_scales_mins(expanded: _Bytes) -> _Bytes:
    s0, s1, m0, m1 = np.split(_swapped(expanded, 2), 4, axis=-1)
    return np.concatenate([s0 | s1 >> 4 << 6, m0 | m1 >> 4 << 6, s1 & 15 | m1 << 4], axis=-1)


def _expand_scales_q3(packed: _Bytes) -> _Bytes:
    low = _swapped(_fields(packed[..., :8], 4), 2)
    high = _swapped(_fields(packed[..., 8:], 2), 4)
    return np.asarray((low | high << 4) - np.uint8(32))


def _pack_scales_q3(expanded: _Bytes) -> _Bytes:
    scales = expanded + np.uint8(32)
    low, high = _swapped(scales & 15, 8), _swapped(scales >> 4, 4)
    return np.concatenate([_joined(low, 4), _joined(high, 2)], axis=-1)


def _expand_scales_iq4(packed: _Bytes) -> _Bytes:
    low, high = _fields(packed[..., 2:], 4), _fields(packed[..., :2], 2)
    return np.asarray((low | high << 4) - np.uint8(32))


def _pack_scales_iq4(expanded: _Bytes) -> _Bytes:
    scales = expanded + np.uint8(32)
    return np.concatenate([_joined(scales >> 4, 2), _joined(scales & 15, 4)], axis=-1)


def _fifth_bits(start: int) -> Step:
    return Step("fifth_bits", start, start + 4, 4, _expand_fifth_bits, _pack_fifth_bits)


_SCALES_MINS = Step("scales_mins", 4, 16, 16, _expand_scales_mins, _pack_scales_mins)
STEPS: dict[str, Step] = {
    "Q5_0": _fifth_bits(2),
    "Q5_1": _fifth_bits(4),
    "Q3_K": Step("scales_q3", 96, 108, 16, _expand_scales_q3, _pack_scales_q3),
    "Q4_K": _SCALES_MINS,
    "Q5_K": _SCALES_MINS,
    "IQ4_XS": Step("scales_iq4", 2, 8, 8, _expand_scales_iq4, _pack_scales_iq4),
}


def _repeated(count: int, *pieces: tuple[int, int, int, int]) -> tuple[Piece, ...]:
    """`pieces` of (first offset, offset from one time to the next, unit, units), `count` times."""
    return tuple((o + i * by, unit, units) for i in range(count) for o, by, unit, units in pieces)


_D, _M = (0, 2, 1), (2, 2, 1)
PIECES: dict[str, tuple[Piece, ...]] = {
    "Q8_0": (_D, (2, 4, 8)),
    "Q4_0": (_D, (2, 4, 4)),
    "Q4_1": (_D, _M, (4, 4, 4)),
    "Q5_0": (_D, (22, 4, 1), (6, 4, 4)),
    "Q5_1": (_D, _M, (24, 4, 1), (8, 4, 4)),
    "IQ4_NL": (_D, (2, 4, 4)),
    "MXFP4": ((0, 1, 1), (1, 4, 4)),
    "Q2_K": ((80, 2, 1), (82, 2, 1), *_repeated(2, (0, 8, 2, 4), (16, 32, 4, 8))),
    "Q3_K": ((108, 2, 1), (0, 4, 8), *_repeated(2, (110, 8, 2, 4), (32, 32, 4, 8))),
    "Q4_K": (_D, _M, *_repeated(4, (144, 4, 1, 4), (16, 32, 4, 8))),
    "Q5_K": (_D, _M, (16, 4, 8), *_repeated(4, (176, 4, 1, 4), (48, 32, 4, 8))),
    "Q6_K": ((208, 2, 1), *_repeated(2, (192, 8, 2, 4), (0, 64, 4, 16), (128, 32, 4, 8))),
    "IQ4_XS": (_D, *_repeated(8, (136, 1, 1, 1), (8, 16, 4, 4))),
    "P3_32": (_D, _M, (4, 4, 3)),
    "P3_128": (_D, _M, *_repeated(4, (4, 8, 4, 2), (36, 4, 4, 1))),
}
for _bits in (1, 2, 4):
    for _blocks in (1, 4):
        PIECES[f"P{_bits}_{32 * _blocks}"] = (_D, _M, (4, 4, _bits * _blocks))


def _base_pieces(fmt: BaseFormat) -> tuple[Piece, ...]:
    """d (and m), then the codes of 32 weights; of super-blocks those of 64 after their scales."""
    end, bits, n = fmt.block_bytes, fmt.bits, fmt.block_size // 32
    start = end - 4 * bits * n  # of the codes; the fields of 3 and 5 bits lie apart (`packing`)
    codes = {3: ((start, 2), (start + 8 * n, 1)), 5: ((start, 1), (start + 4 * n, 4))}.get(
        bits, ((start, bits),)
    )
    if n == 1:
        return (_D, *((_M,) if start == 4 else ()), *((at, 4, units) for at, units in codes))
    head, scales = ((_D, _M), (end, 4, 1, 4)) if fmt.name in STEPS else ((_D,), (2, 4, 2, 2))
    fields = [(at + i * 4 * units, 8 * units, 4, units) for i in (0, 1) for at, units in codes]
    return (*head, *_repeated(n // 2, scales, *fields))


for _bases in BASES.values():
    for _fmt in _bases.values():
        if _fmt.of.name in ("Q4_K", "Q5_K"):
            STEPS[_fmt.name] = _SCALES_MINS
        PIECES[_fmt.name] = _base_pieces(_fmt)
