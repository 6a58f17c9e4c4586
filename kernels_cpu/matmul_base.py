"""Bases of nested packs times quantised activations: the top 2 to 5 bits of 32-weight blocks.

    y[row, t] = acc over blocks b = 0, 1, 2, ... of
        acc = fma(float32(dot_b), float32((d[row, b] / 2) * d_x[t, b]), acc)
        of Q4_1, Q5_1 then: acc = fma(m[row, b], float32(d_x[t, b] * float32(sum_x[t, b])), acc)
    dot_b = 2 s * sum(u * q_x) + (s - 1 - 2 z) * sum(q_x), s = 2^(n - bits), exact

A code u stands for the middle of the s codes q - z of the n-bit format with the same top bits, half
of an odd number: hence d / 2. z is 2^(n - 1), or 0 where weights have an offset m.

Owns: the loop over one tile, for a pack of tokens (`packs`). Must not know: how a base is split off
(`nested`), how tokens are found or results stored (`matmul_drive`). Layout of a block of 16 rows:
d (32 bytes), m (32) if there is one, then `bits` units of 4 bytes a row, 64 bytes each.
"""

from __future__ import annotations

from typing import Any

from edgert.kernels_cpu.activations import BLOCK_BYTES
from edgert.kernels_cpu.jit import Kernel, inline, kernel
from edgert.kernels_cpu.lanes import LANES, prefetch_lines
from edgert.kernels_cpu.matmul_block32 import dot_fives, dot_nibbles
from edgert.kernels_cpu.matmul_drive import MATMUL, drive, up_to_most
from edgert.kernels_cpu.matmul_planes import dot_threes, dot_twos
from edgert.kernels_cpu.packs import (
    accumulators,
    constant_pairs,
    dot_pairs,
    fma_sum,
    fma_totals,
    half_scales,
    halves,
    step,
    times,
)

__all__ = ["KERNELS"]

# Bytes of a block of 16 rows by bits, with d or with d and m.
_D2, _D3, _D4, _D5 = (32 + 64 * bits for bits in (2, 3, 4, 5))
_M2, _M3, _M4 = (64 + 64 * bits for bits in (2, 3, 4))
_times_4, _times_8, _times_16 = times(4), times(8), times(16)
_times_32, _times_64 = times(32), times(64)
# s - 1 - 2 z by n and bits, then s - 1
_zero_8_3, _zero_8_4, _zero_8_5 = (constant_pairs(s - 257) for s in (32, 16, 8))
_zero_5_3, _zero_5_4 = constant_pairs(4 - 33), constant_pairs(2 - 33)
_zero_4_2, _zero_4_3 = constant_pairs(4 - 17), constant_pairs(2 - 17)
_plus_3, _plus_1 = constant_pairs(3), constant_pairs(1)
_prefetch_3, _prefetch_4, _prefetch_5, _prefetch_6 = (prefetch_lines(n) for n in (3, 4, 5, 6))


@inline
def _base(
    dot: Any, widen: Any, zero: Any, ask: Any, nbytes: Any, p: Any, part: Any, K: Any, xs: Any
) -> Any:
    """A tile in blocks of `nbytes`: d, then what `dot` reads; u becomes `widen` of it + `zero`."""
    acc = accumulators(xs)
    d, w = p + 2 * LANES * part, p + 32 + 4 * LANES * part
    for _ in range(K // 32):
        ask(w)
        totals = dot_pairs(widen(dot(w, xs, acc)), zero(acc), xs, 0)
        acc = fma_totals(acc, totals, half_scales(acc, d), xs, 0)
        d += nbytes
        w += nbytes
        xs = step(xs, BLOCK_BYTES)
    return acc


@inline
def _base_and_offset(
    dot: Any, widen: Any, zero: Any, ask: Any, nbytes: Any, p: Any, part: Any, K: Any, xs: Any
) -> Any:
    """As `_base` in blocks that begin with d and m."""
    acc = accumulators(xs)
    d, w = p + 2 * LANES * part, p + 64 + 4 * LANES * part
    for _ in range(K // 32):
        ask(w)
        totals = dot_pairs(widen(dot(w, xs, acc)), zero(acc), xs, 0)
        acc = fma_totals(acc, totals, half_scales(acc, d), xs, 0)
        acc = fma_sum(acc, halves(acc, d + 32), xs, 0)
        d += nbytes
        w += nbytes
        xs = step(xs, BLOCK_BYTES)
    return acc


@inline
def _b3(p: Any, part: Any, K: Any, xs: Any) -> Any:
    return _base(dot_threes, _times_64, _zero_8_3, _prefetch_4, _D3, p, part, K, xs)


@inline
def _b4(p: Any, part: Any, K: Any, xs: Any) -> Any:
    return _base(dot_nibbles, _times_32, _zero_8_4, _prefetch_5, _D4, p, part, K, xs)


@inline
def _b5(p: Any, part: Any, K: Any, xs: Any) -> Any:
    return _base(dot_fives, _times_16, _zero_8_5, _prefetch_6, _D5, p, part, K, xs)


@inline
def _b3_q5_0(p: Any, part: Any, K: Any, xs: Any) -> Any:
    return _base(dot_threes, _times_8, _zero_5_3, _prefetch_4, _D3, p, part, K, xs)


@inline
def _b4_q5_0(p: Any, part: Any, K: Any, xs: Any) -> Any:
    return _base(dot_nibbles, _times_4, _zero_5_4, _prefetch_5, _D4, p, part, K, xs)


@inline
def _b2_q4_0(p: Any, part: Any, K: Any, xs: Any) -> Any:
    return _base(dot_twos, _times_8, _zero_4_2, _prefetch_3, _D2, p, part, K, xs)


@inline
def _b3_q4_0(p: Any, part: Any, K: Any, xs: Any) -> Any:
    return _base(dot_threes, _times_4, _zero_4_3, _prefetch_4, _D3, p, part, K, xs)


@inline
def _b3_q5_1(p: Any, part: Any, K: Any, xs: Any) -> Any:
    return _base_and_offset(dot_threes, _times_8, _plus_3, _prefetch_4, _M3, p, part, K, xs)


@inline
def _b4_q5_1(p: Any, part: Any, K: Any, xs: Any) -> Any:
    return _base_and_offset(dot_nibbles, _times_4, _plus_1, _prefetch_5, _M4, p, part, K, xs)


@inline
def _b2_q4_1(p: Any, part: Any, K: Any, xs: Any) -> Any:
    return _base_and_offset(dot_twos, _times_8, _plus_3, _prefetch_3, _M2, p, part, K, xs)


@inline
def _b3_q4_1(p: Any, part: Any, K: Any, xs: Any) -> Any:
    return _base_and_offset(dot_threes, _times_4, _plus_1, _prefetch_4, _M3, p, part, K, xs)


@kernel(MATMUL)
def _matmul_b3_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        up_to_most, _b3, K // 32 * _D3, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_b4_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        up_to_most, _b4, K // 32 * _D4, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_b5_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        up_to_most, _b5, K // 32 * _D5, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_b3_q5_0_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        up_to_most, _b3_q5_0, K // 32 * _D3, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_b4_q5_0_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        up_to_most, _b4_q5_0, K // 32 * _D4, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_b2_q4_0_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        up_to_most, _b2_q4_0, K // 32 * _D2, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_b3_q4_0_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        up_to_most, _b3_q4_0, K // 32 * _D3, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_b3_q5_1_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        up_to_most, _b3_q5_1, K // 32 * _M3, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_b4_q5_1_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        up_to_most, _b4_q5_1, K // 32 * _M4, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_b2_q4_1_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        up_to_most, _b2_q4_1, K // 32 * _M2, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_b3_q4_1_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        up_to_most, _b3_q4_1, K // 32 * _M3, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


KERNELS: dict[str, Kernel] = {
    "B3": _matmul_b3_kernel,
    "B4": _matmul_b4_kernel,
    "B5": _matmul_b5_kernel,
    "B3_Q5_0": _matmul_b3_q5_0_kernel,
    "B4_Q5_0": _matmul_b4_q5_0_kernel,
    "B2_Q4_0": _matmul_b2_q4_0_kernel,
    "B3_Q4_0": _matmul_b3_q4_0_kernel,
    "B3_Q5_1": _matmul_b3_q5_1_kernel,
    "B4_Q5_1": _matmul_b4_q5_1_kernel,
    "B2_Q4_1": _matmul_b2_q4_1_kernel,
    "B3_Q4_1": _matmul_b3_q4_1_kernel,
}
