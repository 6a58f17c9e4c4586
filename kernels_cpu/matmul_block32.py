"""Formats of 32-weight blocks times quantised activations.

    y[row, t] = acc over blocks b = 0, 1, 2, ... of
        acc = fma(float32(dot_b), float32(d_w[row, b] * d_x[t, b]), acc)
        Q4_1, Q5_1 then: acc = fma(m_w[row, b], float32(d_x[t, b] * float32(sum_x[t, b])), acc)
    dot_b = sum of the 32 integer products q_w * q_x, exact

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
    mxfp4_codes,
    prefetch_lines,
)
from edgert.kernels_cpu.matmul_drive import MATMUL, drive, up_to_most
from edgert.kernels_cpu.packs import (
    accumulators,
    add,
    constant_pairs,
    dot_pairs,
    exponents,
    fma_sum,
    fma_totals,
    halves,
    integers,
    mac_s8,
    mac_u8,
    signed_totals,
    step,
    total,
    weights,
)
from edgert.kernels_cpu.simd import vor

__all__ = ["KERNELS", "dot_codes", "dot_fives", "dot_nibbles"]

# Bytes of a block of 16 rows: scales (and offsets), fifth bits, then units of 4 bytes a row. In
# unit v of a 4-bit format weights 4v + j are the low nibbles, weights 16 + 4v + j the high ones.
_Q8_0_BYTES, _Q4_0_BYTES, _Q4_1_BYTES = 32 + 512, 32 + 256, 64 + 256
_Q5_0_BYTES, _Q5_1_BYTES = 32 + 64 + 256, 64 + 64 + 256
_IQ4_NL_BYTES, _MXFP4_BYTES = 32 + 256, 16 + 256

_minus_8, _minus_16 = constant_pairs(-8), constant_pairs(-16)
# The fifth bit of each weight, moved to bit 4; low nibbles of unit v: bit v, high ones: bit 4 + v.
_low_fifth_0, _low_fifth_1 = field(-4, 0x10), field(-3, 0x10)
_low_fifth_2, _low_fifth_3 = field(-2, 0x10), field(-1, 0x10)
_high_fifth_0, _high_fifth_1 = field(0, 0x10), field(1, 0x10)
_high_fifth_2, _high_fifth_3 = field(2, 0x10), field(3, 0x10)
_prefetch_5, _prefetch_6, _prefetch_9 = prefetch_lines(5), prefetch_lines(6), prefetch_lines(9)


@inline
def _dot_bytes(w: Any, xs: Any, acc: Any) -> Any:
    """Totals of 32 weights -128..127 in 8 units at `w`."""
    i = signed_totals(acc, xs, 0)
    for v in range(8):
        i = mac_s8(i, weights(acc, w + 64 * v), xs, 4 * v)
    return i


@inline
def dot_nibbles(w: Any, xs: Any, acc: Any) -> Any:
    """Totals of 32 weights 0..15 in 4 units at `w`."""
    i = integers(acc)
    for v in range(4):
        q = weights(acc, w + 64 * v)
        i = mac_u8(i, low_nibbles(q), xs, 4 * v)
        i = mac_u8(i, high_nibbles(q), xs, 16 + 4 * v)
    return total(i)


@inline
def dot_fives(w: Any, xs: Any, acc: Any) -> Any:
    """Totals of 32 weights 0..31: fifth bits at `w`, then 4 units of nibbles."""
    h = weights(acc, w)
    w += 64
    i = integers(acc)
    q = weights(acc, w)
    i = mac_u8(i, vor(low_nibbles(q), _low_fifth_0(h)), xs, 0)
    i = mac_u8(i, vor(high_nibbles(q), _high_fifth_0(h)), xs, 16)
    q = weights(acc, w + 64)
    i = mac_u8(i, vor(low_nibbles(q), _low_fifth_1(h)), xs, 4)
    i = mac_u8(i, vor(high_nibbles(q), _high_fifth_1(h)), xs, 20)
    totals = total(i)
    i = integers(acc)
    q = weights(acc, w + 128)
    i = mac_u8(i, vor(low_nibbles(q), _low_fifth_2(h)), xs, 8)
    i = mac_u8(i, vor(high_nibbles(q), _high_fifth_2(h)), xs, 24)
    q = weights(acc, w + 192)
    i = mac_u8(i, vor(low_nibbles(q), _low_fifth_3(h)), xs, 12)
    i = mac_u8(i, vor(high_nibbles(q), _high_fifth_3(h)), xs, 28)
    return add(totals, total(i))


@inline
def dot_codes(codes: Any, w: Any, xs: Any, acc: Any) -> Any:
    """Totals of 32 weights that are `codes` (int8) of the nibbles in 4 units at `w`."""
    i = signed_totals(acc, xs, 0)
    for v in range(4):
        q = weights(acc, w + 64 * v)
        i = mac_s8(i, codes(low_nibbles(q)), xs, 4 * v)
        i = mac_s8(i, codes(high_nibbles(q)), xs, 16 + 4 * v)
    return i


@inline
def _dot_q4_0(w: Any, xs: Any, acc: Any) -> Any:
    return dot_pairs(dot_nibbles(w, xs, acc), _minus_8(acc), xs, 0)


@inline
def _dot_q5_0(w: Any, xs: Any, acc: Any) -> Any:
    return dot_pairs(dot_fives(w, xs, acc), _minus_16(acc), xs, 0)


@inline
def _dot_iq4_nl(w: Any, xs: Any, acc: Any) -> Any:
    return dot_codes(iq4_codes, w, xs, acc)


@inline
def _dot_mxfp4(w: Any, xs: Any, acc: Any) -> Any:
    return dot_codes(mxfp4_codes, w, xs, acc)


@inline
def _scaled(
    dot: Any, load: Any, size: Any, ask: Any, nbytes: Any, p: Any, part: Any, K: Any, xs: Any
) -> Any:
    """A tile in blocks of `nbytes`: scales of `size` bytes a row, then what `dot` reads."""
    acc = accumulators(xs)
    d, w = p + size * LANES * part, p + 16 * size + 4 * LANES * part
    for _ in range(K // 32):
        ask(w)
        acc = fma_totals(acc, dot(w, xs, acc), load(acc, d), xs, 0)
        d += nbytes
        w += nbytes
        xs = step(xs, BLOCK_BYTES)
    return acc


@inline
def _scaled_and_offset(dot: Any, ask: Any, nbytes: Any, p: Any, part: Any, K: Any, xs: Any) -> Any:
    """A tile in blocks of `nbytes`: d and m of 16 rows as halves, then what `dot` reads."""
    acc = accumulators(xs)
    d, w = p + 2 * LANES * part, p + 64 + 4 * LANES * part
    for _ in range(K // 32):
        ask(w)
        acc = fma_totals(acc, dot(w, xs, acc), halves(acc, d), xs, 0)
        acc = fma_sum(acc, halves(acc, d + 32), xs, 0)
        d += nbytes
        w += nbytes
        xs = step(xs, BLOCK_BYTES)
    return acc


@inline
def _q8_0(p: Any, part: Any, K: Any, xs: Any) -> Any:
    return _scaled(_dot_bytes, halves, 2, _prefetch_9, _Q8_0_BYTES, p, part, K, xs)


@inline
def _q4_0(p: Any, part: Any, K: Any, xs: Any) -> Any:
    return _scaled(_dot_q4_0, halves, 2, _prefetch_5, _Q4_0_BYTES, p, part, K, xs)


@inline
def _q5_0(p: Any, part: Any, K: Any, xs: Any) -> Any:
    return _scaled(_dot_q5_0, halves, 2, _prefetch_6, _Q5_0_BYTES, p, part, K, xs)


@inline
def _iq4_nl(p: Any, part: Any, K: Any, xs: Any) -> Any:
    return _scaled(_dot_iq4_nl, halves, 2, _prefetch_5, _IQ4_NL_BYTES, p, part, K, xs)


@inline
def _mxfp4(p: Any, part: Any, K: Any, xs: Any) -> Any:
    return _scaled(_dot_mxfp4, exponents, 1, _prefetch_5, _MXFP4_BYTES, p, part, K, xs)


@inline
def _q4_1(p: Any, part: Any, K: Any, xs: Any) -> Any:
    return _scaled_and_offset(dot_nibbles, _prefetch_5, _Q4_1_BYTES, p, part, K, xs)


@inline
def _q5_1(p: Any, part: Any, K: Any, xs: Any) -> Any:
    return _scaled_and_offset(dot_fives, _prefetch_6, _Q5_1_BYTES, p, part, K, xs)


@kernel(MATMUL)
def _matmul_q8_0_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        up_to_most, _q8_0, K // 32 * _Q8_0_BYTES, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_q4_0_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        up_to_most, _q4_0, K // 32 * _Q4_0_BYTES, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_q4_1_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        up_to_most, _q4_1, K // 32 * _Q4_1_BYTES, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_q5_0_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        up_to_most, _q5_0, K // 32 * _Q5_0_BYTES, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_q5_1_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        up_to_most, _q5_1, K // 32 * _Q5_1_BYTES, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_iq4_nl_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        up_to_most, _iq4_nl, K // 32 * _IQ4_NL_BYTES, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_mxfp4_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        up_to_most, _mxfp4, K // 32 * _MXFP4_BYTES, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


KERNELS: dict[str, Kernel] = {
    "Q8_0": _matmul_q8_0_kernel,
    "Q4_0": _matmul_q4_0_kernel,
    "Q4_1": _matmul_q4_1_kernel,
    "Q5_0": _matmul_q5_0_kernel,
    "Q5_1": _matmul_q5_1_kernel,
    "IQ4_NL": _matmul_iq4_nl_kernel,
    "MXFP4": _matmul_mxfp4_kernel,
}
