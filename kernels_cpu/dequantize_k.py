"""Super-blocks of 256 weights of 16 rows to float32; see `dequantize_simple`.

Owns: Q2_K, Q3_K, Q5_K and IQ4_XS. Products are taken in the order of `edgert.quant.reference`.
"""

from __future__ import annotations

from typing import Any

from edgert.kernels_cpu.dequantize_simple import bits, iq4_value, ld_16_bytes, shifted
from edgert.kernels_cpu.jit import inline
from edgert.kernels_cpu.lanes import (
    high_nibbles,
    ld_bytes16,
    ld_half_split,
    low_nibbles,
    st16,
    to_float,
)
from edgert.kernels_cpu.simd import const_of, vec, vmul, vor, vsub

__all__ = ["iq4_xs", "q2_k", "q3_k", "q5_k"]

_four, _thirty_two = (const_of(vec("i32", 16), [n]) for n in (4, 32))


@inline
def q2_k(p: Any, out: Any) -> None:
    """w = (d * scale) * q - (m * min): 16 sub-blocks of 16."""
    d, m = ld_half_split(p + 16 * 80), ld_half_split(p + 16 * 82)
    for sub in range(16):
        both = ld_bytes16(p + 16 * sub)
        scale = vmul(d, to_float(bits(both, 0, 15)))
        minimum = vmul(m, to_float(bits(both, 4, 15)))
        first = p + 16 * (16 + 32 * (sub >> 3) + 16 * (sub & 1))
        shift = 2 * ((sub >> 1) & 3)
        for j in range(16):
            q = to_float(bits(ld_bytes16(first + 16 * j), shift, 3))
            st16(out + 64 * (16 * sub + j), vsub(vmul(scale, q), minimum))


@inline
def q3_k(p: Any, out: Any) -> None:
    """w = (d * (scale - 32)) * (q - 4): 16 sub-blocks of 16."""
    d = ld_half_split(p + 16 * 108)
    for sub in range(16):
        low = bits(ld_bytes16(p + 16 * (96 + (sub & 7))), 4 * (sub >> 3), 15)
        high = bits(ld_bytes16(p + 16 * (104 + (sub & 3))), 2 * (sub >> 2), 3)
        scale = vmul(d, to_float(vsub(vor(low, shifted(high, 4)), _thirty_two())))
        first = p + 16 * (32 + 32 * (sub >> 3) + 16 * (sub & 1))
        tops = p + 16 * (16 * (sub & 1))
        for j in range(16):
            q = bits(ld_bytes16(first + 16 * j), 2 * ((sub >> 1) & 3), 3)
            top = bits(ld_bytes16(tops + 16 * j), sub >> 1, 1)
            q = vsub(vor(q, shifted(top, 2)), _four())
            st16(out + 64 * (16 * sub + j), vmul(scale, to_float(q)))


@inline
def _six_bit(p: Any, sub: Any, byte: Any) -> Any:
    """Scale (`byte` 0) or min (`byte` 4) of sub-block `sub` from the twelve bytes at `p`."""
    if sub < 4:
        return bits(ld_bytes16(p + 16 * (byte + sub)), 0, 63)
    low = bits(ld_bytes16(p + 16 * (4 + sub)), byte, 15)
    top = bits(ld_bytes16(p + 16 * (byte + sub - 4)), 6, 3)
    return vor(low, shifted(top, 4))


@inline
def q5_k(p: Any, out: Any) -> None:
    """w = (d * scale) * q - (m * min): 8 sub-blocks of 32."""
    d, m = ld_half_split(p), ld_half_split(p + 32)
    for sub in range(8):
        scale = vmul(d, to_float(_six_bit(p + 64, sub, 0)))
        minimum = vmul(m, to_float(_six_bit(p + 64, sub, 4)))
        first = p + 16 * (48 + 32 * (sub >> 1))
        for j in range(32):
            low = bits(ld_bytes16(first + 16 * j), 4 * (sub & 1), 15)
            top = bits(ld_bytes16(p + 16 * (16 + j)), sub, 1)
            q = to_float(vor(low, shifted(top, 4)))
            st16(out + 64 * (32 * sub + j), vsub(vmul(scale, q), minimum))


@inline
def iq4_xs(p: Any, out: Any) -> None:
    """w = (d * (scale - 32)) * IQ4_VALUES[q]: 8 sub-blocks of 32."""
    d = ld_half_split(p)
    for sub in range(8):
        low = bits(ld_bytes16(p + 16 * (4 + (sub >> 1))), 4 * (sub & 1), 15)
        high = bits(ld_bytes16(p + 16 * (2 + (sub >> 2))), 2 * (sub & 3), 3)
        scale = vmul(d, to_float(vsub(vor(low, shifted(high, 4)), _thirty_two())))
        for j in range(16):
            v = ld_16_bytes(p + 16 * (8 + 16 * sub + j))
            at = out + 64 * (32 * sub + j)
            st16(at, vmul(scale, iq4_value(low_nibbles(v))))
            st16(at + 1024, vmul(scale, iq4_value(high_nibbles(v))))
