"""Q4_K and Q6_K weights times quantised activations, over sub-blocks b = 0, 1, 2, ... of 32.

    Q4_K  acc = fma(float32(dot_b), (d * sc_b) * d_x[b], acc)
          acc = fma(-(dmin * mn_b), d_x[b] * float32(sum_x[b]), acc)
    Q6_K  acc = fma(float32(dot_b), d * d_x[b], acc),  dot_b = sum over both 16s of sc * dot16

The products in brackets are exact in float32 (11 + 6 bits), dot_b is an integer below 2**24.

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
    dot16_scaled,
    high_nibbles,
    ld_f16_16,
    ld_f16L,
    ld_pairs16,
    ld_pairsL,
    ld_u8f16,
    ld_u8fL,
    ld_w16,
    ld_wL,
    low_nibbles,
    mac_u8,
    mul_u8,
    ones16,
    onesL,
    pair_dot,
    pair_high,
    pair_low,
    prefetch_lines,
    q6_bits_0,
    q6_bits_1,
    q6_bits_2,
    q6_bits_3,
    sum_u8,
    times32,
    to_float,
    zero16,
    zeroL,
)
from edgert.kernels_cpu.matmul_drive import MATMUL, drive
from edgert.kernels_cpu.simd import fma, fnma, vadd, vmul, vor, vsub

__all__ = ["KERNELS"]

_Q4_K_BYTES = 2368  # d and dmin of 16 rows, then 4 groups of two sub-blocks:
_Q4_K_GROUP = 576  # scale, min, scale, min as bytes of 16 rows, 8 x 64: low nibbles, high nibbles
_Q6_K_BYTES = 3360  # d of 16 rows, then two halves of four sub-blocks:
_Q6_K_HALF = 1664  # 4 x 16 scale pairs, 16 x 64 low nibble pairs, 8 x 64 high bits


@inline
def _q4_k_sub1(nibbles: Any, w: Any, scales: Any, d: Any, dmin: Any, a: Any, acc: Any) -> Any:
    p = mul_u8(nibbles(ld_w16(w)), bx16(a))
    for v in range(1, 8):
        p = mac_u8(p, nibbles(ld_w16(w + 64 * v)), bx16(a + 4 * v))
    dx = bc16(a + 32)
    acc = fma(to_float(sum_u8(p)), vmul(vmul(d, ld_u8f16(scales)), dx), acc)
    sums = vmul(dx, to_float(pair_dot(bs16(a + 36), ones16())))
    return fnma(vmul(dmin, ld_u8f16(scales + 16)), sums, acc)


@inline
def _q4_k_tile1(p: Any, K: Any, a: Any) -> Any:
    acc = zero16()
    for g in range(K // 64):
        block = p + (g >> 2) * _Q4_K_BYTES
        d, dmin = ld_f16_16(block), ld_f16_16(block + 32)
        s = block + 64 + (g & 3) * _Q4_K_GROUP
        prefetch_lines(s, 9)
        acc = _q4_k_sub1(low_nibbles, s + 64, s, d, dmin, a, acc)
        acc = _q4_k_sub1(high_nibbles, s + 64, s + 32, d, dmin, a + 40, acc)
        a += 80
    return acc


@inline
def _q4_k_add(i: Any, scale: Any, minimum: Any, a: Any, acc: Any) -> Any:
    dx = bcL(a + 32)
    acc = fma(to_float(i), vmul(scale, dx), acc)
    return fnma(minimum, vmul(dx, to_float(pair_dot(bsL(a + 36), onesL()))), acc)


@inline
def _q4_k_sub4(
    nibbles: Any, w: Any, scales: Any, d: Any, dmin: Any,
    a0: Any, a1: Any, a2: Any, a3: Any, r0: Any, r1: Any, r2: Any, r3: Any,
) -> Any:  # fmt: skip
    q = nibbles(ld_wL(w))
    i0, i1, i2, i3 = mul_u8(q, bxL(a0)), mul_u8(q, bxL(a1)), mul_u8(q, bxL(a2)), mul_u8(q, bxL(a3))
    for v in range(1, 8):
        q = nibbles(ld_wL(w + 64 * v))
        i0 = mac_u8(i0, q, bxL(a0 + 4 * v))
        i1 = mac_u8(i1, q, bxL(a1 + 4 * v))
        i2 = mac_u8(i2, q, bxL(a2 + 4 * v))
        i3 = mac_u8(i3, q, bxL(a3 + 4 * v))
    scale, minimum = vmul(d, ld_u8fL(scales)), vmul(dmin, ld_u8fL(scales + 16))
    r0 = _q4_k_add(sum_u8(i0), scale, minimum, a0, r0)
    r1 = _q4_k_add(sum_u8(i1), scale, minimum, a1, r1)
    r2 = _q4_k_add(sum_u8(i2), scale, minimum, a2, r2)
    r3 = _q4_k_add(sum_u8(i3), scale, minimum, a3, r3)
    return r0, r1, r2, r3


@inline
def _q4_k_tile4(p: Any, part: Any, K: Any, a0: Any, a1: Any, a2: Any, a3: Any) -> Any:
    r0, r1, r2, r3 = zeroL(), zeroL(), zeroL(), zeroL()
    for g in range(K // 64):
        block = p + (g >> 2) * _Q4_K_BYTES
        at = block + 2 * LANES * part
        d, dmin = ld_f16L(at), ld_f16L(at + 32)
        group = block + 64 + (g & 3) * _Q4_K_GROUP
        s, w = group + LANES * part, group + 64 + 4 * LANES * part
        r0, r1, r2, r3 = _q4_k_sub4(
            low_nibbles, w, s, d, dmin, a0, a1, a2, a3, r0, r1, r2, r3
        )  # fmt: skip
        r0, r1, r2, r3 = _q4_k_sub4(
            high_nibbles, w, s + 32, d, dmin, a0 + 40, a1 + 40, a2 + 40, a3 + 40, r0, r1, r2, r3
        )
        a0, a1, a2, a3 = a0 + 80, a1 + 80, a2 + 80, a3 + 80
    return r0, r1, r2, r3


@inline
def _six_0(low: Any, high: Any) -> Any:
    return vor(low_nibbles(low), q6_bits_0(high))


@inline
def _six_1(low: Any, high: Any) -> Any:
    return vor(low_nibbles(low), q6_bits_1(high))


@inline
def _six_2(low: Any, high: Any) -> Any:
    return vor(high_nibbles(low), q6_bits_2(high))


@inline
def _six_3(low: Any, high: Any) -> Any:
    return vor(high_nibbles(low), q6_bits_3(high))


@inline
def _q6_k_dot1(six: Any, low: Any, high: Any, scales: Any, a: Any) -> Any:
    """The integer dot of one sub-block: weights are 0..63 first, then 32 * sum_x is taken off."""
    pair = ld_pairs16(scales)
    w0, w1 = six(ld_w16(low), ld_w16(high)), six(ld_w16(low + 64), ld_w16(high + 64))
    w2, w3 = six(ld_w16(low + 128), ld_w16(high + 128)), six(ld_w16(low + 192), ld_w16(high + 192))
    i = dot16_scaled(
        w0, w1, w2, w3, bx16(a), bx16(a + 4), bx16(a + 8), bx16(a + 12), pair_low(pair)
    )
    low += 256
    high += 256
    w0, w1 = six(ld_w16(low), ld_w16(high)), six(ld_w16(low + 64), ld_w16(high + 64))
    w2, w3 = six(ld_w16(low + 128), ld_w16(high + 128)), six(ld_w16(low + 192), ld_w16(high + 192))
    j = dot16_scaled(
        w0, w1, w2, w3, bx16(a + 16), bx16(a + 20), bx16(a + 24), bx16(a + 28), pair_high(pair)
    )
    return vsub(vadd(i, j), times32(pair_dot(bs16(a + 36), pair)))


@inline
def _q6_k_tile1(p: Any, K: Any, a: Any) -> Any:
    acc = zero16()
    for h in range(K // 128):
        block = p + (h >> 1) * _Q6_K_BYTES
        d = ld_f16_16(block)
        s = block + 32 + (h & 1) * _Q6_K_HALF
        low, high = s + 128, s + 1152
        prefetch_lines(s, 26)
        i = _q6_k_dot1(_six_0, low, high, s, a)
        acc = fma(to_float(i), vmul(d, bc16(a + 32)), acc)
        i = _q6_k_dot1(_six_1, low + 512, high, s + 32, a + 40)
        acc = fma(to_float(i), vmul(d, bc16(a + 72)), acc)
        i = _q6_k_dot1(_six_2, low, high, s + 64, a + 80)
        acc = fma(to_float(i), vmul(d, bc16(a + 112)), acc)
        i = _q6_k_dot1(_six_3, low + 512, high, s + 96, a + 120)
        acc = fma(to_float(i), vmul(d, bc16(a + 152)), acc)
        a += 160
    return acc


@inline
def _dot16L(w0: Any, w1: Any, w2: Any, w3: Any, a: Any, scale: Any) -> Any:
    return dot16_scaled(w0, w1, w2, w3, bxL(a), bxL(a + 4), bxL(a + 8), bxL(a + 12), scale)


@inline
def _q6_k_end(i: Any, j: Any, pair: Any, d: Any, a: Any, acc: Any) -> Any:
    i = vsub(vadd(i, j), times32(pair_dot(bsL(a + 36), pair)))
    return fma(to_float(i), vmul(d, bcL(a + 32)), acc)


@inline
def _q6_k_sub4(
    six: Any, low: Any, high: Any, scales: Any, d: Any,
    a0: Any, a1: Any, a2: Any, a3: Any, r0: Any, r1: Any, r2: Any, r3: Any,
) -> Any:  # fmt: skip
    pair = ld_pairsL(scales)
    w0, w1 = six(ld_wL(low), ld_wL(high)), six(ld_wL(low + 64), ld_wL(high + 64))
    w2, w3 = six(ld_wL(low + 128), ld_wL(high + 128)), six(ld_wL(low + 192), ld_wL(high + 192))
    s = pair_low(pair)
    i0, i1 = _dot16L(w0, w1, w2, w3, a0, s), _dot16L(w0, w1, w2, w3, a1, s)
    i2, i3 = _dot16L(w0, w1, w2, w3, a2, s), _dot16L(w0, w1, w2, w3, a3, s)
    low += 256
    high += 256
    w0, w1 = six(ld_wL(low), ld_wL(high)), six(ld_wL(low + 64), ld_wL(high + 64))
    w2, w3 = six(ld_wL(low + 128), ld_wL(high + 128)), six(ld_wL(low + 192), ld_wL(high + 192))
    s = pair_high(pair)
    r0 = _q6_k_end(i0, _dot16L(w0, w1, w2, w3, a0 + 16, s), pair, d, a0, r0)
    r1 = _q6_k_end(i1, _dot16L(w0, w1, w2, w3, a1 + 16, s), pair, d, a1, r1)
    r2 = _q6_k_end(i2, _dot16L(w0, w1, w2, w3, a2 + 16, s), pair, d, a2, r2)
    r3 = _q6_k_end(i3, _dot16L(w0, w1, w2, w3, a3 + 16, s), pair, d, a3, r3)
    return r0, r1, r2, r3


@inline
def _q6_k_tile4(p: Any, part: Any, K: Any, a0: Any, a1: Any, a2: Any, a3: Any) -> Any:
    r0, r1, r2, r3 = zeroL(), zeroL(), zeroL(), zeroL()
    for h in range(K // 128):
        block = p + (h >> 1) * _Q6_K_BYTES
        d = ld_f16L(block + 2 * LANES * part)
        half = block + 32 + (h & 1) * _Q6_K_HALF
        s, low = half + 2 * LANES * part, half + 128 + 4 * LANES * part
        high = low + 1024
        r0, r1, r2, r3 = _q6_k_sub4(
            _six_0, low, high, s, d, a0, a1, a2, a3, r0, r1, r2, r3
        )  # fmt: skip
        r0, r1, r2, r3 = _q6_k_sub4(
            _six_1, low + 512, high, s + 32, d, a0 + 40, a1 + 40, a2 + 40, a3 + 40,
            r0, r1, r2, r3,
        )  # fmt: skip
        r0, r1, r2, r3 = _q6_k_sub4(
            _six_2, low, high, s + 64, d, a0 + 80, a1 + 80, a2 + 80, a3 + 80,
            r0, r1, r2, r3,
        )  # fmt: skip
        r0, r1, r2, r3 = _q6_k_sub4(
            _six_3, low + 512, high, s + 96, d, a0 + 120, a1 + 120, a2 + 120, a3 + 120,
            r0, r1, r2, r3,
        )  # fmt: skip
        a0, a1, a2, a3 = a0 + 160, a1 + 160, a2 + 160, a3 + 160
    return r0, r1, r2, r3


@kernel(MATMUL)
def _matmul_q4_k_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        _q4_k_tile1, _q4_k_tile4, K // 256 * _Q4_K_BYTES, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_q6_k_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        _q6_k_tile1, _q6_k_tile4, K // 256 * _Q6_K_BYTES, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


KERNELS: dict[str, Kernel] = {"Q4_K": _matmul_q4_k_kernel, "Q6_K": _matmul_q6_k_kernel}
