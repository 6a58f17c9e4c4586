"""Q4_K, Q5_K, IQ4_XS: super-blocks of 256 weights with a scale for each 32.

Over sub-blocks b = 0, 1, 2, ... of 32 weights:

    acc = fma(float32(dot_b), (d * sc_b) * d_x[b], acc)
    Q4_K, Q5_K then: acc = fma(-(dmin * mn_b), d_x[b] * float32(sum_x[b]), acc)

The products in brackets are exact in float32 (11 + 6 bits); dot_b is an integer below 2**24.
Owns: the loop over one tile, for a pack of tokens (`packs`). Must not know: how tokens are found
or results stored (`matmul_drive`). Layout: `layout`.
"""

from __future__ import annotations

from typing import Any

from edgert.kernels_cpu.activations import BLOCK_BYTES
from edgert.kernels_cpu.jit import Kernel, inline, kernel
from edgert.kernels_cpu.lanes import (
    LANES,
    field,
    high_nibbles,
    iq4_codes,
    low_nibbles,
    prefetch_lines,
    shifted,
)
from edgert.kernels_cpu.matmul_block32 import dot_codes
from edgert.kernels_cpu.matmul_drive import MATMUL, drive, up_to_most
from edgert.kernels_cpu.packs import (
    accumulators,
    add,
    bytes_as_float,
    fma_sum,
    fma_totals,
    halves,
    integers,
    mac_u8,
    signed_bytes_as_float,
    step,
    total,
    weights,
)
from edgert.kernels_cpu.simd import vmul, vneg, vor

__all__ = ["KERNELS"]

# Bytes of a super-block of 16 rows and of its groups (64 weights) or sub-blocks (32).
_Q4_K_BYTES, _GROUP = 2368, 576  # d, dmin, 4 x [scale, min, scale, min, 8 x 64 of 4 bits]
_Q5_K_BYTES = 2880  # d, dmin, 8 x 64 fifth bits, groups as Q4_K
_IQ4_XS_BYTES, _IQ4_XS_SUB = 2208, 272  # d, 8 x [scale, 4 x 64 of 4 bits]

_fifth_0, _fifth_1 = field(-4, 0x10), field(-3, 0x10)
_prefetch_5, _prefetch_6 = prefetch_lines(5), prefetch_lines(6, far=True)


@inline
def _add_sub(totals: Any, scales: Any, d: Any, dmin: Any, xs: Any, at: Any, acc: Any) -> Any:
    acc = fma_totals(acc, totals, vmul(d, bytes_as_float(acc, scales)), xs, at)
    return fma_sum(acc, vneg(vmul(dmin, bytes_as_float(acc, scales + 16))), xs, at)


@inline
def _dot_fours(nibbles: Any, w: Any, xs: Any, at: Any, acc: Any) -> Any:
    i = integers(acc)
    for v in range(8):
        i = mac_u8(i, nibbles(weights(acc, w + 64 * v)), xs, at + 4 * v)
    return total(i)


@inline
def _q4_k(p: Any, part: Any, K: Any, xs: Any) -> Any:
    acc, ahead = accumulators(xs), p
    for g in range(K // 64):
        block = p + (g >> 2) * _Q4_K_BYTES
        at = block + 2 * LANES * part
        d, dmin = halves(acc, at), halves(acc, at + 32)
        group = block + 64 + (g & 3) * _GROUP
        s, w = group + LANES * part, group + 64 + 4 * LANES * part
        _prefetch_5(ahead)
        acc = _add_sub(_dot_fours(low_nibbles, w, xs, 0, acc), s, d, dmin, xs, 0, acc)
        _prefetch_5(ahead + 296)
        acc = _add_sub(
            _dot_fours(high_nibbles, w, xs, BLOCK_BYTES, acc), s + 32, d, dmin, xs, BLOCK_BYTES, acc
        )
        ahead += 592
        xs = step(xs, 2 * BLOCK_BYTES)
    return acc


@inline
def _dot_fives(
    nibbles: Any, fifth: Any, w: Any, high: Any, shift: Any, xs: Any, at: Any, acc: Any
) -> Any:
    i, j = integers(acc), integers(acc)
    for v in range(0, 256, 64):
        q = vor(nibbles(weights(acc, w + v)), fifth(shifted(weights(acc, high + v), shift)))
        i = mac_u8(i, q, xs, at + v // 16)
    for v in range(256, 512, 64):
        q = vor(nibbles(weights(acc, w + v)), fifth(shifted(weights(acc, high + v), shift)))
        j = mac_u8(j, q, xs, at + v // 16)
    return add(total(i), total(j))


@inline
def _q5_k(p: Any, part: Any, K: Any, xs: Any) -> Any:
    acc, ahead = accumulators(xs), p
    for g in range(K // 64):
        block = p + (g >> 2) * _Q5_K_BYTES
        at = block + 2 * LANES * part
        d, dmin = halves(acc, at), halves(acc, at + 32)
        high, shift = block + 64 + 4 * LANES * part, 2 * (g & 3)
        group = block + 576 + (g & 3) * _GROUP
        s, w = group + LANES * part, group + 64 + 4 * LANES * part
        _prefetch_6(ahead)
        i = _dot_fives(low_nibbles, _fifth_0, w, high, shift, xs, 0, acc)
        acc = _add_sub(i, s, d, dmin, xs, 0, acc)
        _prefetch_6(ahead + 360)
        i = _dot_fives(high_nibbles, _fifth_1, w, high, shift, xs, BLOCK_BYTES, acc)
        acc = _add_sub(i, s + 32, d, dmin, xs, BLOCK_BYTES, acc)
        ahead += 720
        xs = step(xs, 2 * BLOCK_BYTES)
    return acc


@inline
def _iq4_xs(p: Any, part: Any, K: Any, xs: Any) -> Any:
    acc = accumulators(xs)
    for b in range(K // 32):
        block = p + (b >> 3) * _IQ4_XS_BYTES
        sub = block + 32 + (b & 7) * _IQ4_XS_SUB
        _prefetch_5(sub)
        w = sub + 16 + 4 * LANES * part
        i = dot_codes(iq4_codes, w, xs, acc)
        d = halves(acc, block + 2 * LANES * part)
        scale = vmul(d, signed_bytes_as_float(acc, sub + LANES * part))
        acc = fma_totals(acc, i, scale, xs, 0)
        xs = step(xs, BLOCK_BYTES)
    return acc


@kernel(MATMUL)
def _matmul_q4_k_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        up_to_most, _q4_k, K // 256 * _Q4_K_BYTES, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_q5_k_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        up_to_most, _q5_k, K // 256 * _Q5_K_BYTES, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_iq4_xs_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        up_to_most, _iq4_xs, K // 256 * _IQ4_XS_BYTES, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


KERNELS: dict[str, Kernel] = {
    "Q4_K": _matmul_q4_k_kernel,
    "Q5_K": _matmul_q5_k_kernel,
    "IQ4_XS": _matmul_iq4_xs_kernel,
}
