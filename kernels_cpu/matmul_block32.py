"""Q8_0 and Q4_0 weights times quantised activations.

    y[row, t] = acc over blocks b = 0, 1, 2, ... of
        acc = fma(float32(dot_b), float32(d_w[row, b] * d_x[t, b]), acc)
    dot_b = sum of the 32 integer products q_w * q_x, exact

Owns: the inner loops over one tile for one token (16 rows wide) and for four tokens (`LANES` rows
wide). Must not know: how tokens are found or results stored (`matmul_drive`). Layout: `layout`.
"""

from __future__ import annotations

from typing import Any

from edgert.kernels_cpu.jit import Kernel, inline, kernel
from edgert.kernels_cpu.lanes import (
    LANES,
    bc16,
    bcL,
    bs16,
    bsL,
    bx16,
    bxL,
    high_nibbles,
    ld_f16_16,
    ld_f16L,
    ld_w16,
    ld_wL,
    low_nibbles,
    mac_s8,
    mac_u8,
    minus8_16,
    minus8_L,
    mul_u8,
    offset_s8,
    pair_dot,
    prefetch_lines,
    sum_u8,
    to_float,
    zero16,
    zeroL,
)
from edgert.kernels_cpu.matmul_drive import MATMUL, drive
from edgert.kernels_cpu.simd import fma, vadd, vmul

__all__ = ["KERNELS"]

_Q8_0_BYTES = 544  # of a block of 16 rows: 16 scales as float16, 8 x 64 weights
_Q4_0_BYTES = 288  # 16 scales, 4 x 64 bytes: weights 4v + j in the low nibbles, 16 + 4v + j above


@inline
def _q8_0_tile1(p: Any, K: Any, a: Any) -> Any:
    acc = zero16()
    for _ in range(K // 32):
        prefetch_lines(p, 9)
        i = offset_s8(bs16(a + 36))
        for v in range(8):
            i = mac_s8(i, ld_w16(p + 32 + 64 * v), bx16(a + 4 * v))
        acc = fma(to_float(i), vmul(ld_f16_16(p), bc16(a + 32)), acc)
        p += _Q8_0_BYTES
        a += 40
    return acc


@inline
def _q8_0_tile4(p: Any, part: Any, K: Any, a0: Any, a1: Any, a2: Any, a3: Any) -> Any:
    r0, r1, r2, r3 = zeroL(), zeroL(), zeroL(), zeroL()
    scales, w = p + 2 * LANES * part, p + 32 + 4 * LANES * part
    for _ in range(K // 32):
        i0, i1 = offset_s8(bsL(a0 + 36)), offset_s8(bsL(a1 + 36))
        i2, i3 = offset_s8(bsL(a2 + 36)), offset_s8(bsL(a3 + 36))
        for v in range(8):
            q = ld_wL(w + 64 * v)
            i0 = mac_s8(i0, q, bxL(a0 + 4 * v))
            i1 = mac_s8(i1, q, bxL(a1 + 4 * v))
            i2 = mac_s8(i2, q, bxL(a2 + 4 * v))
            i3 = mac_s8(i3, q, bxL(a3 + 4 * v))
        d = ld_f16L(scales)
        r0 = fma(to_float(i0), vmul(d, bcL(a0 + 32)), r0)
        r1 = fma(to_float(i1), vmul(d, bcL(a1 + 32)), r1)
        r2 = fma(to_float(i2), vmul(d, bcL(a2 + 32)), r2)
        r3 = fma(to_float(i3), vmul(d, bcL(a3 + 32)), r3)
        scales += _Q8_0_BYTES
        w += _Q8_0_BYTES
        a0, a1, a2, a3 = a0 + 40, a1 + 40, a2 + 40, a3 + 40
    return r0, r1, r2, r3


@inline
def _q4_0_tile1(p: Any, K: Any, a: Any) -> Any:
    acc, minus8 = zero16(), minus8_16()
    for _ in range(K // 32):
        prefetch_lines(p, 5)
        q = ld_w16(p + 32)
        low, high = mul_u8(low_nibbles(q), bx16(a)), mul_u8(high_nibbles(q), bx16(a + 16))
        for v in range(1, 4):
            q = ld_w16(p + 32 + 64 * v)
            low = mac_u8(low, low_nibbles(q), bx16(a + 4 * v))
            high = mac_u8(high, high_nibbles(q), bx16(a + 16 + 4 * v))
        i = vadd(sum_u8(vadd(low, high)), pair_dot(bs16(a + 36), minus8))
        acc = fma(to_float(i), vmul(ld_f16_16(p), bc16(a + 32)), acc)
        p += _Q4_0_BYTES
        a += 40
    return acc


@inline
def _q4_0_tile4(p: Any, part: Any, K: Any, a0: Any, a1: Any, a2: Any, a3: Any) -> Any:
    r0, r1, r2, r3 = zeroL(), zeroL(), zeroL(), zeroL()
    scales, w = p + 2 * LANES * part, p + 32 + 4 * LANES * part
    minus8 = minus8_L()
    for _ in range(K // 32):
        q = ld_wL(w)
        low, high = low_nibbles(q), high_nibbles(q)
        i0 = mac_u8(mul_u8(low, bxL(a0)), high, bxL(a0 + 16))
        i1 = mac_u8(mul_u8(low, bxL(a1)), high, bxL(a1 + 16))
        i2 = mac_u8(mul_u8(low, bxL(a2)), high, bxL(a2 + 16))
        i3 = mac_u8(mul_u8(low, bxL(a3)), high, bxL(a3 + 16))
        for v in range(1, 4):
            q = ld_wL(w + 64 * v)
            low, high = low_nibbles(q), high_nibbles(q)
            i0 = mac_u8(mac_u8(i0, low, bxL(a0 + 4 * v)), high, bxL(a0 + 16 + 4 * v))
            i1 = mac_u8(mac_u8(i1, low, bxL(a1 + 4 * v)), high, bxL(a1 + 16 + 4 * v))
            i2 = mac_u8(mac_u8(i2, low, bxL(a2 + 4 * v)), high, bxL(a2 + 16 + 4 * v))
            i3 = mac_u8(mac_u8(i3, low, bxL(a3 + 4 * v)), high, bxL(a3 + 16 + 4 * v))
        d = ld_f16L(scales)
        s0 = vadd(sum_u8(i0), pair_dot(bsL(a0 + 36), minus8))
        s1 = vadd(sum_u8(i1), pair_dot(bsL(a1 + 36), minus8))
        s2 = vadd(sum_u8(i2), pair_dot(bsL(a2 + 36), minus8))
        s3 = vadd(sum_u8(i3), pair_dot(bsL(a3 + 36), minus8))
        r0 = fma(to_float(s0), vmul(d, bcL(a0 + 32)), r0)
        r1 = fma(to_float(s1), vmul(d, bcL(a1 + 32)), r1)
        r2 = fma(to_float(s2), vmul(d, bcL(a2 + 32)), r2)
        r3 = fma(to_float(s3), vmul(d, bcL(a3 + 32)), r3)
        scales += _Q4_0_BYTES
        w += _Q4_0_BYTES
        a0, a1, a2, a3 = a0 + 40, a1 + 40, a2 + 40, a3 + 40
    return r0, r1, r2, r3


@kernel(MATMUL)
def _matmul_q8_0_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        _q8_0_tile1, _q8_0_tile4, K // 32 * _Q8_0_BYTES, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_q4_0_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        _q4_0_tile1, _q4_0_tile4, K // 32 * _Q4_0_BYTES, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


KERNELS: dict[str, Kernel] = {"Q8_0": _matmul_q8_0_kernel, "Q4_0": _matmul_q4_0_kernel}
