"""Blocks of 32 weights of 16 rows to float32, for the formats without a matmul of their own.

A block in a tile is transposed by bytes: byte i of rows 0..15 is at 16 * i, so every step works on
one byte position of all 16 rows. Each function reads the block at `p` and writes float32
[weight][16 rows] at `out`, equal to the bit to `edgert.quant.reference`.

Owns: these formulas. Must not know: activations.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from edgert.kernels_cpu.isa import ISA, PORTABLE
from edgert.kernels_cpu.jit import inline
from edgert.kernels_cpu.lanes import (
    high_nibbles,
    ld_bytes16,
    ld_half_split,
    low_nibbles,
    st16,
    to_float,
)
from edgert.kernels_cpu.simd import const_of, loader, vadd, vec, vmul, vor, vsub
from edgert.kernels_cpu.vectors import I32, constant, declare, operation, splat
from edgert.quant.reference import IQ4_VALUES, MXFP4_VALUES

__all__ = [
    "bits", "bytes_to_float", "iq4_nl", "iq4_value", "ld_16_bytes", "mxfp4", "q4_1", "q5_0",
    "q5_1", "shifted",
]  # fmt: skip

_I32x16, _I8x16, _F32x16 = vec("i32", 16), vec("i8", 16), vec("f32", 16)
ld_16_bytes = loader(_I8x16)
_sixteen = const_of(_I32x16, [16])


def _emit_bits(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    value, shift, mask = args
    shift, mask = (splat(builder, builder.trunc(v, I32), 16) for v in (shift, mask))
    return builder.and_(builder.lshr(value, shift), mask)


def _emit_shifted(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return builder.shl(args[0], splat(builder, builder.trunc(args[1], I32), 16))


def _emit_bytes_to_float(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return builder.sitofp(builder.zext(args[0], _I32x16.llvm), _F32x16.llvm)


bits = operation(_I32x16, (_I32x16, types.int64, types.int64), _emit_bits)  # (v >> shift) & mask
shifted = operation(_I32x16, (_I32x16, types.int64), _emit_shifted)  # v << count
bytes_to_float = operation(_F32x16, (_I8x16,), _emit_bytes_to_float)  # unsigned bytes


def _lookup(values: list[int]) -> Any:
    """look(codes) -> float32 values[code] of 16 bytes in 0..15."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = _I8x16.llvm
        if ISA is PORTABLE:
            found = constant(kind, [values[0]] * 16)
            for code in range(1, 16):
                same = builder.icmp_unsigned("==", args[0], constant(kind, [code] * 16))
                found = builder.select(same, constant(kind, [values[code]] * 16), found)
        else:
            look = declare(builder, "llvm.x86.ssse3.pshuf.b.128", kind, [kind, kind])
            found = builder.call(look, [constant(kind, values), args[0]])
        return builder.sitofp(builder.sext(found, _I32x16.llvm), _F32x16.llvm)

    return operation(_F32x16, (_I8x16,), emit)


iq4_value = _lookup([int(v) for v in IQ4_VALUES])
_mxfp4_value = _lookup([int(v) for v in MXFP4_VALUES])


@(lambda f: operation(_F32x16, (_I32x16,), f))
def _exponent_scale(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    """2**(e - 128) of bytes e; below 2 a subnormal."""
    kind = args[0].type
    one, steps = constant(kind, [1] * 16), constant(kind, [23] * 16)
    normal = builder.shl(builder.sub(args[0], one), steps)
    tiny = builder.shl(constant(kind, [1 << 21] * 16), args[0])
    chosen = builder.select(builder.icmp_signed(">", args[0], one), normal, tiny)
    return builder.bitcast(chosen, ir.VectorType(ir.FloatType(), 16))


@inline
def q4_1(p: Any, out: Any) -> None:
    """w = d * q + m."""
    d, m = ld_half_split(p), ld_half_split(p + 32)
    for j in range(16):
        v = ld_16_bytes(p + 64 + 16 * j)
        st16(out + 64 * j, vadd(vmul(d, bytes_to_float(low_nibbles(v))), m))
        st16(out + 1024 + 64 * j, vadd(vmul(d, bytes_to_float(high_nibbles(v))), m))


@inline
def _five(nibbles: Any, high: Any, k: Any) -> Any:
    """Nibble | 16 * bit k of the block's 32 high bits, whose byte 0 is at `high`."""
    bit = bits(ld_bytes16(high + 16 * (k >> 3)), k & 7, 1)
    return vor(nibbles, shifted(bit, 4))


@inline
def q5_0(p: Any, out: Any) -> None:
    """w = d * (q - 16): q - 16 is exact in float32."""
    d, sixteen = ld_half_split(p), _sixteen()
    for j in range(16):
        v = ld_bytes16(p + 96 + 16 * j)
        low = _five(bits(v, 0, 15), p + 32, j)
        high = _five(bits(v, 4, 15), p + 32, j + 16)
        st16(out + 64 * j, vmul(d, to_float(vsub(low, sixteen))))
        st16(out + 1024 + 64 * j, vmul(d, to_float(vsub(high, sixteen))))


@inline
def q5_1(p: Any, out: Any) -> None:
    """w = d * q + m."""
    d, m = ld_half_split(p), ld_half_split(p + 32)
    for j in range(16):
        v = ld_bytes16(p + 128 + 16 * j)
        low = _five(bits(v, 0, 15), p + 64, j)
        high = _five(bits(v, 4, 15), p + 64, j + 16)
        st16(out + 64 * j, vadd(vmul(d, to_float(low)), m))
        st16(out + 1024 + 64 * j, vadd(vmul(d, to_float(high)), m))


@inline
def iq4_nl(p: Any, out: Any) -> None:
    """w = d * IQ4_VALUES[q]."""
    d = ld_half_split(p)
    for j in range(16):
        v = ld_16_bytes(p + 32 + 16 * j)
        st16(out + 64 * j, vmul(d, iq4_value(low_nibbles(v))))
        st16(out + 1024 + 64 * j, vmul(d, iq4_value(high_nibbles(v))))


@inline
def mxfp4(p: Any, out: Any) -> None:
    """w = 2**(e - 128) * MXFP4_VALUES[q]."""
    d = _exponent_scale(ld_bytes16(p))
    for j in range(16):
        v = ld_16_bytes(p + 16 + 16 * j)
        st16(out + 64 * j, vmul(d, _mxfp4_value(low_nibbles(v))))
        st16(out + 1024 + 64 * j, vmul(d, _mxfp4_value(high_nibbles(v))))
