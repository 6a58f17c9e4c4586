"""Compiled steps that expand the packed scales and bits of 16 blocks; `layout_tables` defines them.

A lane of 32 bits is a row and its bytes are handled together. Expanded word i of all rows, four
expanded bytes of each, goes to `out + 64 * i`. Owns: these steps. Must not know: tiles.
"""

from __future__ import annotations

from typing import Any

from edgert.kernels_cpu.compiler import ir, types
from edgert.kernels_cpu.jit import inline
from edgert.kernels_cpu.simd import bitcast_to, const_of, shuffle_of, storer, vec, vor, vsub
from edgert.kernels_cpu.vectors import I32, constant, load, operation

__all__ = ["STEP_CODES", "WORDS", "expand", "ld_words", "st_words"]

STEP_CODES = {"fifth_bits": 1, "scales_mins": 2, "scales_q3": 3, "scales_iq4": 4}
WORDS = vec("i32", 16)
_BYTES = vec("i8", 64)
st_words, _st_bytes = storer(WORDS), storer(_BYTES)


@(lambda f: operation(WORDS, (types.intp, types.intp), f))
def ld_words(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    """ld_words(address, stride) -> the four bytes there of 16 rows `stride` bytes apart."""
    words = ir.Constant(WORDS.llvm, ir.Undefined)
    for r in range(16):
        address = builder.add(args[0], builder.mul(args[1], args[1].type(r)))
        words = builder.insert_element(words, load(builder, address, I32), I32(r))
    return words


def _shifted(builder: Any, words: Any, right: int) -> Any:
    count = constant(WORDS.llvm, [abs(right)] * 16)
    return builder.shl(words, count) if right < 0 else builder.lshr(words, count)


def _field(right: int, mask: int) -> Any:
    """field(v) -> (v shifted right by `right`, left if negative) & `mask`."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.and_(_shifted(builder, args[0], right), constant(WORDS.llvm, [mask] * 16))

    return operation(WORDS, (WORDS,), emit)


def _spread(left: int, mask: int) -> Any:
    """spread(v) -> (v | v << `left`) & `mask`: moves the upper half of fields away."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        both = builder.or_(args[0], _shifted(builder, args[0], -left))
        return builder.and_(both, constant(WORDS.llvm, [mask] * 16))

    return operation(WORDS, (WORDS,), emit)


@(lambda f: operation(WORDS, (WORDS,), f))
def _fifth_bits(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    """Bit 4v + j of each lane to 8j + v: the five digits of a bit's number rotated, by swaps."""
    words = args[0]
    for high, low in ((4, 1), (3, 0), (2, 1), (1, 0)):  # digits of the number that change places
        distance = 2**high - 2**low
        mask = sum(1 << i for i in range(32) if not i >> high & 1 and i >> low & 1)
        moved = builder.xor(words, _shifted(builder, words, distance))
        moved = builder.and_(moved, constant(WORDS.llvm, [mask] * 16))
        words = builder.xor(words, builder.xor(moved, _shifted(builder, moved, -distance)))
    return words


_low_nibbles, _high_nibbles = _field(0, 0x0F0F0F0F), _field(4, 0x0F0F0F0F)
_six_bits = _field(0, 0x3F3F3F3F)
# Two-bit field 0..3 of each byte, moved to bits 4 and 5.
_top_0, _top_1, _top_2, _top_3 = (_field(right, 0x30303030) for right in (-4, -2, 0, 2))
_low_half, _high_half = _field(0, 0xFFFF), _field(16, 0xFFFF)
_byte_0, _byte_1 = _field(0, 0xFF), _field(8, 0xFF)
_bytes_apart, _nibbles_apart = _spread(8, 0x00FF00FF), _spread(4, 0x0F0F0F0F)
_fours_apart, _twos_apart = _spread(12, 0x000F000F), _spread(6, 0x03030303)
_as_bytes, _as_words = bitcast_to(WORDS, _BYTES), bitcast_to(_BYTES, WORDS)
_thirty_two = const_of(_BYTES, [32])
# Bytes 0 and 1, or 2 and 3, of each word of a, each followed by that of b.
_pairs_low, _pairs_high = (
    shuffle_of(_BYTES, [i - i % 4 + i % 4 // 2 + half + 64 * (i % 2) for i in range(64)])
    for half in (0, 2)
)


@inline
def _scales_mins(packed: Any, stride: Any, out: Any) -> None:
    low, high = ld_words(packed, stride), ld_words(packed + 4, stride)
    mixed = ld_words(packed + 8, stride)
    scales, mins = _as_bytes(_six_bits(low)), _as_bytes(_six_bits(high))
    _st_bytes(out, _pairs_low(scales, mins))
    _st_bytes(out + 64, _pairs_high(scales, mins))
    scales = _as_bytes(vor(_low_nibbles(mixed), _top_3(low)))
    mins = _as_bytes(vor(_high_nibbles(mixed), _top_3(high)))
    _st_bytes(out + 128, _pairs_low(scales, mins))
    _st_bytes(out + 192, _pairs_high(scales, mins))


@inline
def _st_minus_32(out: Any, low: Any, top: Any) -> None:
    _st_bytes(out, vsub(_as_bytes(vor(low, top)), _thirty_two()))


@inline
def _scales_q3(packed: Any, stride: Any, out: Any) -> None:
    a, b = ld_words(packed, stride), ld_words(packed + 4, stride)
    top = ld_words(packed + 8, stride)
    _st_minus_32(out, _low_nibbles(a), _top_0(top))
    _st_minus_32(out + 64, _low_nibbles(b), _top_1(top))
    _st_minus_32(out + 128, _high_nibbles(a), _top_2(top))
    _st_minus_32(out + 192, _high_nibbles(b), _top_3(top))


@inline
def _scales_iq4(packed: Any, stride: Any, out: Any) -> None:
    top, low = ld_words(packed, stride), ld_words(packed + 2, stride)
    first, second = _bytes_apart(_low_half(low)), _bytes_apart(_high_half(low))
    top_first, top_second = _fours_apart(_byte_0(top)), _fours_apart(_byte_1(top))
    _st_minus_32(out, _nibbles_apart(first), _top_0(_twos_apart(top_first)))
    _st_minus_32(out + 64, _nibbles_apart(second), _top_0(_twos_apart(top_second)))


@inline
def expand(step: Any, packed: Any, stride: Any, out: Any) -> None:
    """`packed`: address of row 0's packed bytes; rows are `stride` bytes apart."""
    if step == 1:
        st_words(out, _fifth_bits(ld_words(packed, stride)))
    elif step == 2:
        _scales_mins(packed, stride, out)
    elif step == 3:
        _scales_q3(packed, stride, out)
    elif step == 4:
        _scales_iq4(packed, stride, out)
