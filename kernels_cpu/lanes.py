"""Bytes of weights in registers: how many rows at a time, and taking fields apart.

A tile holds 16 rows. A single token is computed on all of them at once; a batch walks the tile in
`PARTS` parts of `LANES` rows. Everything here works on the bytes of a unit of 4 weights a row
(`Vec` of i8), or on int16 pairs of scales, and means the same on every CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgert.kernels_cpu.compiler import intrinsic, ir, types
from edgert.kernels_cpu.dots import constant_like, join, pair_half, split
from edgert.kernels_cpu.isa import AVX2, AVX512_VNNI, ISA, PORTABLE
from edgert.kernels_cpu.vectors import (
    Vec,
    constant,
    declare,
    emit_prefetch,
    operation,
    splat,
    vec,
)
from edgert.quant.reference import IQ4_VALUES, MXFP4_VALUES

__all__ = [
    "LANES", "PARTS", "TILE_ROWS", "field", "high_nibbles", "iq4_codes", "low_nibbles", "mixed",
    "mxfp4_codes", "negated", "pair_high", "pair_high_nibbles", "pair_low", "pair_low_nibbles",
    "prefetch_lines", "shift_bytes", "shifted", "times",
]  # fmt: skip

TILE_ROWS = 16
LANES = ISA.lanes
PARTS = TILE_ROWS // LANES
# How far ahead weights are asked for. Into L1 is best for kernels that walk a block in order, where
# 10 KiB is too far. Those that come back to parts of a block are faster out of L2, which has
# more requests under way than L1 (Q5_K 19 -> 29 GB/s on one thread, Q6_K 18 -> 28; Q4_0 29 -> 24).
_NEAR_BYTES, _FAR_BYTES = 4096, 8192
_INTO_L1, _INTO_L2 = 3, 2
_Emit = Callable[..., Any]  # (builder, value) -> value


def prefetch_lines(count: int, far: bool = False) -> Any:
    """ask(address): for `count` cache lines from a fixed distance beyond it; into L2 if `far`."""
    distance, locality = (_FAR_BYTES, _INTO_L2) if far else (_NEAR_BYTES, _INTO_L1)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        for i in range(count):
            at = builder.add(args[0], args[0].type(distance + 64 * i))
            emit_prefetch(builder, at, locality)
        return context.get_dummy_value()

    return operation(types.void, (types.intp,), emit)


def _of_one(emit: _Emit, result: Callable[[Vec], Vec] = lambda v: v) -> Any:
    """An operation on one vector; `result` gives its type from the argument's."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return emit(builder, args[0])

    def typed(value: Any) -> Any:
        return (result(value)(value), generate) if isinstance(value, Vec) else None

    return intrinsic(lambda typingctx, value: typed(value))


def shift_bytes(builder: Any, value: Any, shift: int) -> Any:
    """16-bit words shifted right by `shift`, left if negative; bits cross into neighbour bytes."""
    if not shift:
        return value
    words = builder.bitcast(value, ir.VectorType(ir.IntType(16), value.type.count // 2))
    move = builder.lshr if shift > 0 else builder.shl
    return builder.bitcast(move(words, constant_like(words, abs(shift))), value.type)


def field(shift: int, mask: int) -> Any:
    """take(v) -> (each byte shifted right by `shift`, left if negative) & mask.

    `mask` must drop what crosses from the neighbour byte.
    """

    def emit(builder: Any, value: Any) -> Any:
        return builder.and_(shift_bytes(builder, value, shift), constant_like(value, mask))

    return _of_one(emit)


def mixed(mask: int, shift: int, other: int) -> Any:
    """mix(v, w) -> v shifted by `shift` where `mask` has ones, w shifted by `other` elsewhere.

    Shifts as in `field`: neither part of the mask may let a bit of the neighbour byte through.
    """

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        inside = builder.and_(shift_bytes(builder, args[0], shift), constant_like(args[0], mask))
        rest = constant_like(args[1], 255 - mask)
        return builder.or_(inside, builder.and_(shift_bytes(builder, args[1], other), rest))

    return intrinsic(lambda typingctx, v, w: (v(v, w), generate))


def _shifted(typingctx: Any, value: Any, count: Any) -> Any:
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        words = ir.VectorType(ir.IntType(16), args[0].type.count // 2)
        n = splat(builder, builder.trunc(args[1], ir.IntType(16)), words.count)
        return builder.bitcast(builder.lshr(builder.bitcast(args[0], words), n), args[0].type)

    return value(value, count), generate


shifted = intrinsic(_shifted)  # shifted(v, count): 16-bit words shifted right, count not constant
low_nibbles, high_nibbles = field(0, 0x0F), field(4, 0x0F)


def _codes(values: list[int]) -> Any:
    """look(nibbles) -> int8 values[nibble]."""
    name, width = {
        AVX512_VNNI: ("llvm.x86.avx512.pshuf.b.512", 64), AVX2: ("llvm.x86.avx2.pshuf.b", 32),
        PORTABLE: ("", 0),
    }[ISA]  # fmt: skip

    def emit(builder: Any, nibbles: Any) -> Any:
        if ISA is PORTABLE:
            found = constant_like(nibbles, values[0])
            for code in range(1, 16):
                same = builder.icmp_unsigned("==", nibbles, constant_like(nibbles, code))
                found = builder.select(same, constant_like(nibbles, values[code]), found)
            return found
        part = vec("i8", width).llvm
        look = declare(builder, name, part, [part, part])
        table = constant(part, (values * 4)[:width])
        return join(
            builder, [builder.call(look, [table, n]) for n in split(builder, nibbles, width)]
        )

    return _of_one(emit)


iq4_codes = _codes([int(v) for v in IQ4_VALUES])
mxfp4_codes = _codes([int(v) for v in MXFP4_VALUES])


def _half_type(v: Vec) -> Vec:
    return v if ISA is AVX2 else vec("i32", v.n // 2)


# int16 pairs, two for each row: one of them as a factor for `scaled_16`, their nibbles
pair_low = _of_one(lambda b, pairs: pair_half(b, pairs, False), _half_type)
pair_high = _of_one(lambda b, pairs: pair_half(b, pairs, True), _half_type)
pair_low_nibbles = _of_one(lambda b, pairs: b.and_(pairs, constant_like(pairs, 15)))
pair_high_nibbles = _of_one(lambda b, pairs: b.lshr(pairs, constant_like(pairs, 4)))
negated = _of_one(lambda b, pairs: b.sub(constant_like(pairs, 0), pairs))


def times(factor: int) -> Any:
    """multiply(integers) -> each times `factor`."""
    return _of_one(lambda b, value: b.mul(value, constant_like(value, factor)))
